"""A CLIP model whose features can be read off its inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
