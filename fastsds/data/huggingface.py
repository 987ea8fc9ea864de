"""Hugging Face data sets with a column of images and one of captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsds.data.files import DataError
from fastsds.data.images import Pairs

CAPTION_COLUMNS = ("caption", "text", "captions", "sentences")
"""Tried in turn where none is named."""
_ENCODED = ("PIL.Image.Image", "binary", "large_binary", "string", "large_string")


@dataclass(frozen=True)
class TableImage:
    """An encoded image in a row, or the path of its file."""

    images: Any
    """The `datasets.Dataset` with its images not decoded."""
    column: str
    row: int
    root: Path
    """That relative paths start from."""

    @property
    def name(self) -> str:
        path = self._content()[1]
        return f"{self.column} of row {self.row}" + (f" ({path})" if path else "")

    def read(self) -> bytes:
        content, path = self._content()
        if content is not None:
            return content
        if path is None:
            raise OSError("the row is empty")
        return (self.root / path).read_bytes()

    def _content(self) -> tuple[bytes | None, str | None]:
        value = self.images[self.row][self.column]
        if isinstance(value, dict):
            return value.get("bytes"), value.get("path")
        return (value, None) if isinstance(value, bytes) else (None, value)


class TableImages(Sequence[TableImage]):
    """A column of images, read row by row."""

    def __init__(self, images: Any, column: str, root: Path | None = None) -> None:
        self._images = images
        self._column = column
        self._root = Path() if root is None else root

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        return TableImage(self._images, self._column, range(len(self))[index], self._root)


def read_huggingface(
    path: str,
    image_column: str = "image",
    caption_column: str | None = None,
    split: str = "train",
    root: Path | None = None,
) -> Pairs:
    """Reads a folder of `save_to_disk`, parquet files, an image folder, or a data set of the hub.

    Args:
        path: a folder, a parquet file or a wildcard of them, or a hub id.
        caption_column: of texts, or of lists of texts; by default the first of `caption`, `text`, `captions`,
            `sentences` that there is.
        split: of the data set.
        root: folder that relative image paths in the data set start from; the working directory by default.

    Raises:
        DataError: `datasets` is not installed, data that cannot be loaded, an unknown split or column (the message
            lists those there are), or a column of another kind.
    """
    table = load_table(path, split)
    columns = table.column_names
    if caption_column is None:
        caption_column = next((name for name in CAPTION_COLUMNS if name in columns), CAPTION_COLUMNS[0])
    for name, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in columns:
            raise DataError(f"{name}: {path} has no column {column!r}; it has {columns}")
    texts = table.select_columns(caption_column)[:][caption_column]  # all at once: row by row it takes minutes
    captions = [_captions(value, caption_column, path) for value in texts]
    images = encoded_images(table, image_column)
    kind = images.features[image_column]
    if "bytes" not in kind if isinstance(kind, dict) else getattr(kind, "dtype", None) not in _ENCODED:
        raise DataError(f"image_column: expected images in {image_column!r} of {path}, got {kind}")
    return Pairs(TableImages(images, image_column, root), captions)


def load_table(path: str, split: str) -> Any:
    """The `datasets.Dataset` of a split.

    Raises:
        DataError: `datasets` is not installed, data that cannot be loaded, or an unknown split.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("format: huggingface needs `datasets`: pip install 'fastsds[huggingface]'") from error
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            table = datasets.load_from_disk(path)
        elif folder.suffix == ".parquet":
            table = datasets.load_dataset("parquet", data_files=path)
        else:
            table = datasets.load_dataset(path)
    except Exception as error:  # datasets raises errors of Arrow, of the hub and of its own
        reason = " ".join(str(error).split())
        raise DataError(
            f"path: {path} is absent, empty or damaged, as a Hugging Face data set it could not be loaded: {reason}"
        ) from error
    if not hasattr(table, "column_names") or isinstance(table.column_names, dict):
        if split not in table:
            raise DataError(f"split: {path} has no split {split!r}; it has {list(table)}")
        return table[split]
    return table


def encoded_images(table: Any, column: str) -> Any:
    """The column alone, its images not decoded, for `TableImages`."""
    images = table.select_columns(column)
    if type(images.features[column]).__name__ != "Image":
        return images
    from datasets import Image

    return images.cast_column(column, Image(decode=False))


def _captions(value: Any, column: str, path: str) -> list[str]:
    """Empty where the row has none."""
    captions = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in captions):
        raise DataError(f"caption_column: expected texts in {column!r} of {path}, got {value!r:.200}")
    return captions
