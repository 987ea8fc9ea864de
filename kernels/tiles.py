"""What the kernels work on: tiles of one draw's elements that lie together in memory, and the noise of a tile.

Noise is numbered in row-major order (channels, height, width). A contiguous latent has its elements in that order; a
channels-last one has the channels of each pixel together, so that a tile of it holds a run of pixels of every channel.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds.kernels import philox

FOUR = tl.constexpr(4)  # elements in a row are one thread's: those of a counter of the noise


@triton.jit
def locate(numel, TILE: tl.constexpr):
    """The latent and the number of the tile in it that this program works on, int64."""
    program, count = tl.program_id(0), tl.cdiv(numel, TILE).to(tl.int32)  # a 64-bit division would cost a tile's noise
    return (program // count).to(tl.int64), (program % count).to(tl.int64)


@triton.jit
def offsets(tile, numel, FULL: tl.constexpr, TILE: tl.constexpr):
    """The places in memory of a tile's elements, and whether they lie within the latent; where `FULL`, all do."""
    offset = tl.max_contiguous(tile * TILE + tl.arange(0, TILE), FOUR)
    return offset, tl.full([TILE], True, tl.int1) if FULL else offset < numel


@triton.jit
def noise(
    seed, first, tile, pixels, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr, TILE: tl.constexpr
):
    """The normals of tile number `tile` of a draw, float32 `[TILE]`, in the order of memory.

    `first` is the draw's first element in the noise, `CHANNELS` 1 for a contiguous latent, all of whose elements are
    `pixels` then. What lies past the draw's end is to be masked.
    """
    if ALIGNED:  # every four pixels of a channel are one counter
        lane = tl.arange(0, TILE // 4)
        if CHANNELS == 1 and FULL:  # the tile's first counter is a multiple of their number: nothing is carried
            block = ((first >> 2) + tile * (TILE // 4)) | lane
        else:
            block = (first >> 2) + tile * (TILE // 4 // CHANNELS) + lane // CHANNELS + lane % CHANNELS * (pixels // 4)
        n0, n1, n2, n3 = philox.normals(seed, block)
        four = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # [TILE // 4, 2, 2]
        if CHANNELS > 1:
            four = tl.trans(tl.reshape(four, [TILE // 4 // CHANNELS, CHANNELS, 4]), 0, 2, 1)
        return tl.reshape(four, [TILE])
    offset = tile * TILE + tl.arange(0, TILE)
    return philox.normal(seed, first + row_major(offset, pixels, CHANNELS))


@triton.jit
def row_major(offset, pixels, CHANNELS: tl.constexpr):
    """The number in row-major order of the element at `offset` in memory."""
    if CHANNELS == 1:
        return offset
    return offset % CHANNELS * pixels + offset // CHANNELS


@triton.jit
def store(pointer, value, mask):
    """Rounds to the type of `pointer`; float64 goes through float32 to the 16-bit types, as in PyTorch."""
    if pointer.dtype.element_ty != value.dtype:
        value = value.to(tl.float32).to(pointer.dtype.element_ty)
    tl.store(pointer, value, mask=mask)


def in_memory_order(tensor: Tensor, channels_last: bool) -> Tensor:
    """`tensor` as a contiguous one, with the channels last where asked; a copy only where it does not lie so."""
    return (tensor.movedim(-3, -1) if channels_last else tensor).contiguous()


@contextlib.contextmanager
def written(result: Tensor | None, channels_last: bool) -> Iterator[Tensor | None]:
    """What a kernel is to fill in that order for `result` to be filled: `result` itself where it lies so."""
    ordered = result.movedim(-3, -1) if result is not None and channels_last else result
    if ordered is None or ordered.is_contiguous():
        yield ordered
    else:
        buffer = torch.empty_like(ordered, memory_format=torch.contiguous_format)
        yield buffer
        ordered.copy_(buffer)


def is_channels_last(tensor: Tensor) -> bool:
    """A dense `[…, channels, height, width]` tensor whose channels lie together, and that is not contiguous as well."""
    return tensor.dim() >= 4 and not tensor.is_contiguous() and tensor.movedim(-3, -1).is_contiguous()


@functools.lru_cache(maxsize=1024)  # a launch of a small batch takes no longer than this does
def launch_options(
    latent: tuple[int, ...], channels_last: bool, max_warps: int, elements_per_thread: int
) -> Mapping[str, Any]:
    """The arguments of a launch that follow from the shape of one latent; no noise depends on the last two."""
    numel, channels = math.prod(latent), latent[0] if channels_last else 1
    pixels = numel // channels
    fours = pixels % 4 == 0 and channels.bit_count() == 1
    # Without fours every element makes a counter of its own: more of them than four would not fit the registers.
    per_warp = 32 * (elements_per_thread if fours else 4)
    warps = min(max_warps, triton.next_power_of_2(max(1, triton.cdiv(numel, per_warp))))
    tile = warps * per_warp
    aligned = fours and 4 * channels <= tile
    return {
        "numel": numel, "pixels": pixels, "CHANNELS": channels, "ALIGNED": aligned, "FULL": numel % tile == 0,
        "TILE": tile, "num_warps": warps,
        "enable_fp_fusion": False,  # sums and products are fused where a kernel says so, in all its variants alike
    }  # fmt: skip
