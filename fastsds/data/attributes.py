"""Attribute labels: one word or two per training image, read from JSON lines or asked of BLIP-2."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from fastsds.data.fewshot import FewShotSplit, LabelledImage
from fastsds.data.files import DataError
from fastsds.data.images import open_image

QUESTION = "Question: which one adjective describes the {classname} in this picture? Answer:"

_NOT_UTF8 = "backslashreplace"  # escapes the names of such files as JSON does

Labeller = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[str]]
"""Answers a batch: images and their class names to attributes, empty where there is no answer."""


@dataclass(frozen=True)
class AttributesConfig:
    """Label the training images with attributes, as IntCoOp trains on; a stopped run goes on where it stopped.

    examples:
      fastsds attributes --images caltech-101 --split split_zhou_Caltech101.json --out attributes.jsonl
      fastsds attributes --images folders --model path/to/blip2
    """

    images: Path
    """Folder that the split file's paths start from; without a split file, `train/<classname>/` below it is read."""
    split: Path | None = None
    """`split_zhou_<Dataset>.json`."""
    out: Path = Path("attributes.jsonl")
    """Receives a line `{"path", "attribute"}` per image."""
    model: str = "Salesforce/blip2-opt-2.7b"
    """Folder or hub id of a BLIP-2 with safetensors weights."""
    question: str = QUESTION
    """`{classname}` stands for the image's class (*reading*: the paper's question is not known)."""
    batch_size: int = 16
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")


class Blip2Labeller:
    """BLIP-2 as a visual question answerer (*stated*), decoded greedily.

    Args:
        model: a transformers `Blip2ForConditionalGeneration`.
        processor: its `Blip2Processor`.
        question: with `{classname}` where the class is to be named.
        max_new_tokens: of an answer, whose first line is taken.
    """

    def __init__(self, model: Any, processor: Any, question: str = QUESTION, max_new_tokens: int = 8) -> None:
        self.model = model.eval()
        self.processor = processor
        self.question = question
        self.max_new_tokens = max_new_tokens
        self.processor.tokenizer.padding_side = "left"  # answers continue the questions
        if self.processor.num_query_tokens is None:  # as older checkpoints have it
            self.processor.num_query_tokens = model.config.num_query_tokens

    @classmethod
    def from_pretrained(cls, name: str | Path, question: str = QUESTION, device: str = "cpu") -> Blip2Labeller:
        """Loads a folder or hub id: safetensors only; bfloat16 on a GPU, float32 elsewhere.

        Raises:
            FileNotFoundError: what is neither a folder nor a hub id.
            OSError: it cannot be loaded; the message names it.
        """
        if not Path(name).is_dir() and str(name).count("/") != 1:
            raise FileNotFoundError(f"model: {name} is no folder, and no hub id (org/model)")
        from transformers import Blip2ForConditionalGeneration, Blip2Processor

        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        try:
            model = Blip2ForConditionalGeneration.from_pretrained(name, dtype=dtype, use_safetensors=True)
            processor = Blip2Processor.from_pretrained(name)
        except OSError as error:
            raise OSError(f"model: {name} could not be loaded: {' '.join(str(error).split())}") from error
        return cls(model.to(device), processor, question)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], classnames: Sequence[str]) -> list[str]:
        questions = [self.question.replace("{classname}", name) for name in classnames]
        inputs = self.processor(images=list(images), text=questions, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        if not self.model.config.text_config.is_encoder_decoder:
            output = output[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [_clean(answer) for answer in answers]


def label_attributes(
    items: Sequence[LabelledImage], labeller: Labeller, out: str | Path, batch_size: int = 16, *, progress: bool = True
) -> int:
    """Appends the attributes of `items` to `out`, batch by batch; images that are there already are not asked again.

    Returns:
        How many images got no answer; they are not written.

    Raises:
        DataError: an image that cannot be read, or a file in `out` that is not of the format.
    """
    out = Path(out)
    done = _read_lines(out, forgive_last=True) if out.exists() else {}
    _write_whole(out, done)  # without the line that a killed run left unfinished
    waiting = [item for item in items if item.key not in done]
    unanswered = 0
    with (
        out.open("a", encoding="utf-8", errors=_NOT_UTF8) as file,
        tqdm(total=len(items), initial=len(items) - len(waiting), unit="image", disable=not progress) as bar,
    ):
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            answers = labeller([open_image(item.image) for item in batch], [item.classname for item in batch])
            for item, answer in zip(batch, answers, strict=True):
                if answer:
                    file.write(_line(item.key, answer))
                else:
                    unanswered += 1
            file.flush()
            bar.update(len(batch))
    return unanswered


def run_attributes(config: AttributesConfig) -> None:
    """Labels the training images of a data set with BLIP-2."""
    split = (
        FewShotSplit.from_folders(config.images)
        if config.split is None
        else FewShotSplit.from_json(config.split, config.images)
    )
    labeller = Blip2Labeller.from_pretrained(config.model, config.question, config.device)
    unanswered = label_attributes(split.train, labeller, config.out, config.batch_size)
    print(f"{len(split.train) - unanswered} of {len(split.train)} training images have an attribute in {config.out}")


def read_attributes(path: str | Path) -> dict[str, str]:
    """Attributes by image path, from lines `{"path": …, "attribute": …}`; a path that comes twice keeps its last.

    Raises:
        DataError: a file that cannot be read, or a line that is not of the format.
    """
    return _read_lines(Path(path))


def _read_lines(path: Path, *, forgive_last: bool = False) -> dict[str, str]:
    try:
        whole, _, last = path.read_bytes().rpartition(b"\n")
        lines = whole.decode("utf-8-sig").split("\n")
        lines.append(last.decode("utf-8-sig", "replace" if forgive_last else "strict"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"path: could not read {path}: {error}") from error
    attributes: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        fields = [row.get(name) if isinstance(row, dict) else None for name in ("path", "attribute")]
        if not all(isinstance(field, str) and field.strip() for field in fields):
            if forgive_last and number == len(lines):
                break
            raise DataError(
                f'path: expected {{"path": …, "attribute": …}} with two texts in line {number} of {path}, got {line!r}'
            )
        attributes[str(fields[0])] = str(fields[1]).strip()
    return attributes


def _write_whole(path: Path, attributes: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    lines = "".join(_line(key, attribute) for key, attribute in attributes.items())
    staging.write_text(lines, encoding="utf-8", errors=_NOT_UTF8)
    staging.replace(path)


def _line(key: str, attribute: str) -> str:
    return json.dumps({"path": key, "attribute": attribute}, ensure_ascii=False) + "\n"


def _clean(answer: str) -> str:
    """The first line in lower case, without the punctuation around it."""
    lines = answer.strip().splitlines()
    return lines[0].strip(" \t.,;:!?\"'").lower() if lines else ""
