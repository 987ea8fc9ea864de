"""Folders of images with their captions beside them."""

from __future__ import annotations

import json
from pathlib import Path

from fastsds.data.files import DataError
from fastsds.data.images import Pairs, image_files
from fastsds.data.tables import read_csv


def read_folder(root: Path, image_column: str = "file_name", caption_column: str = "text") -> Pairs:
    """Reads `metadata.jsonl` or `metadata.csv`, as Hugging Face has them, or `name.txt` beside `name.jpg`.

    Images are looked for in subfolders as well, and come in the order of their paths; hidden ones and those without
    a text are left out.

    Raises:
        DataError: a folder or metadata that cannot be read, an unknown column, or no pairs.
    """
    if not root.is_dir():
        raise DataError(f"path: expected a folder at {root}, got {'a file' if root.exists() else 'nothing'}")
    if (root / "metadata.jsonl").is_file():
        return _read_lines(root / "metadata.jsonl", image_column, caption_column)
    if (root / "metadata.csv").is_file():
        return read_csv(root / "metadata.csv", image_column, caption_column, ",")
    images = [path for path in image_files(root) if path.with_suffix(".txt").is_file()]
    if not images:
        raise DataError(f"path: expected images with a .txt of the same name in {root}, got none")
    return Pairs(images, [(_read_text(path.with_suffix(".txt")),) for path in images])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise DataError(f"path: could not read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"path: {path} is not a UTF-8 text: {error}") from error


def _read_lines(path: Path, image_column: str, caption_column: str) -> Pairs:
    images, captions = [], []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):  # splitlines splits within texts as well
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"path: line {number} of {path} is not JSON: {error}") from error
        for name, column in (("image_column", image_column), ("caption_column", caption_column)):
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise DataError(f"{name}: expected a text {column!r} in line {number} of {path}, got {line:.200}")
        images.append(path.parent / row[image_column])
        captions.append((row[caption_column],))
    if not images:
        raise DataError(f"path: expected lines in {path}, got none")
    return Pairs(images, captions)
