"""`prefix_attention`: packed suffixes attend causally to themselves and to their image's shared prefix."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, offsets: Tensor, max_length: int
) -> Tensor:
    prefix = prefix_k.shape[1]
    total = k.shape[1]
    steps = torch.arange(max_length, device=k.device)
    index = offsets[:-1, None] + steps
    inside = index < offsets[1:, None]
    index = index.clamp(max=total - 1)
    last_only = q.shape[1] == offsets.shape[0] - 1
    queries = q[:, :, None] if last_only else q[:, index]
    keys, values = k[:, index], v[:, index]
    visible = inside[:, None] if last_only else (steps <= steps[:, None]) & inside[:, None]
    scale = q.shape[-1] ** -0.5
    own = torch.einsum("icqhd,ickhd->ichqk", queries, keys).masked_fill(~visible[None, :, None], float("-inf"))
    shared = torch.einsum("icqhd,iphd->ichqp", queries, prefix_k)
    own = own.expand(shared.shape[0], *own.shape[1:])
    weights = (torch.cat([shared, own], -1) * scale).softmax(-1)
    out = torch.einsum("ichqp,iphd->icqhd", weights[..., :prefix], prefix_v)
    out = out + torch.einsum(
        "ichqk,ickhd->icqhd", weights[..., prefix:], values.expand(out.shape[0], *values.shape[1:])
    )
    if last_only:
        return out[:, :, 0]
    tokens = torch.arange(total, device=k.device)
    prompt = torch.searchsorted(offsets[1:], tokens, right=True)
    return out[:, prompt, tokens - offsets[prompt]]
