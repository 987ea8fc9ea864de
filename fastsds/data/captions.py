"""Image-caption data: from files to the batches that a distiller takes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

Preprocess = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]


class DataError(ValueError):
    """A data file or image that cannot be used; the message names it and says what to do."""


class CaptionDataset(Dataset[dict[str, Any]]):
    """Pairs of an image and its caption, with candidate captions where ranking wants them.

    Args:
        images: paths of image files, or PIL images.
        captions: one per image.
        preprocess: the CLIP model's own.
        tokenizer: the CLIP model's own.
        candidates: for each image equally many candidate captions, or None where an image has none.
        extra: what belongs to the candidates, by `SDSDistiller.forward`'s names, a tensor row per image:
            `candidate_scores`, `candidate_labels`, `latents`. Rows of images without candidates are not read.

    Raises:
        DataError: no images, or columns of unequal length.
    """

    def __init__(
        self,
        images: Sequence[str | Path | Image.Image],
        captions: Sequence[str],
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        *,
        candidates: Sequence[Sequence[str] | None] | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.images = images
        self.captions = captions
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.candidates = candidates
        self.extra = dict(extra or {})
        columns = {"captions": captions, "candidates": candidates, **self.extra}
        if len(images) == 0:
            raise DataError("images: expected at least one, got none")
        for name, column in columns.items():
            if column is not None and len(column) != len(images):
                raise DataError(f"{name}: expected one for each of {len(images)} images, got {len(column)}")

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        *,
        image_column: str = "filepath",
        caption_column: str = "title",
        separator: str = "\t",
        root: str | Path | None = None,
    ) -> CaptionDataset:
        """Reads open_clip's CSV format: a header, then an image path and a caption per line.

        Args:
            root: folder that relative image paths start from; that of the file by default.

        Raises:
            DataError: a file that is missing or not UTF-8, an unknown column (the message lists those there are), no
                rows, or a row with too few columns.
        """
        path = Path(path)
        folder = path.parent if root is None else Path(root)
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, delimiter=separator)
                rows = list(reader)
                columns = reader.fieldnames or []
        except OSError as error:
            raise DataError(f"path: could not read {path}: {error.strerror}") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"path: {path} is not a UTF-8 text file of columns: {error}") from error
        for name, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column not in columns:
                raise DataError(
                    f"{name}: {path} has no column {column!r}; it has {columns} when split at {separator!r}"
                )
        if not rows:
            raise DataError(f"path: expected rows below the header of {path}, got none")
        for number, row in enumerate(rows, start=1):
            if row[image_column] is None or row[caption_column] is None:
                raise DataError(f"path: row {number} below the header of {path} has fewer columns than {columns}")
        return cls(
            [folder / row[image_column] for row in rows], [row[caption_column] for row in rows], preprocess, tokenizer
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "images": self.preprocess(open_image(self.images[index])),
            "tokens": self.tokenizer([self.captions[index]])[0],
            "captions": self.captions[index],
        }
        if self.candidates is None:
            return row | {name: column[index] for name, column in self.extra.items()}
        candidates = self.candidates[index]
        row["candidates"] = None
        if candidates is not None:
            row["candidates"] = {
                "candidate_tokens": self.tokenizer(list(candidates)),
                "candidate_captions": list(candidates),
                **{name: column[index] for name, column in self.extra.items()},
            }
        return row


def collate_captions(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks tensors and lists strings: the batch that `SDSDistiller.forward` takes.

    Candidates are given as strings only where their scores or labels are not there already, and `candidate_rows` says
    which images have candidates where some have none.
    """
    batch = _stack([{name: value for name, value in row.items() if name != "candidates"} for row in rows])
    if "candidates" not in rows[0]:
        return batch
    ranked = [index for index, row in enumerate(rows) if row["candidates"] is not None]
    if len(ranked) < len(rows):
        batch["candidate_rows"] = torch.tensor(ranked, dtype=torch.int64)
    if ranked:
        batch |= _stack([rows[index]["candidates"] for index in ranked])
    if "candidate_scores" in batch or "candidate_labels" in batch:
        batch.pop("candidate_captions", None)
    return batch


def _stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: torch.stack(values) if isinstance(values[0], Tensor) else values for name, values in columns.items()}


def open_image(image: str | Path | Image.Image) -> Image.Image:
    """The image in RGB.

    Raises:
        DataError: it does not exist or cannot be decoded.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"image: {image} does not exist; check the data file's paths and its root") from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise DataError(f"image: {image} cannot be read ({error}); replace it or take its row out") from error
