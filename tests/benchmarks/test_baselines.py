"""The baselines do the same sums as the library: only then is a comparison of times one."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from benchmarks import baselines
from benchmarks.cases import TIMESTEPS, Case, Inputs, make_inputs
from fastsds import ops
from fastsds.ops import philox
from fastsds.ops.sample_timesteps import Strategy
from fastsds.ops.sds_loss import Jacobian


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(Case(3, 2, 8), torch.device("cpu"))


@pytest.fixture
def noise(inputs: Inputs) -> torch.Tensor:
    return philox.normal(inputs.seed, inputs.prediction.shape).flatten(0, 1)


def test_noised_latents(inputs: Inputs, noise: torch.Tensor) -> None:
    ours = ops.add_noise(inputs.latents, inputs.draw.alpha_t, inputs.draw.sigma_t, inputs.seed)
    theirs = baselines.add_noise(
        inputs.latents.repeat_interleave(2, dim=0), noise, inputs.draw.t.flatten(), inputs.alphas_cumprod
    )
    torch.testing.assert_close(theirs.view_as(ours), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("jacobian", get_args(Jacobian))
def test_loss_and_gradient(inputs: Inputs, noise: torch.Tensor, jacobian: Any) -> None:
    """The skipped Jacobian's loss is a device to carry the gradient: its value is another, its gradient is not."""
    draw, prediction = inputs.draw, inputs.prediction.flatten(0, 1)
    ours = ops.sds_loss(
        inputs.prediction, inputs.latents, draw.alpha_t, draw.sigma_t, draw.weight, inputs.seed, jacobian=jacobian
    ).mean()
    if jacobian == "full":
        theirs = baselines.full_loss(prediction, noise, draw.t, inputs.alphas_cumprod)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=0)
        differentiated = inputs.prediction
    else:
        theirs = baselines.skip_loss(inputs.latents, prediction, noise, draw.t, inputs.alphas_cumprod)
        differentiated = inputs.latents
    (expected,), (gradient,) = (torch.autograd.grad(loss, differentiated) for loss in (theirs, ours))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_timesteps_estimate_the_same_mean(strategy: Any) -> None:
    """`E_t w(t) t`, by the baseline's own draws of 1024 timesteps, and coefficients that belong to them."""
    alphas_cumprod = torch.linspace(0.999, 0.01, TIMESTEPS)
    probabilities = torch.softmax(torch.linspace(1, -1, TIMESTEPS), 0)
    t, alpha_t, sigma_t, weight = baselines.draw_timesteps(alphas_cumprod, 256, 4, strategy, probabilities)
    assert t.shape == alpha_t.shape == sigma_t.shape == weight.shape == (256, 4)
    torch.testing.assert_close(alpha_t.square(), alphas_cumprod[t])
    torch.testing.assert_close(sigma_t.square(), 1 - alphas_cumprod[t])
    if strategy == "antithetic":
        assert (t.view(-1, 2).sum(dim=1) == TIMESTEPS - 1).all()
    if strategy == "stratified":
        lowest_of_strata = torch.arange(1024) * TIMESTEPS // 1024
        assert (t.flatten().sort().values - lowest_of_strata).abs().max() <= 1
    exact = ((1 - alphas_cumprod) * torch.arange(TIMESTEPS)).mean()
    estimate = weight * t
    assert (estimate.mean() - exact).abs() < 4 * estimate.std() / 1024**0.5
