"""Memory formats: a result lies in memory as its argument does, contiguous or channels-last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Channels-last where the last three dimensions of `[batch, (draws,) channels, height, width]` lie so."""
    if tensor.dim() not in (4, 5):
        return torch.contiguous_format
    channels, height, width = tensor.shape[-3:]
    if channels == 1 or height * width == 1:
        return torch.contiguous_format
    strides = tensor.stride()[-3:]
    expected = (1, width * channels if height > 1 else strides[1], channels if width > 1 else strides[2])
    return torch.channels_last if strides == expected else torch.contiguous_format


def empty(shape: Sequence[int], like: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Dense, not filled, of a `[batch, …]` or `[batch, draws, …]` shape, in the memory format of `like`."""
    layout = memory_format(like) if len(shape) in (4, 5) else torch.contiguous_format
    merged = [shape[0] * shape[1], *shape[2:]] if len(shape) == 5 and layout == torch.channels_last else shape
    tensor = torch.empty(tuple(merged), dtype=dtype or like.dtype, device=like.device, memory_format=layout)
    return tensor.view(tuple(shape))
