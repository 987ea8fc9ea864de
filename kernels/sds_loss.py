"""`sds_loss` in Triton: guidance, residual against regenerated noise, loss and gradients in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds.kernels import tiles

MAX_WARPS, ELEMENTS_PER_THREAD = 16, 8
# Twice the registers per thread, where the sums of several draws lie in them.
MAX_WARPS_FOR_SUMS, ELEMENTS_PER_THREAD_FOR_SUMS = 8, 4
REGISTERS_FOR_SUMS = 8


@triton.jit(do_not_specialize=["batch_offset"])
def sds_loss_kernel(
    prediction,  # [batch, draws, numel]
    latents,  # [batch, numel]
    alpha_t,  # [batch, draws]
    sigma_t,  # [batch, draws]
    weight,  # [batch, draws]
    seed,  # [1]
    uncond,  # [batch, draws, numel] or None
    loss,  # [batch, draws]
    grad,  # [batch, draws] at any strides, or None
    grad_prediction,  # [batch, draws, numel] or None
    grad_latents,  # [batch, numel] or None
    grad_uncond,  # [batch, draws, numel] or None
    grad_batch_stride: tl.int64,
    grad_draw_stride: tl.int64,
    guidance_scale: tl.float64,
    draws: tl.int64,
    batch_offset: tl.int64,
    numel: tl.int64,
    pixels: tl.int64,
    PREDICTION_TYPE: tl.constexpr,
    JACOBIAN: tl.constexpr,
    LATENTS_ROW_MAJOR: tl.constexpr,
    GROUP: tl.constexpr,
    SUMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    TILE: tl.constexpr,
):
    """`weight * mean((eps_hat - eps)**2)` of one draw, or, for a gradient that sums over them, of a latent's draws.

    All in the type of `loss`: float32, or float64 for float64 latents. The order of every sum is fixed. `GROUP` is a
    power of two not below the draws of one program; where they are several, each has `SUMS` partial sums.
    """
    COMPUTE: tl.constexpr = loss.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    if grad_latents is None:
        first_row, count = program, 1
        image = program // draws
    else:
        first_row, count = program * draws, draws
        image = program
    key = tl.load(seed)
    scale = tl.cast(guidance_scale, COMPUTE)
    to_mean = tl.full([], 2.0, COMPUTE) / numel
    squares = tl.zeros([TILE] if GROUP == 1 else [GROUP, SUMS], COMPUTE)
    draw = tl.arange(0, GROUP)
    for tile in range(tl.cdiv(numel, TILE)):
        offset, mask = tiles.offsets(tl.cast(tile, tl.int64), numel, FULL, TILE)
        if LATENTS_ROW_MAJOR:
            at_latents = image * numel + tiles.row_major(offset, pixels, CHANNELS)
        else:
            at_latents = image * numel + offset
        if PREDICTION_TYPE != "epsilon":
            z = tl.load(latents + at_latents, mask=mask, other=0.0).to(COMPUTE)
        in_latents = tl.zeros([TILE], COMPUTE)
        for index in range(count):
            row = first_row + index
            at = row * numel + offset
            alpha, sigma = tl.load(alpha_t + row).to(COMPUTE), tl.load(sigma_t + row).to(COMPUTE)
            guided = tl.load(prediction + at, mask=mask, other=0.0).to(COMPUTE)
            if uncond is not None:
                unguided = tl.load(uncond + at, mask=mask, other=0.0).to(COMPUTE)
                guided = tl.fma(scale, guided - unguided, unguided)
            start = batch_offset * draws * numel + row * numel
            eps = tiles.noise(key, start, tl.cast(tile, tl.int64), pixels, CHANNELS, ALIGNED, FULL, TILE).to(COMPUTE)
            slope, slope_latents = alpha, alpha
            if PREDICTION_TYPE == "epsilon":
                residual = guided - eps
            elif PREDICTION_TYPE == "v_prediction":
                slope_latents = alpha * sigma
                residual = slope * (guided - tl.fma(alpha, eps, -(sigma * z)))
            elif PREDICTION_TYPE == "sample":
                slope_latents = alpha / sigma
                slope = -slope_latents
                residual = slope * (guided - z)
            else:
                residual = slope * (guided - (eps - z))
            residual = tl.where(mask, residual, 0.0)
            if GROUP == 1:
                squares = tl.fma(residual, residual, squares)
            else:
                square = tl.sum(tl.reshape(residual * residual, [SUMS, TILE // SUMS]), axis=1)
                squares += tl.where(draw[:, None] == index, square[None, :], 0.0)
            if grad is not None:
                grad_row = image * grad_batch_stride + (row - image * draws) * grad_draw_stride
                upstream = tl.load(grad + grad_row).to(COMPUTE) * tl.load(weight + row).to(COMPUTE)
                if JACOBIAN == "skip":
                    in_latents = tl.fma(upstream, residual, in_latents)
                    in_guided = tl.zeros([TILE], COMPUTE)
                else:
                    in_guided = (upstream * to_mean) * residual
                    if PREDICTION_TYPE != "epsilon":
                        in_latents = tl.fma(slope_latents, in_guided, in_latents)
                        in_guided = slope * in_guided
                if grad_prediction is not None:
                    text_share = in_guided
                    if uncond is not None:
                        text_share = scale * in_guided
                    tiles.store(grad_prediction + at, text_share, mask)
                if grad_uncond is not None:
                    tiles.store(grad_uncond + at, (1.0 - scale) * in_guided, mask)
        if grad_latents is not None:
            tiles.store(grad_latents + at_latents, in_latents, mask)
    if GROUP == 1:
        squares = squares[None, :]
    rows = first_row + draw
    weights = tl.load(weight + rows, mask=draw < count, other=0.0).to(COMPUTE)
    tl.store(loss + rows, weights * (tl.sum(squares, axis=1) / numel), mask=draw < count)


def sds_loss(
    loss: Tensor,  # [batch, draws]
    prediction: Tensor,  # [batch, draws, *latent]
    latents: Tensor,  # [batch, *latent]
    alpha_t: Tensor,  # [batch, draws]
    sigma_t: Tensor,  # [batch, draws]
    weight: Tensor,  # [batch, draws]
    seed: Tensor,  # [] or [1]
    prediction_type: str,
    uncond: Tensor | None,  # [batch, draws, *latent]
    guidance_scale: float,
    jacobian: str,
    batch_offset: int,
) -> None:
    """Fills `loss`."""
    _launch(
        (loss, None, None, None), None, prediction, latents, alpha_t, sigma_t, weight, seed,
        prediction_type, uncond, guidance_scale, jacobian, batch_offset,
    )  # fmt: skip


def sds_loss_backward(
    results: tuple[
        Tensor, ...
    ],  # loss and gradients in prediction, latents and uncond, each contiguous or channels-last
    grad: Tensor,  # [batch, draws]
    *arguments: Any,
) -> None:
    """Fills `results`; after the arguments of `sds_loss` comes `needs`, which says which gradients are wanted."""
    *arguments, needs = arguments
    loss, *gradients = results
    wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    _launch((loss, *wanted), grad, *arguments)


def _launch(
    results: tuple[Tensor | None, ...],
    grad: Tensor | None,
    prediction: Tensor,
    latents: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    weight: Tensor,
    seed: Tensor,
    prediction_type: str,
    uncond: Tensor | None,
    guidance_scale: float,
    jacobian: str,
    batch_offset: int,
) -> None:
    loss, grad_prediction, grad_latents, grad_uncond = results
    batch, draws = alpha_t.shape
    channels_last = tiles.is_channels_last(prediction if grad_prediction is None else grad_prediction)
    group = 1 if grad_latents is None else triton.next_power_of_2(max(draws, 1))
    one, several = (MAX_WARPS, ELEMENTS_PER_THREAD), (MAX_WARPS_FOR_SUMS, ELEMENTS_PER_THREAD_FOR_SUMS)
    options = tiles.launch_options(latents.shape[1:], channels_last, *(one if group == 1 else several))
    if group > 1:  # the assembler would rather spill a little than run fewer programs at a time
        options = {**options, "maxnreg": 255}
    threads = 32 * options["num_warps"]
    # A channels-last teacher often has contiguous latents, which the kernel reads where they lie.
    row_major = channels_last and latents.is_contiguous()
    with (
        torch.cuda.device_of(latents),
        tiles.written(grad_latents, channels_last and not row_major) as grad_latents,
        tiles.written(grad_uncond, channels_last) as grad_uncond,
    ):
        sds_loss_kernel[(batch * draws if grad_latents is None else batch,)](
            tiles.in_memory_order(prediction, channels_last),
            tiles.in_memory_order(latents, channels_last and not row_major),
            alpha_t.contiguous(), sigma_t.contiguous(), weight.contiguous(), seed,
            None if uncond is None else tiles.in_memory_order(uncond, channels_last),
            loss, grad, grad_prediction, grad_latents, grad_uncond,
            *((0, 0) if grad is None else grad.stride()), guidance_scale, draws, batch_offset,
            PREDICTION_TYPE=prediction_type, JACOBIAN=jacobian, LATENTS_ROW_MAJOR=row_major,
            GROUP=group, SUMS=min(threads, max(1, threads * REGISTERS_FOR_SUMS // group)), **options,
        )  # fmt: skip
