"""`add_noise`: `z_t = alpha_t z + sigma_t eps`, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.cases import Case, Inputs, check_noise
from fastsds import ops


def ours(inputs: Inputs) -> Tensor:
    return ops.add_noise(inputs.latents, inputs.draw.alpha_t, inputs.draw.sigma_t, inputs.seed, dtype=inputs.dtype)


def with_gradient(inputs: Inputs, noised: Tensor) -> Tensor:
    return torch.autograd.grad(noised, inputs.latents, inputs.grad_noised.view_as(noised))[0]


def test_add_noise(case: Case, inputs: Inputs, compare: Callable[..., dict[str, Any]]) -> None:
    noised = ours(inputs)
    check_noise(inputs, noised, with_gradient(inputs, noised))
    compiled = torch.compile(baselines.noised, dynamic=True)

    def baseline(function: Callable[..., Any]) -> Tensor:
        return with_gradient(inputs, function(inputs.latents, inputs.draw.t, inputs.alphas_cumprod, inputs.dtype)[0])

    compare(
        {
            "eager": lambda: baseline(baselines.noised),
            "torch.compile": lambda: baseline(compiled),
            "fastsds": lambda: with_gradient(inputs, ours(inputs)),
        },
        suite="add_noise",
        case=str(case),
        dtype=str(inputs.dtype),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bandwidth is measured on a GPU")
def test_add_noise_bandwidth(case: Case, inputs: Inputs, report_bandwidth: Callable[..., None]) -> None:
    """Reads the latents once and writes the noised ones once."""
    check_noise(inputs, ours(inputs), None)
    bytes_moved = case.elements * (inputs.latents.itemsize + case.draws * inputs.prediction.itemsize)

    def make(copy: Inputs) -> Callable[[], Any]:
        def forward() -> Tensor:
            with torch.no_grad():
                return ours(copy)

        return forward

    report_bandwidth("add_noise", case, inputs, make, bytes_moved)
