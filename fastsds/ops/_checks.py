"""The parts of the contract that several ops share. Every message says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastsds.ops import philox

LATENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
COEFFICIENT_DTYPES = (torch.float32, torch.float64)


def expect(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """`torch._check`, whose machinery is left alone where the condition plainly holds: it would cost a call's worth."""
    if condition is not True:
        torch._check(condition, message)


def check_same_device(**tensors: Tensor | None) -> None:
    """All tensors lie on the device of the first."""
    first_name, first = next((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    device = first.device
    for name, tensor in tensors.items():
        if tensor is not None:
            expect(
                tensor.device == device,
                lambda: f"{name}: expected on the device of {first_name} ({device}), got {tensor.device}",
            )


def check_seed(seed: Tensor) -> None:
    """A seed is one int64 on the device, so that a captured graph can be given another."""
    expect(
        seed.dtype == torch.int64 and seed.numel() == 1,
        lambda: f"seed: expected one int64 in a tensor, got shape {list(seed.shape)} of {seed.dtype}",
    )


def check_floating(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = LATENT_DTYPES) -> None:
    expect(tensor.dtype in dtypes, lambda: f"{name}: expected one of {list(dtypes)}, got {tensor.dtype}")


def check_latents(latents: Tensor) -> None:
    expect(latents.dim() >= 2, lambda: f"latents: expected [batch, *latent], at least 2-D, got {list(latents.shape)}")
    check_floating("latents", latents)


def check_coefficients(batch: int, **coefficients: Tensor) -> None:
    """alpha_t, sigma_t, weight: `[batch, draws]`, one shape, float32 or float64."""
    first_name, first = next(iter(coefficients.items()))
    for name, tensor in coefficients.items():
        check_floating(name, tensor, COEFFICIENT_DTYPES)
        expect(
            tensor.dim() == 2 and tensor.shape[0] == batch,
            lambda: f"{name}: expected [batch={batch}, draws], got {list(tensor.shape)}",
        )
        expect(
            tensor.shape == first.shape,
            lambda: f"{name}: expected the shape of {first_name} {list(first.shape)}, got {list(tensor.shape)}",
        )


def check_batch_offset(batch_offset: int) -> None:
    expect(batch_offset >= 0, lambda: f"batch_offset: expected at least 0, got {batch_offset}")


def compute_dtype(latents: Tensor) -> torch.dtype:
    """Sums and coefficients are float32, or float64 where the latents are."""
    return torch.float64 if latents.dtype == torch.float64 else torch.float32


def per_latent(coefficient: Tensor, latents: Tensor) -> Tensor:
    """`[batch, draws]` as `[batch, draws, 1, …]` in the compute dtype, to multiply `[batch, draws, *latent]`."""
    return coefficient.to(compute_dtype(latents)).reshape(*coefficient.shape, *[1] * (latents.dim() - 1))


def draw_noise(seed: Tensor, latents: Tensor, draws: int, batch_offset: int) -> Tensor:
    """The noise of a slice of the logical `[batch, draws, *latent]` tensor, in the compute dtype."""
    shape = (latents.shape[0], draws, *latents.shape[1:])
    start = batch_offset * math.prod(shape[1:])
    return philox.normal(seed, shape, start=start).to(compute_dtype(latents))
