"""Packed prompts and what attends over them: ours, PyTorch's attention by length, and flex attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from fastsds import ops

LENGTHS = (2, 3, 3, 4, 3, 4, 5, 3, 4, 4)  # tokens of ten suffixes: names of one to three tokens, "." and the end token
HEADS, HEAD_DIM, PREFIX = 8, 64, 6


class Packed:
    """Suffixes of all images and their prefixes, bfloat16 on a GPU."""

    def __init__(self, images: int, prompts: int, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        self.lengths = [LENGTHS[prompt % len(LENGTHS)] for prompt in range(prompts)]
        bounds = [0, *itertools.accumulate(self.lengths)]
        self.offsets = torch.tensor(bounds, dtype=torch.int32, device=device)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype).requires_grad_()

        self.qkv = leaf(images, bounds[-1], 3, HEADS, HEAD_DIM)
        self.prefix = [leaf(images, PREFIX, HEADS, HEAD_DIM) for _ in range(2)]
        self.upstream = torch.randn_like(self.qkv[:, :, 0])
        self.groups = {
            length: torch.tensor(
                [bounds[p] + step for p, each in enumerate(self.lengths) if each == length for step in range(length)],
                device=device,
            )
            for length in sorted(set(self.lengths))
        }

    def ours(self) -> Tensor:
        return ops.prefix_attention(*self.qkv.unbind(2), *self.prefix, self.offsets, max(self.lengths))

    def eager(self) -> Tensor:
        """A batch of attentions for each length of suffix."""
        out = torch.empty_like(self.upstream)
        for length, tokens in self.groups.items():
            prompts = len(tokens) // length
            q, k, v = (each.index_select(1, tokens).unflatten(1, (prompts, length)) for each in self.qkv.unbind(2))
            keys, values = (
                torch.cat([prefix.unsqueeze(1).expand(-1, prompts, -1, -1, -1), own], dim=2)
                for prefix, own in zip(self.prefix, (k, v), strict=True)
            )
            causal = torch.ones(length, PREFIX + length, dtype=torch.bool, device=q.device).tril(PREFIX)
            heads_first = (each.flatten(0, 1).transpose(1, 2) for each in (q, keys, values))
            attended = scaled_dot_product_attention(*heads_first, attn_mask=causal).transpose(1, 2)
            out = out.index_copy(1, tokens, attended.unflatten(0, (-1, prompts)).flatten(1, 2))
        return out

    def flex(self, attend: Callable[..., Tensor], mask: Any) -> Tensor:
        """
        Args:
            attend: `flex_attention`, or what `torch.compile` makes of it.
            mask: from `block_mask`.
        """
        q, k, v = self.qkv.unbind(2)
        keys, values = (torch.cat(pair, dim=1) for pair in zip(self.prefix, (k, v), strict=True))
        heads_first = (each.transpose(1, 2) for each in (q, keys, values))
        return attend(*heads_first, block_mask=mask).transpose(1, 2)

    def block_mask(self) -> Any:
        """A suffix token sees the whole prefix, and of its own prompt itself and what stands before it."""
        lengths = torch.tensor(self.lengths, device=self.offsets.device)
        prompt = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (key - PREFIX).clamp(min=0)
            return (key < PREFIX) | ((prompt[query] == prompt[own]) & (own <= query))

        tokens = len(prompt)
        return create_block_mask(visible, None, None, tokens, PREFIX + tokens, device=prompt.device)

    def step(self, attend: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = attend()
        return out, *torch.autograd.grad(out, [self.qkv, *self.prefix], self.upstream)
