"""A CLIP model whose features can be read off its inputs, and benchmarks in miniature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from fastsds.evaluation import ClipJudge

COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "white": (255, 255, 255),
}  # fmt: skip


class StubClip(nn.Module):
    """An image's feature is its three channels of one pixel; a caption's is its row in a table."""

    def __init__(self, table: dict[str, list[float]]) -> None:
        super().__init__()
        self.captions = list(table)
        self.features = nn.Parameter(torch.tensor(list(table.values())))
        self.encoded_texts: list[int] = []
        self.encoded_images: list[int] = []

    def tokenizer(self, captions: list[str]) -> Tensor:
        return torch.tensor([[self.captions.index(caption)] for caption in captions])

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        self.encoded_texts.append(len(tokens))
        features = self.features[tokens[:, 0]]
        return F.normalize(features, dim=-1) if normalize else features

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        self.encoded_images.append(len(images))
        features = images[:, :, 0, 0]
        return F.normalize(features, dim=-1) if normalize else features


@pytest.fixture
def stub_clip() -> Callable[[dict[str, list[float]]], StubClip]:
    return StubClip


def corner(image: Image.Image) -> Tensor:
    """Preprocessing that keeps the top left pixel, in [0, 1]."""
    assert image.mode == "RGB"
    return to_tensor(image)[:, :1, :1]


@pytest.fixture
def colour_judge() -> Callable[..., ClipJudge]:
    """A judge to whom a caption `a red one` looks like red; other captions' features may be given."""

    def make(table: dict[str, Any] | None = None, **options: Any) -> ClipJudge:
        named = {f"a {name} one": [float(channel) for channel in colour] for name, colour in COLOURS.items()}
        clip = StubClip({**named, **(table or {})})
        return ClipJudge(clip, corner, clip.tokenizer, **options)

    return make


@pytest.fixture
def paint() -> Callable[..., Path]:
    """Writes an image of one colour, or of a left and a right half."""

    def write(path: Path, left: str, right: str | None = None) -> Path:
        image = Image.new("RGB", (8, 6), COLOURS[left])
        if right is not None:
            image.paste(COLOURS[right], (4, 0, 8, 6))
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return path

    return write
