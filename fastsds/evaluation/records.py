"""What the readers of benchmark files share: files whose faults are named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsds.data.files import DataError, first_names, read_json


def read_rows(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The rows of a JSON list of objects, or of a `.jsonl` file; see `check_row`.

    Raises:
        DataError: a file that cannot be read or is not JSON, no list, an empty one, or a row without one of the fields.
    """
    rows = _parse_lines(path) if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(rows, list) or not rows:
        found = "an empty list" if isinstance(rows, list) else type(rows).__name__
        raise DataError(f"path: expected a list of rows in {path}, got {found}")
    for number, row in enumerate(rows, start=1):
        check_row(row, fields, f"row {number} of {path}")
    return rows


def check_row(row: Any, fields: Mapping[str, type], where: str) -> None:
    """Checks that `row` is an object that has every one of the fields, of its type.

    Raises:
        DataError: it names the place, the field and what is there.
    """
    if not isinstance(row, dict):
        raise DataError(f"path: expected an object with {', '.join(fields)} in {where}, got {type(row).__name__}")
    for name, kind in fields.items():
        if name not in row:
            raise DataError(f"path: {where} has no field {name!r}; it has {', '.join(map(str, row)) or 'none'}")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise DataError(f"path: expected {name!r} of {where} to be {kind.__name__}, got {row[name]!r}")


def check_images(paths: Sequence[Path], where: Path) -> None:
    """Checks that the images that a file names are there.

    Raises:
        DataError: some are absent; the message counts them and names the first.
    """
    distinct = list(dict.fromkeys(paths))
    absent = [str(path) for path in distinct if not path.is_file()]
    if absent:
        raise DataError(
            f"images: {len(absent)} of the {len(distinct)} images of {where} are absent, first {first_names(absent)}; "
            f"check the folder of the images"
        )


def read_lines(path: Path) -> list[str]:
    """The lines that are not blank, without white space at their ends.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"path: could not read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"path: {path} is not UTF-8: {error}") from error
    # `splitlines` would also cut at characters that a caption may hold, such as U+2028.
    return [line.strip() for line in text.split("\n") if line.strip()]


def _parse_lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in read_lines(path)]
    except json.JSONDecodeError as error:
        raise DataError(f"path: {path} is not JSON line by line: {error}") from error
