"""Images that cannot be read: skipped, counted, listed, and too many of them refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastsds.data.files import DataError, first_names
from fastsds.data.images import ImageSource, image_name


class BadImages:
    """The rows of a data set whose image could not be read, known to all workers of its loader.

    Another row takes the place of each, the same one in every process, epoch and run, so that batches keep their size.
    Several training processes count each for itself, against all rows.

    Args:
        images: of the data set, one per row.
        max_share: of the rows, that may be bad; above 0, one row always may. 0 stops at the first.
        listing: file that receives a line `{"row", "image", "reason"}` for each. Rows that it lists already, of a run
            that is resumed, are not tried again.
    """

    def __init__(
        self, images: Sequence[ImageSource], max_share: float = 0.01, listing: str | Path | None = None
    ) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share: expected a share in [0, 1], got {max_share!r}")
        self.max_share = max_share
        self.listing = None if listing is None else Path(listing)
        self.allowed = min(max(int(max_share * len(images)), 1 if max_share else 0), len(images) - 1)
        self._images = images
        self._bad = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        for row, name in _read_listing(self.listing):
            if row < len(images) and image_name(images[row]) == name:
                self._bad[row] = True

    @property
    def count(self) -> int:
        return int(self._bad.sum())

    def rows(self, row: int) -> Iterator[int]:
        """The row and those that may take its place, in turn and without end, but for those that are known as bad."""
        if not self._bad[row]:
            yield row
        draw = random.Random(row)
        while True:
            other = draw.randrange(len(self._images))
            if not self._bad[other]:
                yield other

    def add(self, row: int, error: DataError) -> None:
        """Takes note of a row.

        Raises:
            DataError: these are more than may be.
        """
        self._bad[row] = True
        name = image_name(self._images[row])
        if self.listing is not None:
            self.listing.parent.mkdir(parents=True, exist_ok=True)
            # One write to its end, whoever else writes; a name that is not UTF-8 is escaped as JSON escapes.
            with self.listing.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps({"row": row, "image": name, "reason": str(error)}, ensure_ascii=False) + "\n")
        if self.count > self.allowed:
            names = [image_name(self._images[bad]) for bad in self._bad.nonzero()[:4, 0].tolist()]
            raise DataError(
                f"images: {self.count} of {len(self._images)} cannot be read and max_bad_share={self.max_share} allows "
                f"{self.allowed}: {first_names(names)}; the last because: {error}"
            ) from error

    def summary(self) -> str:
        """A line for the end of a run; empty where every image could be read."""
        if not self.count:
            return ""
        where = "" if self.listing is None else f"; {self.listing} lists them"
        return f"{self.count} of {len(self._images)} images could not be read and were skipped{where}"


def _read_listing(path: Path | None) -> Iterator[tuple[int, str]]:
    if path is None or not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
            yield int(record["row"]), str(record["image"])
        except (ValueError, KeyError, TypeError):  # the line that a killed run left unfinished
            continue
