"""What a benchmark asks: which caption belongs to an image, and which image to a caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, overload

from PIL import Image

from fastsds.data.files import DataError, first_names
from fastsds.data.images import ImageSource, image_name, open_image

Box: TypeAlias = tuple[int, int, int, int]
"""Left, upper, right, lower, in pixels."""


@dataclass(frozen=True)
class CaptionChoice:
    """An image and captions of which one is right.

    Raises:
        DataError: fewer than two captions, `right` not one of them, or a box without an area.
    """

    key: str
    """Names the sample within its benchmark, so that two models can be compared sample by sample."""
    image: ImageSource
    captions: tuple[str, ...]
    right: int
    """Position of the right caption."""
    group: str = ""
    """What macro figures are averaged over: a relation, a pair of attributes, a split."""
    box: Box | None = None
    """What to cut out of the image."""

    def __post_init__(self) -> None:
        if len(self.captions) < 2 or not 0 <= self.right < len(self.captions):
            raise DataError(
                f"captions: expected for {self.key!r} at least two and `right` below their number, "
                f"got {len(self.captions)} and right={self.right}"
            )
        if self.box is not None and (self.box[2] <= self.box[0] or self.box[3] <= self.box[1]):
            raise DataError(
                f"box: expected for {self.key!r} left < right and upper < lower, in pixels, got {list(self.box)}"
            )

    def load(self) -> Image.Image:
        """The image in RGB, cut to its box; what the box has beyond the image is black, as in ARO.

        Raises:
            DataError: it does not exist or cannot be decoded, or the box lies beyond it altogether.
        """
        return _open(self.image, self.box)


@dataclass(frozen=True)
class TwoByTwo:
    """Two images and two captions; caption i belongs to image i (Winoground)."""

    key: str
    """Names the sample within its benchmark, so that two models can be compared sample by sample."""
    images: tuple[ImageSource, ImageSource]
    captions: tuple[str, str]
    group: str = ""
    """What macro figures are averaged over, such as Winoground's tag."""

    def load(self) -> tuple[Image.Image, Image.Image]:
        """Both images in RGB.

        Raises:
            DataError: one does not exist or cannot be decoded.
        """
        first, second = self.images
        return _open(first), _open(second)


def groups_of(examples: Sequence[CaptionChoice] | Sequence[TwoByTwo]) -> tuple[str, ...] | None:
    """The examples' groups, or None where no example names one."""
    groups = tuple(example.group for example in examples)
    return groups if any(groups) else None


def units_of(examples: Sequence[CaptionChoice]) -> tuple[str, ...] | None:
    """For each example the key of the first one that has its image, or None where every image comes once."""
    first: dict[object, str] = {}
    units = tuple(first.setdefault(_identity(example.image), example.key) for example in examples)
    return units if len(first) < len(units) else None


def check_examples(examples: Sequence[CaptionChoice] | Sequence[TwoByTwo]) -> None:
    """Checks that there are any, and that their keys tell them apart.

    Raises:
        ValueError: it names what is wrong.
    """
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    counts = Counter(example.key for example in examples)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise DataError(f"examples: expected each id or key once, {len(repeated)} repeat: {first_names(repeated)}")


class Pictures(Sequence[Image.Image]):
    """The images of examples in their order, two of each `TwoByTwo`, or of files; opened when they are asked for."""

    def __init__(self, items: Sequence[CaptionChoice] | Sequence[TwoByTwo] | Sequence[ImageSource]) -> None:
        self._sources: list[tuple[ImageSource, Box | None]] = []
        for item in items:
            if isinstance(item, CaptionChoice):
                self._sources.append((item.image, item.box))
            else:
                self._sources += [(image, None) for image in (item.images if isinstance(item, TwoByTwo) else (item,))]

    def __len__(self) -> int:
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [_open(*source) for source in self._sources[index]]
        return _open(*self._sources[index])

    def distinct(self) -> tuple[list[int], list[int]]:
        """Positions of the images that differ in source or box, and which of these every image is."""
        keys = [(_identity(image), box) for image, box in self._sources]
        last = {key: at for at, key in enumerate(keys)}
        number = {key: number for number, key in enumerate(last)}
        return list(last.values()), [number[key] for key in keys]


def _identity(image: ImageSource) -> object:
    return str(image) if isinstance(image, (str, Path)) else id(image)


def _open(image: ImageSource, box: Box | None = None) -> Image.Image:
    opened = open_image(image)
    if box is None:
        return opened
    left, upper, right, lower = box
    try:
        if left < opened.width and upper < opened.height and right > 0 and lower > 0:
            return opened.crop(box)
    except Image.DecompressionBombError:  # a part of such an extent that Pillow will not make it
        pass
    raise DataError(
        f"box: expected a part of {image_name(image)} of {opened.width} x {opened.height} pixels, "
        f"got {list(box)}; check that the images are the benchmark's own"
    )
