"""Images wherever they are stored: opened, named and hashed alike."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from PIL import Image, UnidentifiedImageError

from fastsds.data.files import DataError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What Pillow's decoders raise on broken files.
_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


@runtime_checkable
class StoredImage(Protocol):
    """An encoded image that is no file of its own: a member of a shard, a row of a table."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    def read(self) -> bytes:
        """The encoded image; may be called in any process."""
        ...


ImageSource: TypeAlias = str | Path | Image.Image | StoredImage


class Pairs(NamedTuple):
    """What a reader finds: images, and every image's captions."""

    images: Sequence[ImageSource]
    captions: Sequence[Sequence[str]]


def open_image(image: ImageSource) -> Image.Image:
    """The image in RGB, its pixels as they are stored: alpha and EXIF orientation are passed over, as open_clip does.

    Of 16 bits, the upper 8 count.

    Raises:
        DataError: it does not exist or cannot be decoded.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    try:
        with Image.open(image if isinstance(image, (str, Path)) else io.BytesIO(image.read())) as opened:
            return _to_rgb(opened)
    except FileNotFoundError as error:
        raise _absent(image) from error
    except UnidentifiedImageError as error:
        raise _unreadable(image, "it is no image of a known format") from error
    except _BROKEN as error:
        raise _unreadable(image, error) from error


def image_name(image: ImageSource) -> str:
    """What messages call an image: its path, where it has one."""
    if isinstance(image, Image.Image):
        return f"an image in memory of {image.width} x {image.height} pixels"
    return str(image) if isinstance(image, (str, Path)) else image.name


def image_key(image: ImageSource) -> str:
    """A hash (BLAKE2b, 160 bits, hexadecimal) of the encoded image as it is stored, or of the pixels of one in memory.

    Raises:
        DataError: it cannot be read.
    """
    if isinstance(image, Image.Image):
        content = f"{image.mode} {image.size} ".encode() + image.tobytes()
    else:
        try:
            content = Path(image).read_bytes() if isinstance(image, (str, Path)) else image.read()
        except FileNotFoundError as error:
            raise _absent(image) from error
        except OSError as error:
            raise _unreadable(image, error) from error
    return hashlib.blake2b(content, digest_size=20).hexdigest()


def image_files(folder: Path, *, subfolders: bool = True) -> list[Path]:
    """The image files of a folder, sorted; without the hidden ones that notebooks and macOS leave there.

    A linked folder counts as one in its place, where it was not met before.

    Raises:
        DataError: a folder that cannot be read.
    """
    found: list[Path] = []
    met: set[str] = set()
    for place, inner, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        if (real := os.path.realpath(place)) in met:
            inner.clear()
            continue
        met.add(real)
        inner[:] = sorted(name for name in inner if subfolders and not name.startswith("."))
        found += [Path(place, name) for name in files if _is_image(name)]
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"path: could not read {error.filename}: {error.strerror}") from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would turn all above 255 white
        image = image.convert("I").point(lambda value: value / 256)
    return image.convert("RGB")


def _absent(image: ImageSource) -> DataError:
    return DataError(f"image: {image_name(image)} does not exist; check the data file's paths and its root")


def _unreadable(image: ImageSource, reason: object) -> DataError:
    return DataError(f"image: {image_name(image)} cannot be read ({reason}); replace it or take its row out")
