"""open_clip's CSV format: a header, then an image path and a caption per line."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from fastsds.data.files import DataError
from fastsds.data.images import Pairs


def read_csv(
    path: Path,
    image_column: str = "filepath",
    caption_column: str = "title",
    separator: str | None = None,
    root: Path | None = None,
) -> Pairs:
    r"""Reads image paths and captions.

    Args:
        separator: of the columns, a character or `\t`; None takes a tab where the header has one, else a comma.
        root: folder that relative image paths start from; that of the file by default.

    Raises:
        DataError: a file that is missing or not UTF-8, another separator, an unknown column (the message lists those
            there are), no rows, a row with too few columns or too many, or a quote that is not closed.
    """
    if separator == r"\t":  # as a shell leaves it
        separator = "\t"
    if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
        raise DataError(f"separator: expected one character, neither a quote nor a line's end, got {separator!r}")
    folder = path.parent if root is None else root
    images: list[str] = []
    captions: list[tuple[str]] = []
    reader = None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if separator is None:
                separator = "\t" if "\t" in file.readline() else ","
                file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            columns = next(reader, [])
            for name, column in (("image_column", image_column), ("caption_column", caption_column)):
                if column not in columns:
                    raise DataError(
                        f"{name}: {path} has no column {column!r}; it has {columns} when split at {separator!r}"
                    )
            image_at, caption_at = columns.index(image_column), columns.index(caption_column)
            for number, row in enumerate(filter(None, reader), start=1):
                if len(row) <= max(image_at, caption_at):
                    raise DataError(f"path: row {number} below the header of {path} has fewer columns than {columns}")
                if len(row) > len(columns):
                    raise DataError(
                        f"path: row {number} below the header of {path} has more columns than {columns}; a text with "
                        f"{separator!r} in it needs quotes around it"
                    )
                images.append(os.path.join(folder, row[image_at]))
                captions.append((row[caption_at],))
    except OSError as error:
        raise DataError(f"path: could not read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"path: {path} is not a UTF-8 text file: {error}") from error
    except csv.Error as error:
        line = 1 if reader is None else reader.line_num
        raise DataError(
            f"path: line {line} of {path} is wrongly quoted ({error}); a text that begins with a quote needs quotes "
            f"around it and each of its own doubled"
        ) from error
    if not images:
        raise DataError(f"path: expected rows below the header of {path}, got none")
    return Pairs(images, captions)
