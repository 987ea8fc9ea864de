"""`prefix_attention` against PyTorch's attention on the same prompts, by length, with the prefix copied to each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastsds import ops

LENGTHS = (2, 3, 3, 4, 3, 4, 5, 3, 4, 4)  # tokens of ten suffixes: names of one to three tokens, "." and the end token
HEADS, HEAD_DIM, PREFIX = 8, 64, 6
CASES = ((4, 100), (32, 1000))


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

    def step(self, attend: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = attend()
        return out, *torch.autograd.grad(out, [self.qkv, *self.prefix], self.upstream)


@pytest.mark.parametrize(("images", "prompts"), [pytest.param(*case, marks=pytest.mark.bar) for case in CASES])
def test_prefix_attention(
    images: int, prompts: int, device: torch.device, compare: Callable[..., dict[str, Any]]
) -> None:
    if device.type == "cpu" and images * prompts > 1000:
        pytest.skip("a GPU's size")
    packed = Packed(images, prompts, device)
    tolerance = 2e-2 if device.type == "cuda" else 1e-4
    for result, expected in zip(packed.step(packed.ours), packed.step(packed.eager), strict=True):
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    compare(
        {"eager": lambda: packed.step(packed.eager), "fastsds": lambda: packed.step(packed.ours)},
        suite="prefix_attention",
        case=f"{images} images, {prompts} prompts",
        dtype=str(packed.qkv.dtype),
        bars={"eager": 1.5},
    )
