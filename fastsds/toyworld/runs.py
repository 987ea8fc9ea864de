"""What the demos have in common: where a report goes, how their runs share the machine, how figures are written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from fastsds.data.files import require_writable


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """
    Raises:
        FileExistsError: `out` exists and `overwrite` is not set, or holds something other than a report.
        PermissionError: `out` cannot be written.
    """
    require_writable(out)
    if not out.exists():
        return
    is_report = (out / "report.json").is_file()
    if not (overwrite and is_report):
        hint = "pass --overwrite or name another folder" if is_report else "name another folder"
        raise FileExistsError(f"out: {out} exists; {hint}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Small models run fastest side by side on one thread each; worker processes inherit the variable."""
    variable, threads = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if variable is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = variable


def percent(figure: Mapping[str, float]) -> str:
    """A mean with its interval, in percent."""
    return f"{100 * figure['mean']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"
