from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsds.data.files import DataError
from fastsds.data.images import image_key, image_name, open_image


class _Stored:
    name = "shard.tar:0.png"

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self) -> bytes:
        return self.content


def test_the_key_is_of_the_content_wherever_it_is_stored(tmp_path: Path, pictures: Any) -> None:
    path = pictures.save(tmp_path / "a.png", 3)
    copy = tmp_path / "b.png"
    copy.write_bytes(path.read_bytes())
    keys = {image_key(image) for image in (path, str(path), copy, _Stored(path.read_bytes()))}
    assert keys == {hashlib.blake2b(path.read_bytes(), digest_size=20).hexdigest()}
    assert image_key(pictures.save(tmp_path / "a.png", 4)) not in keys


def test_images_in_memory_are_told_apart_by_pixels_size_and_mode() -> None:
    images = [
        Image.new("RGB", (4, 2)),
        Image.new("RGB", (2, 4)),
        Image.new("RGB", (4, 2), (0, 0, 1)),
        Image.new("L", (4, 6)),
        Image.new("L", (12, 2)),
    ]
    assert len({image_key(image) for image in images}) == 5
    assert image_key(images[0]) == image_key(images[0].copy())


def test_images_that_cannot_be_read_have_no_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image: .*gone\.png does not exist; check the data file's paths and its root"):
        image_key(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"image: .* cannot be read \(.*Is a directory"):
        image_key(tmp_path)


def test_images_are_named_by_where_they_are(tmp_path: Path) -> None:
    assert image_name(tmp_path / "a.png") == str(tmp_path / "a.png")
    assert image_name(_Stored(b"")) == "shard.tar:0.png"
    assert image_name(Image.new("L", (4, 6))) == "an image in memory of 4 x 6 pixels"


def test_a_workers_error_is_its_last_line() -> None:
    sent = (
        'Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "x", '
        "line 1\nfastsds.data.files.DataError: image: a is bad\n\nThe above exception was the direct cause of:\n\n"
        "Traceback (most recent call last):\nfastsds.data.files.DataError: images: 3 of 4 cannot be read\n"
    )
    assert str(DataError(sent)) == "images: 3 of 4 cannot be read"
    assert str(DataError("path: a line")) == "path: a line"


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_of_16_bits_the_upper_8_count(tmp_path: Path, kind: str, byte_order: str) -> None:
    values = np.array([[0, 255, 256, 40_000, 65_535]])
    if kind == "tiff":
        Image.fromarray(values.astype(f"{byte_order}u2")).save(tmp_path / "deep", kind)
    else:
        Image.fromarray(values.astype("<u2")).save(tmp_path / "deep", kind)
    with Image.open(tmp_path / "deep") as image:
        assert image.mode.startswith("I")
        read = [open_image(tmp_path / "deep"), open_image(image)]
    for one in read:
        assert np.asarray(one).tolist() == [[[value // 256] * 3 for value in values[0]]]
