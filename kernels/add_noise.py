"""`add_noise` in Triton: `z` is read once for all draws, `eps` never leaves the registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds.kernels import tiles

MAX_WARPS, ELEMENTS_PER_THREAD = 4, 16


@triton.jit(do_not_specialize=["batch_offset"])
def add_noise_kernel(
    latents,  # [batch, numel]
    alpha_t,  # [batch, draws]
    sigma_t,  # [batch, draws]
    seed,  # [1]
    noised,  # [batch, draws, numel]
    draws: tl.int64,
    batch_offset: tl.int64,
    numel: tl.int64,
    pixels: tl.int64,
    CHANNELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    TILE: tl.constexpr,
):
    """`alpha_t z + sigma_t eps` for one tile of one latent and all its draws, in float32 (float64 for float64 `z`)."""
    COMPUTE: tl.constexpr = tl.float64 if latents.dtype.element_ty == tl.float64 else tl.float32
    image, tile = tiles.locate(numel, TILE)
    offset, mask = tiles.offsets(tile, numel, FULL, TILE)
    key = tl.load(seed)
    z = tl.load(latents + image * numel + offset, mask=mask).to(COMPUTE)
    for draw in range(draws):
        row = image * draws + draw
        alpha, sigma = tl.load(alpha_t + row).to(COMPUTE), tl.load(sigma_t + row).to(COMPUTE)
        first = (batch_offset * draws + row) * numel
        eps = tiles.noise(key, first, tile, pixels, CHANNELS, ALIGNED, FULL, TILE).to(COMPUTE)
        tiles.store(noised + row * numel + offset, tl.fma(sigma, eps, alpha * z), mask)


@triton.jit
def add_noise_backward_kernel(
    grad,  # [batch, draws, numel]
    alpha_t,  # [batch, draws]
    grad_latents,  # [batch, numel]
    draws: tl.int64,
    numel: tl.int64,
    TILE: tl.constexpr,
):
    """The sum over draws of `alpha_t * grad` for one tile of one latent, in float32 (float64 for float64 latents)."""
    COMPUTE: tl.constexpr = tl.float64 if grad_latents.dtype.element_ty == tl.float64 else tl.float32
    image, tile = tiles.locate(numel, TILE)
    offset = tile * TILE + tl.arange(0, TILE)
    mask = offset < numel
    total = tl.zeros([TILE], COMPUTE)
    for draw in range(draws):
        row = image * draws + draw
        alpha = tl.load(alpha_t + row).to(COMPUTE)
        total = tl.fma(alpha, tl.load(grad + row * numel + offset, mask=mask).to(COMPUTE), total)
    tiles.store(grad_latents + image * numel + offset, total, mask)


def add_noise(
    noised: Tensor,  # [batch, draws, *latent]
    latents: Tensor,  # [batch, *latent]
    alpha_t: Tensor,  # [batch, draws]
    sigma_t: Tensor,  # [batch, draws]
    seed: Tensor,  # [] or [1]
    dtype: torch.dtype | None,
    batch_offset: int,
) -> None:
    """Fills `noised`, which is contiguous or channels-last."""
    channels_last = tiles.is_channels_last(noised)
    options = tiles.launch_options(latents.shape[1:], channels_last, MAX_WARPS, ELEMENTS_PER_THREAD)
    grid = (latents.shape[0] * triton.cdiv(options["numel"], options["TILE"]),)
    with torch.cuda.device_of(latents):
        add_noise_kernel[grid](
            tiles.in_memory_order(latents, channels_last), alpha_t.contiguous(), sigma_t.contiguous(), seed, noised,
            alpha_t.shape[1], batch_offset, **options,
        )  # fmt: skip


def add_noise_backward(
    grad_latents: Tensor,  # [batch, *latent]
    grad: Tensor,  # [batch, draws, *latent]
    alpha_t: Tensor,  # [batch, draws]
    dtype: torch.dtype,
) -> None:
    """Fills `grad_latents`, which is contiguous or channels-last."""
    channels_last = tiles.is_channels_last(grad_latents)
    options = tiles.launch_options(grad_latents.shape[1:], False, MAX_WARPS, ELEMENTS_PER_THREAD)
    grid = (grad.shape[0] * triton.cdiv(options["numel"], options["TILE"]),)
    with torch.cuda.device_of(grad):
        add_noise_backward_kernel[grid](
            tiles.in_memory_order(grad, channels_last), alpha_t.contiguous(), grad_latents, alpha_t.shape[1],
            options["numel"], TILE=options["TILE"], num_warps=options["num_warps"], enable_fp_fusion=False,
        )  # fmt: skip
