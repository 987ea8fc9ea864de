"""All that a step of score distillation does around the U-Net: timesteps, noise, loss and the backward of both.

The U-Net is left out on every side: its output is given, and so is what its backward hands to its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, timing
from benchmarks.cases import BAR_CASE, TINY_CASE, Case, Inputs, check_loss, check_noise
from fastsds import ops
from fastsds.diffusion import SeedStream
from fastsds.ops.sds_loss import Jacobian

BARS = {"cpu": {"eager": 4.0, "torch.compile": 1.5}, "cuda": {"eager": 5.0, "torch.compile": 1.2}}
GRAPH_BARS = {"cuda": {"eager, graph": 5.0}}
STEPS = {"full": baselines.full_step, "skip": baselines.skip_step}


def ours(inputs: Inputs, jacobian: Jacobian, seed: Tensor) -> tuple[Tensor, ops.LossAndGradients, Tensor]:
    """What `SDSLoss` does: noised latents, loss with its gradients, and the latents' gradient."""
    through_teacher = jacobian == "full"
    batch, draws = inputs.draw.t.shape
    draw = ops.sample_timesteps(inputs.schedule, batch, draws, seed, weighting="sds")
    with torch.set_grad_enabled(through_teacher):
        noised = ops.add_noise(inputs.latents, draw.alpha_t, draw.sigma_t, seed, dtype=inputs.dtype)
    result = ops.sds_loss_and_gradients(
        torch.full_like(draw.weight, 1.0 / draw.weight.numel()),
        inputs.prediction, inputs.latents, draw.alpha_t, draw.sigma_t, draw.weight, seed, jacobian=jacobian,
    )  # fmt: skip
    if not through_teacher:
        assert result.latents is not None
        return noised, result, result.latents
    return noised, result, torch.autograd.grad(noised, inputs.latents, inputs.grad_noised)[0]


def check(inputs: Inputs, jacobian: Jacobian) -> None:
    """The seed of the inputs' draw gives that draw again."""
    noised, result, gradient = ours(inputs, jacobian, inputs.seed)
    check_noise(inputs, noised, gradient if jacobian == "full" else None)
    upstream = torch.full_like(inputs.draw.weight, 1.0 / inputs.draw.weight.numel())
    check_loss(inputs, jacobian, upstream, result)


def baseline(inputs: Inputs, jacobian: Jacobian, step: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    prediction = inputs.prediction.flatten(0, 1)
    noised, loss = step(inputs.latents, prediction, inputs.alphas_cumprod, inputs.draw.t.shape[1], inputs.dtype)
    if jacobian == "skip":
        return torch.autograd.grad(loss, inputs.latents)
    return torch.autograd.grad([loss, noised], [prediction, inputs.latents], [None, inputs.grad_noised.flatten(0, 1)])


@pytest.mark.parametrize("jacobian", get_args(Jacobian))
def test_step(
    case: Case, inputs: Inputs, jacobian: Jacobian, device: torch.device, compare: Callable[..., dict[str, Any]]
) -> None:
    check(inputs, jacobian)
    torch._dynamo.reset()
    compiled = torch.compile(STEPS[jacobian], dynamic=False)
    seeds = SeedStream()
    compare(
        {
            "eager": lambda: baseline(inputs, jacobian, STEPS[jacobian]),
            "torch.compile": lambda: baseline(inputs, jacobian, compiled),
            "fastsds": lambda: ours(inputs, jacobian, seeds.next(device)),
        },
        suite=f"step, jacobian {jacobian}",
        case=str(case),
        dtype=str(inputs.dtype),
        bars=BARS[device.type] if case == BAR_CASE else {},
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("jacobian", get_args(Jacobian))
def test_step_graph(
    case: Case, inputs: Inputs, jacobian: Jacobian, device: torch.device, compare: Callable[..., dict[str, Any]]
) -> None:
    """Both sides captured once and replayed; each replay of ours moves its seed on."""
    if case not in (BAR_CASE, TINY_CASE):
        pytest.skip("graphs are timed where launches weigh most")
    check(inputs, jacobian)
    seed = inputs.seed.clone()
    compare(
        {
            "eager, graph": timing.capture(lambda: baseline(inputs, jacobian, STEPS[jacobian])),
            "fastsds": timing.capture(lambda: ours(inputs, jacobian, seed.add_(1))),
        },
        suite=f"step as a CUDA graph, jacobian {jacobian}",
        case=str(case),
        dtype=str(inputs.dtype),
        bars=GRAPH_BARS[device.type] if case == BAR_CASE else {},
    )
