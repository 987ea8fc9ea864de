from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from fastsds.data import BadImages, CaptionDataset, DataError, collate_captions
from fastsds.data.captions import EpochCaptions


def _preprocess(image: Image.Image) -> Tensor:
    """The colour of the top left corner: what the file holds, where conversion to RGB was right."""
    assert image.mode == "RGB"
    return torch.tensor(image.getpixel((0, 0)))


def _tokenizer(captions: list[str]) -> Tensor:
    return torch.tensor([[len(caption), ord(caption[0])] for caption in captions])


def _dataset(images: list[Any], **options: Any) -> CaptionDataset:
    return CaptionDataset(images, ["x"] * len(images), _preprocess, _tokenizer, **options)


def test_missing_image_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    dataset = _dataset([tmp_path / "gone.png"])
    with pytest.raises(DataError, match=r"image: .*gone\.png does not exist"):
        dataset[0]


def test_truncated_jpeg_is_named(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 80).convert("RGB").save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(
        DataError, match=r"image: .*cut\.jpg cannot be read \(.*truncated.*\); replace it or take its row"
    ):
        _dataset([cut])[0]


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_files_that_are_no_images_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"image: .*page\.png cannot be read"):
        _dataset([path])[0]


def test_images_too_large_to_be_meant_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("RGB", (64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"image: .*bomb\.png cannot be read"):
        _dataset([path])[0]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 130, [130, 130, 130]),
        ("1", 1, [255, 255, 255]),
        ("LA", (130, 7), [130, 130, 130]),
        ("RGBA", (1, 2, 3, 128), [1, 2, 3]),
        ("P", (250, 4, 9), [250, 4, 9]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, colour: Any, expected: list[int], in_memory: bool) -> None:
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, *colour])
    else:
        image = Image.new(mode, (8, 8), colour)
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image.save(path)
    assert _dataset([image if in_memory else path])[0]["images"].tolist() == expected


def test_images_in_memory_are_left_as_they_are() -> None:
    image = Image.new("L", (8, 8), 130)
    _dataset([image])[0]
    assert image.mode == "L" and image.getpixel((0, 0)) == 130


IMAGES = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": ["a", "b"]}, "captions: expected one for each of 3 images, got 2"),
        ({"candidates": [["a", "b"]] * 4}, "candidates: expected one for each of 3 images, got 4"),
        ({"extra": {"latents": torch.zeros(1, 4, 8, 8)}}, "latents: expected one for each of 3 images, got 1"),
        ({"images": [], "captions": []}, "images: expected at least one, got none"),
    ],
)
def test_columns_of_unequal_length_are_refused(options: dict[str, Any], message: str) -> None:
    columns = {"images": IMAGES, "captions": ["a", "b", "c"], **options}
    with pytest.raises(DataError, match=message):
        CaptionDataset(preprocess=_preprocess, tokenizer=_tokenizer, **columns)


def _with_candidates(extra: dict[str, Tensor] | None = None) -> CaptionDataset:
    candidates = [["a", "bb"], ["ccc", "b"], ["dd", "e"]]
    return CaptionDataset(IMAGES, ["a", "b", "c"], _preprocess, _tokenizer, candidates=candidates, extra=extra)


def test_collate_stacks_tensors_and_lists_strings() -> None:
    dataset = _with_candidates({"latents": torch.arange(3 * 4).view(3, 4)})
    batch = collate_captions([dataset[2], dataset[0]])
    assert set(batch) == {"images", "tokens", "captions", "candidate_tokens", "candidate_captions", "latents"}
    assert batch["images"].tolist() == [[2, 0, 0], [0, 0, 0]]
    assert batch["tokens"].tolist() == [[1, ord("c")], [1, ord("a")]]
    assert batch["captions"] == ["c", "a"]
    assert batch["candidate_tokens"].tolist() == [[[2, ord("d")], [1, ord("e")]], [[1, ord("a")], [2, ord("b")]]]
    assert batch["candidate_captions"] == [["dd", "e"], ["a", "bb"]]
    assert batch["latents"].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("candidate_scores", torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])),
        ("candidate_labels", torch.tensor([1, 0, 1])),
    ],
)
def test_candidates_are_strings_only_where_they_are_to_be_scored(name: str, column: Tensor) -> None:
    dataset = _with_candidates({name: column})
    batch = collate_captions([dataset[0], dataset[2]])
    assert "candidate_captions" not in batch and "candidate_tokens" in batch
    assert torch.equal(batch[name], column[[0, 2]])


def test_images_without_candidates_are_left_out_of_the_candidates() -> None:
    scores = torch.tensor([[0.1, 0.2], [9.0, 9.0], [0.5, 0.6]])
    dataset = CaptionDataset(
        IMAGES, ["a", "b", "c"], _preprocess, _tokenizer,
        candidates=[["a", "bb"], None, ["dd", "e"]], extra={"candidate_scores": scores},
    )  # fmt: skip
    batch = collate_captions([dataset[1], dataset[2], dataset[0]])
    assert batch["candidate_rows"].tolist() == [1, 2]
    assert torch.equal(batch["candidate_scores"], scores[[2, 0]])
    assert len(batch["candidate_tokens"]) == 2 and len(batch["tokens"]) == 3
    alone = collate_captions([dataset[1]])
    assert alone["candidate_rows"].tolist() == [] and "candidate_tokens" not in alone


def test_loader_gives_every_pair_once_with_its_own_caption() -> None:
    count = 23
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(count)]
    captions = [f"{number}" for number in range(count)]
    dataset = CaptionDataset(images, captions, _preprocess, _tokenizer)
    loader = DataLoader(dataset, batch_size=5, shuffle=True, num_workers=0, collate_fn=collate_captions)
    seen = []
    for batch in loader:
        assert [str(red) for red in batch["images"][:, 0].tolist()] == batch["captions"]
        seen += batch["captions"]
    assert sorted(seen, key=int) == captions and seen != captions


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_tokenized_in_one_call_and_no_text_twice(workers: int) -> None:
    def tokenizer(captions: list[str]) -> Tensor:
        assert sorted(captions) == ["a", "b a", "c"]
        return _tokenizer(captions)

    dataset = CaptionDataset(
        IMAGES, ["a", "b a", "a"], _preprocess, tokenizer, candidates=[["a", "b a"], None, ["c", "a"]]
    )
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    (batch,) = DataLoader(dataset, batch_size=3, collate_fn=collate_captions, **options)
    assert torch.equal(batch["tokens"], _tokenizer(["a", "b a", "a"]))
    assert torch.equal(batch["candidate_tokens"], _tokenizer(["a", "b a", "c", "a"]).view(2, 2, 2))
    assert batch["candidate_rows"].tolist() == [0, 2]


@pytest.mark.parametrize(("remembered", "calls"), [(4, [["a", "b"], ["c"]]), (2, [["a", "b"], ["c"], ["a"], ["b"]])])
def test_texts_that_were_read_lately_are_not_tokenized_again(
    monkeypatch: pytest.MonkeyPatch, remembered: int, calls: list[list[str]]
) -> None:
    seen = []

    def tokenizer(captions: list[str]) -> Tensor:
        seen.append(captions)
        return _tokenizer(captions)

    monkeypatch.setattr("fastsds.data.captions._REMEMBERED", remembered)
    dataset = CaptionDataset(IMAGES, ["a", "b", "c"], _preprocess, tokenizer)
    for rows in ([0, 1], [2, 2], [0, 2], [1, 0]):
        read = [row["tokens"] for row in dataset.__getitems__(rows)]
        assert torch.equal(torch.stack(read), _tokenizer([dataset.captions[row] for row in rows]))
    assert seen == calls


def test_a_batch_is_what_the_distiller_takes(clip: Any, clip_tokenizer: Any) -> None:
    from fastsds.sdsclip import SDSDistiller

    def preprocess(image: Image.Image) -> Tensor:
        return (
            torch.tensor(list(image.resize((32, 32)).tobytes()), dtype=torch.float32).view(32, 32, 3).permute(2, 0, 1)
        )

    dataset = CaptionDataset(
        IMAGES, ["a red circle", "a blue square", "a circle"], preprocess, clip_tokenizer,
        candidates=[["a circle", "a square"]] * 3, extra={"candidate_labels": torch.tensor([0, 1, 0])},
    )  # fmt: skip
    (batch,) = DataLoader(dataset, batch_size=3, collate_fn=collate_captions)
    out = SDSDistiller(clip, None, sds_weight=0, ranking_weight=1.0)(**batch)
    assert out.loss.isfinite() and out.ranking > 0


def test_swapped_captions_are_candidates_where_there_are_any() -> None:
    captions = ["a dog on a mat", "a dog", "a red cup left of a blue plate."]
    dataset = CaptionDataset(IMAGES, captions, _preprocess, _tokenizer).with_swapped_candidates()
    batch = collate_captions([dataset[row] for row in (2, 1, 0)])
    assert batch["candidate_rows"].tolist() == [0, 2]
    assert batch["candidate_captions"] == [
        ["a red cup left of a blue plate.", "a blue plate left of a red cup."],
        ["a dog on a mat", "a mat on a dog"],
    ]
    assert torch.equal(batch["candidate_tokens"][1], _tokenizer(["a dog on a mat", "a mat on a dog"]))
    assert batch["captions"] == captions[::-1]
    only = CaptionDataset(IMAGES, captions, _preprocess, _tokenizer).with_swapped_candidates(["left of"])
    assert [only[row]["candidates"] is None for row in range(3)] == [True, True, False]


def test_swapped_candidates_follow_the_epochs_captions() -> None:
    captions = EpochCaptions([["a on b", "c in d", "e at f"]] * 3)
    dataset = CaptionDataset(IMAGES, captions, _preprocess, _tokenizer).with_swapped_candidates()
    swapped = {"a on b": "b on a", "c in d": "d in c", "e at f": "f at e"}
    seen = set()
    for epoch in range(8):
        dataset.set_epoch(epoch)
        for row in map(dataset.__getitem__, range(3)):
            assert row["candidates"]["candidate_captions"] == [row["captions"], swapped[row["captions"]]]
            seen.add(row["captions"])
    assert seen == swapped.keys()


def test_a_rows_key_is_that_of_the_image_it_holds(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, image in zip(paths, IMAGES, strict=True):
        image.save(path)
    dataset = _dataset(paths, bad_images=BadImages(paths, 0.5))
    keys = [dataset.content_key(row) for row in range(3)]
    assert len(set(keys)) == 3
    paths[1].unlink()
    held = int(dataset[1]["images"][0])  # a picture's red is its number
    assert held != 1 and dataset.content_key(1) == keys[held]
    with pytest.raises(DataError, match=r"image: .*1\.png does not exist"):
        _dataset(paths).content_key(1)
