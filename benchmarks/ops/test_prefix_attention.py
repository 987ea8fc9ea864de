"""`prefix_attention` against PyTorch's attention on the same packed prompts.

"eager" is `scaled_dot_product_attention`, by length, with the prefix copied to each prompt; "flex attention", on a GPU,
is one compiled call with a block mask over prefix and suffixes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.packed import Packed

CASES = ((4, 100), (32, 1000))


@pytest.mark.parametrize(("images", "prompts"), [pytest.param(*case, marks=pytest.mark.bar) for case in CASES])
def test_prefix_attention(
    images: int, prompts: int, device: torch.device, compare: Callable[..., dict[str, Any]]
) -> None:
    if device.type == "cpu" and images * prompts > 1000:
        pytest.skip("a GPU's size")
    packed = Packed(images, prompts, device)
    tolerance = 2e-2 if device.type == "cuda" else 1e-4
    contenders: dict[str, Callable[[], Tensor]] = {"eager": packed.eager, "fastsds": packed.ours}
    if device.type == "cuda":  # PyTorch has no backward of it for a CPU
        compiled, mask = torch.compile(flex_attention, dynamic=False), packed.block_mask()
        contenders["flex attention"] = lambda: packed.flex(compiled, mask)
    expected = packed.step(packed.eager)
    for contender in contenders.values():
        for result, right in zip(packed.step(contender), expected, strict=True):
            torch.testing.assert_close(result, right, rtol=tolerance, atol=tolerance * right.abs().max().item())
    compare(
        {name: partial(packed.step, contender) for name, contender in contenders.items()},
        suite="prefix_attention",
        case=f"{images} images, {prompts} prompts",
        dtype=str(packed.qkv.dtype),
        bars={name: 1.5 for name in contenders if name != "fastsds"},
    )
