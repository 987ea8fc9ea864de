"""`sds_loss`: the residual against the noise, weighted and averaged, with its gradient in the prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.cases import Case, Inputs, check_loss
from fastsds import ops


def arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    draw = inputs.draw
    return inputs.prediction, inputs.latents, draw.alpha_t, draw.sigma_t, draw.weight, inputs.seed


def upstream(inputs: Inputs) -> Tensor:
    """The gradient of the mean over images and draws."""
    return torch.full_like(inputs.draw.weight, 1.0 / inputs.draw.weight.numel())


def ours(inputs: Inputs, grad: Tensor | None = None) -> ops.LossAndGradients:
    return ops.sds_loss_and_gradients(upstream(inputs) if grad is None else grad, *arguments(inputs))


def through_autograd(inputs: Inputs) -> tuple[Tensor, Tensor]:
    loss = ops.sds_loss(*arguments(inputs))
    return loss, torch.autograd.grad(loss.mean(), inputs.prediction)[0]


def test_sds_loss(case: Case, inputs: Inputs, compare: Callable[..., dict[str, Any]]) -> None:
    check_loss(inputs, "full", upstream(inputs), ours(inputs))
    loss, gradient = through_autograd(inputs)
    check_loss(inputs, "full", upstream(inputs), ops.LossAndGradients(loss, gradient, None, None))
    compiled = torch.compile(baselines.full_loss, dynamic=True)
    flat = inputs.prediction.detach().flatten(0, 1).requires_grad_()
    noise = torch.randn(flat.shape, device=flat.device)

    def baseline(function: Callable[..., Tensor]) -> Tensor:
        return torch.autograd.grad(function(flat, noise, inputs.draw.t, inputs.alphas_cumprod), flat)[0]

    compare(
        {
            "eager": lambda: baseline(baselines.full_loss),
            "torch.compile": lambda: baseline(compiled),
            "fastsds, two passes": lambda: through_autograd(inputs),
            "fastsds": lambda: ours(inputs),
        },
        suite="sds_loss",
        case=str(case),
        dtype=str(inputs.dtype),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bandwidth is measured on a GPU")
def test_sds_loss_bandwidth(case: Case, inputs: Inputs, report_bandwidth: Callable[..., None]) -> None:
    """Reads the prediction once and writes its gradient once; epsilon-prediction does not need the latents."""
    check_loss(inputs, "full", upstream(inputs), ours(inputs))
    bytes_moved = 2 * case.elements * case.draws * inputs.prediction.itemsize

    grad = upstream(inputs)  # made beforehand: a launch that moves nothing
    report_bandwidth("sds_loss", case, inputs, lambda copy: lambda: ours(copy, grad), bytes_moved)
