"""Where image-caption data comes from, in one typed description."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastsds.data.bad_images import BadImages
from fastsds.data.captions import CaptionDataset, EpochCaptions, Preprocess, Tokenizer
from fastsds.data.coco import read_coco
from fastsds.data.files import DataError
from fastsds.data.folders import read_folder
from fastsds.data.huggingface import read_huggingface
from fastsds.data.images import ImageSource, Pairs
from fastsds.data.tables import read_csv
from fastsds.data.webdataset import read_webdataset

CaptionFormat = Literal["auto", "csv", "coco", "webdataset", "huggingface", "folder"]


@dataclass(frozen=True)
class CaptionSource:
    """Image-caption data in one of the field's formats."""

    path: Path | str
    """A CSV file, COCO's annotations, shards (`shards/{000..009}.tar`), a folder, parquet files or a hub id."""
    format: CaptionFormat = "auto"
    """`auto` goes by the path; data of the hub has to be called `huggingface`."""
    images: Path | None = None
    """Folder that image paths start from (csv, coco, huggingface); by default that of the file, or COCO's own beside
    it, or of huggingface the working directory."""
    image_column: str | None = None
    """`filepath` in csv, `image` in huggingface, `file_name` in a folder's metadata unless named here."""
    caption_column: str | None = None
    """`title` in csv, `caption` in webdataset's json, `text` in a folder's metadata, huggingface's first of `caption`,
    `text`, `captions` and `sentences` unless named here."""
    separator: str | None = None
    """Of a CSV file's columns, a character or `\\t`; by default a tab where the header has one, else a comma."""
    split: str = "train"
    """Of a Hugging Face data set."""
    captions_per_image: Literal["one", "all"] = "one"
    """Of images with several (coco, huggingface, webdataset's json): `one`, drawn anew every epoch, so that an epoch is
    a pass over the images (COCO's 118k) and no batch holds an image twice; `all` makes a row of each, as open_clip's
    CSV of COCO does."""
    max_bad_share: float = 0.01
    """Share of the rows whose image may be unreadable before the run stops; above 0, one row always may be."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share: expected a share in [0, 1], got {self.max_bad_share!r}")

    def load(
        self,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        bad_images: str | Path | None = None,
        progress: bool = True,
    ) -> CaptionDataset:
        """Reads the captions and finds the images; these are opened when their rows are asked for.

        Args:
            seed: of the captions that are drawn.
            bad_images: file that lists the images that cannot be read (`bad_images.jsonl` in the run's folder).
            progress: whether indexing many shards shows a bar.

        Raises:
            DataError: what cannot be read or is not of the format, by name.
        """
        images, captions = self.read(progress=progress)
        if self.captions_per_image == "all" and any(len(texts) != 1 for texts in captions):
            images = _Picked(images, [row for row, texts in enumerate(captions) for _ in texts])
            captions = [[text] for texts in captions for text in texts]
        single = all(len(texts) == 1 for texts in captions)
        return CaptionDataset(
            images,
            [text for (text,) in captions] if single else EpochCaptions(captions, seed),
            preprocess,
            tokenizer,
            bad_images=BadImages(images, self.max_bad_share, bad_images),
        )

    def read(self, *, progress: bool = True) -> Pairs:
        """The images and all captions of each; captions that are blank, and images without any other, are left out.

        Raises:
            DataError: what cannot be read or is not of the format, by name.
        """
        images, captions = self._read(progress)
        captions = [[text for text in texts if text.strip()] for texts in captions]
        rows = [row for row, texts in enumerate(captions) if texts]
        if not rows:
            raise DataError(f"path: expected images with captions in {self.path}, got none")
        if len(rows) == len(captions):
            return Pairs(images, captions)
        return Pairs(_Picked(images, rows), [captions[row] for row in rows])

    def _read(self, progress: bool) -> Pairs:
        kind = detect_format(self.path) if self.format == "auto" else self.format
        path, text = Path(self.path).expanduser(), os.path.expanduser(self.path)  # a pattern may begin with ~ as well
        root = None if self.images is None else self.images.expanduser()
        named = {"image_column": self.image_column, "caption_column": self.caption_column}
        columns: dict[str, Any] = {name: column for name, column in named.items() if column is not None}
        if kind == "csv":
            return read_csv(path, separator=self.separator, root=root, **columns)
        if kind == "coco":
            return read_coco(path, root)
        if kind == "webdataset":
            return read_webdataset(text, self.caption_column or "caption", progress=progress)
        if kind == "huggingface":
            return read_huggingface(text, split=self.split, root=root, **columns)
        return read_folder(path, **columns)


def detect_format(path: Path | str) -> CaptionFormat:
    """The format that a path speaks of.

    Raises:
        DataError: it does not exist, or is of a kind that none of the formats has.
    """
    text, place = str(path), Path(path).expanduser()
    if text.endswith((".tar", ".tar.gz", ".tgz")):
        return "webdataset"
    if text.endswith(".parquet"):
        return "huggingface"
    if not place.exists():
        raise DataError(f"path: {path} does not exist; a data set of the hub needs format huggingface")
    if place.is_dir():
        if _has(place, "dataset_dict.json", "state.json", "*.parquet", "*/*.parquet"):
            return "huggingface"
        return "webdataset" if _has(place, "*.tar") else "folder"
    formats: dict[str, CaptionFormat] = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".json": "coco"}
    if place.suffix.lower() not in formats:
        raise DataError(
            f"path: the format of {path} cannot be told from its name; name it by format: csv, coco, webdataset, "
            f"huggingface or folder"
        )
    return formats[place.suffix.lower()]


class _Picked(Sequence[ImageSource]):
    """Rows of a sequence, by their numbers."""

    def __init__(self, images: Sequence[ImageSource], rows: Sequence[int]) -> None:
        self._images = images
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._images[self._rows[index]]


def _has(folder: Path, *patterns: str) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)
