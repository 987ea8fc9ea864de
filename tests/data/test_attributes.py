"""Attribute labels: the file, stopping and going on, and BLIP-2 itself in miniature."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastsds.data import DataError, LabelledImage, label_attributes, read_attributes
from fastsds.data.attributes import AttributesConfig, Blip2Labeller, run_attributes


@pytest.fixture
def items() -> list[LabelledImage]:
    return [
        LabelledImage(Image.new("RGB", (4, 4), (index, 0, 0)), 0, "frog", f"frog/{index}.png") for index in range(5)
    ]


class Recorder:
    """Answers with the image's red value, `silent` ones with nothing, and stops as a killed run at batch `stop`."""

    def __init__(self, *, silent: Sequence[int] = (), stop: int | None = None) -> None:
        self.silent, self.stop = silent, stop
        self.batches: list[list[int]] = []

    def __call__(self, images: Sequence[Image.Image], classnames: Sequence[str]) -> list[str]:
        if len(self.batches) == self.stop:
            raise KeyboardInterrupt
        self.batches.append([image.getpixel((0, 0))[0] for image in images])
        assert list(classnames) == ["frog"] * len(images)
        return ["" if value in self.silent else f"word {value}" for value in self.batches[-1]]


def test_names_that_are_not_utf8_are_read_as_they_were(items: list[LabelledImage], tmp_path: Path) -> None:
    out, key = tmp_path / "attributes.jsonl", os.fsdecode(b"caf\xe9.png")
    item = dataclasses.replace(items[0], key=key)
    for _ in range(2):  # the second run writes again what the first did
        label_attributes([item], Recorder(), out, progress=False)
        assert read_attributes(out) == {key: "word 0"}


def test_labels_are_written_batch_by_batch(items: list[LabelledImage], tmp_path: Path) -> None:
    labeller, out = Recorder(), tmp_path / "sub" / "attributes.jsonl"
    assert label_attributes(items, labeller, out, batch_size=2, progress=False) == 0
    assert labeller.batches == [[0, 1], [2, 3], [4]]
    assert read_attributes(out) == {f"frog/{index}.png": f"word {index}" for index in range(5)}


def test_a_stopped_run_goes_on_where_it_stopped(items: list[LabelledImage], tmp_path: Path) -> None:
    out = tmp_path / "attributes.jsonl"
    with pytest.raises(KeyboardInterrupt):
        label_attributes(items, Recorder(stop=1), out, batch_size=2, progress=False)
    with out.open("ab") as file:
        file.write('{"path": "é'.encode()[:-1])  # killed in the middle of a line, and of a letter
    second = Recorder()
    label_attributes(items, second, out, batch_size=2, progress=False)
    assert second.batches == [[2, 3], [4]]
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"path": f"frog/{index}.png", "attribute": f"word {index}"} for index in range(5)]


def test_files_of_windows_are_read(tmp_path: Path) -> None:
    out = tmp_path / "attributes.jsonl"
    out.write_bytes(b'\xef\xbb\xbf{"path": "a", "attribute": "red"}\r\n\r\n{"path": "b", "attribute": "blue"}\r\n')
    assert read_attributes(out) == {"a": "red", "b": "blue"}


def test_a_whole_last_line_without_an_end_is_kept(items: list[LabelledImage], tmp_path: Path) -> None:
    out = tmp_path / "attributes.jsonl"
    out.write_text('{"path": "of another set", "attribute": "red"}\n{"path": "frog/2.png", "attribute": "green"}')
    assert len(read_attributes(out)) == 2
    label_attributes(items, Recorder(), out, progress=False)
    assert list(read_attributes(out).values()) == ["red", "green", "word 0", "word 1", "word 3", "word 4"]


def test_images_without_an_answer_are_counted_and_not_written(items: list[LabelledImage], tmp_path: Path) -> None:
    out = tmp_path / "attributes.jsonl"
    assert label_attributes(items, Recorder(silent=(1, 3)), out, progress=False) == 2
    assert list(read_attributes(out)) == ["frog/0.png", "frog/2.png", "frog/4.png"]


@pytest.mark.parametrize(
    ("line", "shown"),
    [("{", r"'\{'"), ("[1]", r"'\[1\]'"), ('{"path": "a"}', "path"), ('{"path": "a", "attribute": " "}', "attribute")],
)
def test_lines_of_another_format_are_named(tmp_path: Path, line: str, shown: str) -> None:
    out = tmp_path / "attributes.jsonl"
    out.write_text('{"path": "a", "attribute": "red"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r'path: expected \{"path": …, "attribute": …\} with two texts in line 3 of .*' + shown
    ):
        read_attributes(out)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"path: could not read .*none\.jsonl"):
        read_attributes(tmp_path / "none.jsonl")


def test_an_unreadable_image_is_named(items: list[LabelledImage], tmp_path: Path) -> None:
    broken = LabelledImage(tmp_path / "none.png", 0, "frog", "none.png")
    with pytest.raises(DataError, match=r"image: .*none\.png does not exist"):
        label_attributes([*items, broken], Recorder(), tmp_path / "out.jsonl", batch_size=5, progress=False)
    assert len(read_attributes(tmp_path / "out.jsonl")) == 5


@pytest.fixture(scope="module")
def blip2(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a genuine BLIP-2 with random weights, an OPT of two layers behind it."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessor,
        CLIPTokenizer,
        OPTConfig,
    )

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    processor = Blip2Processor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer, num_query_tokens=3)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = OPTConfig(
        vocab_size=len(processor.tokenizer), hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=Blip2VisionConfig(image_size=16, patch_size=8, **small).to_dict(),
        qformer_config=Blip2QFormerConfig(vocab_size=10, encoder_hidden_size=16, **small).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=3,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    folder = tmp_path_factory.mktemp("blip2")
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _pictures(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (count, 16, 16, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in noise]


def test_blip2_answers_do_not_depend_on_the_batch(blip2: Path) -> None:
    labeller = Blip2Labeller.from_pretrained(blip2, question="{classname} of the")
    images, names = _pictures(4), ["circle", "large red square", "ring", "a"]
    together = labeller(images, names)
    assert together == [labeller([image], [name])[0] for image, name in zip(images, names, strict=True)]
    assert any(together)


def test_blip2_is_given_the_image_and_the_question(blip2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labeller = Blip2Labeller.from_pretrained(blip2, question="a photo of {classname} {x}")
    seen: list[Any] = []
    generate = labeller.model.generate

    def record(**inputs: Any) -> Any:
        seen.append(inputs)
        return generate(**inputs)

    monkeypatch.setattr(labeller.model, "generate", record)
    answers = labeller(_pictures(2), ["ring", "large circle"])
    (inputs,) = seen
    tokenizer = labeller.processor.tokenizer
    questions = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert [question.strip() for question in questions] == ["a photo of ring { x }", "a photo of large circle { x }"]
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    # The answer follows the question and does not repeat it.
    new = generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
    assert answers == [text.strip().splitlines()[0].strip(" .,;:!?\"'").lower() for text in decoded]


def test_older_processors_learn_the_number_of_query_tokens(blip2: Path) -> None:
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    processor = Blip2Processor.from_pretrained(blip2)
    processor.num_query_tokens = None
    labeller = Blip2Labeller(Blip2ForConditionalGeneration.from_pretrained(blip2), processor)
    assert processor.num_query_tokens == 3
    assert len(labeller(_pictures(1), ["ring"])) == 1


def test_the_command_labels_the_training_images(
    blip2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, count in (("train", 3), ("test", 1)):
        folder = tmp_path / "images" / part / "ring"
        folder.mkdir(parents=True)
        for index, picture in enumerate(_pictures(count)):
            picture.save(folder / f"{index}.png")
    out = tmp_path / "attributes.jsonl"
    config = AttributesConfig(
        tmp_path / "images", out=out, model=str(blip2), question="a {classname}", batch_size=2, device="cpu"
    )
    run_attributes(config)
    attributes = read_attributes(out)
    assert set(attributes) <= {f"train/ring/{index}.png" for index in range(3)}
    assert f"{len(attributes)} of 3 training images have an attribute in {out}" in capsys.readouterr().out
    labeller = Blip2Labeller.from_pretrained(blip2, "a {classname}")
    for key, attribute in attributes.items():
        assert labeller([Image.open(tmp_path / "images" / key)], ["ring"]) == [attribute]


def test_batches_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        AttributesConfig(tmp_path, batch_size=0)
