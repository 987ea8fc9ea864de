"""The shapes that are timed, the tensors of each, and the gates that come before any timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastsds import ops
from fastsds.diffusion import NoiseSchedule
from fastsds.ops import TimestepDraw

CHANNELS, TIMESTEPS = 4, 1000


@dataclass(frozen=True)
class Case:
    """Stable Diffusion latents `[batch, 4, size, size]`, noised `draws` times each."""

    batch: int
    draws: int
    size: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.draws}x{CHANNELS}x{self.size}x{self.size}"

    @property
    def elements(self) -> int:
        """Of the latents."""
        return self.batch * CHANNELS * self.size**2


BAR_CASE, BANDWIDTH_CASE, TINY_CASE = Case(32, 1, 64), Case(256, 4, 64), Case(2, 2, 8)
CASES = (*(Case(batch, draws, 64) for batch in (1, 32, 256) for draws in (1, 4)), Case(32, 1, 128))


@dataclass(frozen=True)
class Inputs:
    """What every contender of a case is given. The latents are float32, the teacher's tensors in `dtype`."""

    latents: Tensor  # [batch, 4, size, size]
    prediction: Tensor  # [batch, draws, 4, size, size], the U-Net's output
    grad_noised: Tensor  # of its shape, what the U-Net's backward hands to its input
    schedule: NoiseSchedule
    alphas_cumprod: Tensor  # [timesteps]
    draw: TimestepDraw
    seed: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.prediction.dtype

    def clone(self) -> Inputs:
        """The same in memory of its own."""
        tensors = {name: getattr(self, name).detach().clone() for name in ("latents", "prediction", "grad_noised")}
        for name in ("latents", "prediction"):
            tensors[name].requires_grad_()
        return Inputs(**{**self.__dict__, **tensors})


def make_schedule(device: torch.device) -> NoiseSchedule:
    """Stable Diffusion's: betas linear in their roots from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64).square()
    alpha_bar = (1 - betas).cumprod(0)
    return NoiseSchedule(alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float(), torch.arange(TIMESTEPS)).to(device)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """float32 on a CPU; on a GPU the teacher's side is bfloat16."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    latent = (CHANNELS, case.size, case.size)
    schedule = make_schedule(device)
    seed = torch.tensor(11, device=device)
    return Inputs(
        torch.randn(case.batch, *latent, device=device).requires_grad_(),
        torch.randn(case.batch, case.draws, *latent, device=device).to(dtype).requires_grad_(),
        torch.randn(case.batch, case.draws, *latent, device=device).to(dtype),
        schedule,
        schedule.alpha.square(),
        ops.sample_timesteps(schedule, case.batch, case.draws, seed, weighting="sds"),
        seed,
    )


def check_noise(inputs: Inputs, noised: Tensor, grad_latents: Tensor | None) -> None:
    """The gate of `add_noise`: the first, middle and last latent against the definition, with their gradients."""
    definition = _definition("add_noise")
    for row, latents, draw, seed in _rows(inputs):
        expected = definition.reference(latents, draw.alpha_t, draw.sigma_t, seed, inputs.dtype, row.start)
        torch.testing.assert_close(noised[row].detach(), expected)
        if grad_latents is not None:
            grad = definition.reference_backward(inputs.grad_noised[row], draw.alpha_t, latents.dtype)
            torch.testing.assert_close(grad_latents[row], grad)


def check_loss(inputs: Inputs, jacobian: str, upstream: Tensor, result: ops.LossAndGradients) -> None:
    """The gate of `sds_loss`: the first, middle and last latent against the definition, with their gradients."""
    definition = _definition("sds_loss")
    needs = [result.prediction is not None, result.latents is not None, False]
    for row, latents, draw, seed in _rows(inputs):
        loss, prediction, in_latents, _ = definition.reference_backward(
            upstream[row], inputs.prediction[row].detach(), latents, draw.alpha_t, draw.sigma_t, draw.weight, seed,
            "epsilon", None, 1.0, jacobian, row.start, needs,
        )  # fmt: skip
        torch.testing.assert_close(result.loss[row].detach(), loss)
        if result.prediction is not None:
            torch.testing.assert_close(result.prediction[row], prediction)
        if result.latents is not None:
            torch.testing.assert_close(result.latents[row], in_latents)


def check_timesteps(draw: TimestepDraw, arguments: tuple[Any, ...]) -> None:
    """The gate of `sample_timesteps`: all of it against the definition."""
    for value, expected in zip(draw, _definition("sample_timesteps").reference(*arguments), strict=True):
        torch.testing.assert_close(value, expected)


def _definition(op: str) -> Any:
    """The module of an op, which the function of its name hides in `fastsds.ops`."""
    return import_module(f"fastsds.ops.{op}")


def _rows(inputs: Inputs) -> Iterator[tuple[slice, Tensor, TimestepDraw, Tensor]]:
    batch = len(inputs.latents)
    for start in sorted({0, batch // 2, batch - 1}):
        row = slice(start, start + 1)
        yield row, inputs.latents[row].detach(), TimestepDraw(*(value[row] for value in inputs.draw)), inputs.seed
