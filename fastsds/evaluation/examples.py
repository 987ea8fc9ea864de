"""What a benchmark asks: which caption belongs to an image, and which image to a caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from fastsds.data.files import DataError
from fastsds.data.images import ImageSource, open_image


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
    box: tuple[int, int, int, int] | None = None
    """What to cut out of the image: left, upper, right, lower, in pixels."""

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
            DataError: it does not exist or cannot be decoded.
        """
        image = open_image(self.image)
        return image if self.box is None else image.crop(self.box)


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
        return open_image(first), open_image(second)


def groups_of(examples: Sequence[CaptionChoice] | Sequence[TwoByTwo]) -> tuple[str, ...] | None:
    """The examples' groups, or None where no example names one."""
    groups = tuple(example.group for example in examples)
    return groups if any(groups) else None
