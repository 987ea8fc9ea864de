"""Pictures of one colour each, and a CLIP whose preprocessing reads the colour."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastsds.data import CaptionDataset, CaptionSource

SIZE = 24


class Pictures:
    """Picture `n` has the colour `(10 n, 200 - 10 n, 77)` and the caption `picture n`."""

    @staticmethod
    def colour(number: int) -> list[int]:
        return [10 * number, 200 - 10 * number, 77]

    @classmethod
    def image(cls, number: int) -> Image.Image:
        return Image.new("RGB", (SIZE, SIZE), tuple(cls.colour(number)))

    @classmethod
    def encoded(cls, number: int, kind: str = "png") -> bytes:
        file = io.BytesIO()
        cls.image(number).save(file, kind)
        return file.getvalue()

    @classmethod
    def save(cls, path: Path, number: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        cls.image(number).save(path)
        return path

    @staticmethod
    def truncate(path: Path) -> None:
        """Leaves an image that is recognised and not decoded."""
        content = path.read_bytes()
        path.write_bytes(content[: len(content) - 30])


def preprocess(image: Image.Image) -> Tensor:
    assert image.mode == "RGB"
    return torch.tensor(image.getpixel((SIZE // 2, SIZE // 2)))


def tokenizer(captions: list[str]) -> Tensor:
    return torch.tensor([[len(caption), ord(caption[-1])] for caption in captions])


@pytest.fixture
def pictures() -> type[Pictures]:
    return Pictures


@pytest.fixture
def load() -> Callable[..., CaptionDataset]:
    """Loads a `CaptionSource` of these options; what cannot be read is an error at once."""

    def make(path: Path | str, *, seed: int = 0, bad_images: Path | None = None, **options: Any) -> CaptionDataset:
        source = CaptionSource(path, **{"max_bad_share": 0.0, **options})
        return source.load(preprocess, tokenizer, seed=seed, bad_images=bad_images, progress=False)

    return make


@pytest.fixture
def colours() -> Callable[[CaptionDataset], list[tuple[list[int], str]]]:
    """All rows as colour and caption."""
    return lambda dataset: [
        (row["images"].tolist(), row["captions"]) for row in map(dataset.__getitem__, range(len(dataset)))
    ]
