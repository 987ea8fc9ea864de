"""What readers and writers of files share: an error, JSON, whether a place serves, how a message names culprits."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NAMED = 3  # culprits that a message names


class DataError(ValueError):
    """A data file or image that cannot be used; the message names it and says what to do."""

    def __init__(self, message: str) -> None:
        # A loader's worker hands its traceback over as the message; what was raised stands at its end.
        super().__init__(message.rpartition(f"{__name__}.DataError: ")[2].rstrip())


def read_json(path: Path) -> Any:
    """The document in a file.

    Raises:
        DataError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"path: could not read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"path: {path} is not JSON: {error}") from error


def require_writable(out: Path) -> None:
    """Before hours of work, whether what comes of it can be written beside and below `out`, which need not exist.

    Raises:
        PermissionError: it cannot.
    """
    place = next(path for path in out.absolute().parents if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise PermissionError(f"out: {out} cannot be written, {place} is read-only or no folder; name another place")


def first_names(names: Sequence[Any]) -> str:
    """The first few, for a message."""
    return ", ".join(map(str, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")
