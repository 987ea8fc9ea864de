"""What the tests of prompted models share: an image batch, and prompts run densely through the model's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def dense(clip_tokenizer: Any) -> Callable[..., Tensor]:
    """Text embeddings of `[start] vectors words [end]` by `encode_text`, the vectors put where it looks tokens up."""

    def encode(clip: Any, vectors: Tensor, words: str) -> Tensor:
        row = clip_tokenizer([words])[0]
        tokens = torch.cat([row[:1], row[1:2].expand(len(vectors)), row[1:]])[: len(row)].unsqueeze(0)
        table = getattr(clip, "text", clip).token_embedding

        def place(module: Any, arguments: Any, output: Tensor) -> Tensor:
            return torch.cat([output[:, :1], vectors.unsqueeze(0), output[:, 1 + len(vectors) :]], dim=1)

        handle = table.register_forward_hook(place)
        try:
            return clip.encode_text(tokens)[0]
        finally:
            handle.remove()

    return encode
