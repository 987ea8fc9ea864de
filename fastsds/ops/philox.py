"""Counter-based noise: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, in integer tensor arithmetic.

Element `n` takes lane `n % 4` of counter `n // 4` under key `seed`. The counter's first two words are `n // 4`, its
third is 0 and its fourth the stream, so that noise and timesteps drawn from one seed share no word. Every backend
computes the same words bit for bit and the same normals to a few ulp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NOISE_STREAM, JITTER_STREAM, ORDER_STREAM, ROTATION_STREAM = range(4)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on four counter words under two key words, each an int64 tensor of values in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: Tensor, count: int, stream: int) -> Tensor:
    """The first `count` 32-bit words of a stream, int64 `[count]` on the seed's device."""
    return torch.stack(_blocks(seed, 0, (count + 3) // 4, stream), dim=-1).flatten()[:count]


def normal(seed: Tensor, shape: Sequence[int], *, start: int = 0) -> Tensor:
    """Standard normals for the elements `start`, `start + 1`, … of the noise, float32 of `shape` in row-major order."""
    count = math.prod(shape)
    first_block, skipped = divmod(start, 4)
    blocks = _blocks(seed, first_block, (skipped + count + 3) // 4, NOISE_STREAM)
    first, second, third, fourth = (_uniform(lane) for lane in blocks)
    pairs = (*_box_muller(first, second), *_box_muller(third, fourth))
    return torch.stack(pairs, dim=-1).flatten()[skipped : skipped + count].reshape(tuple(shape))


def _blocks(seed: Tensor, first: int, count: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = torch.arange(count, dtype=torch.int64, device=seed.device) + first
    zero = torch.zeros_like(index)
    key = seed.reshape(())
    return philox4x32((index & _MASK, index >> 32, zero, zero + stream), (key & _MASK, (key >> 32) & _MASK))


def _multiply(value: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32-bit product, in 16-bit halves because int64 holds no 64-bit unsigned product."""
    low_part, high_part = value * (multiplier & 0xFFFF), value * (multiplier >> 16)
    high = (high_part + (low_part >> 16)) >> 16
    low = (low_part + ((high_part & 0xFFFF) << 16)) & _MASK
    return high, low


def _uniform(word: Tensor) -> Tensor:
    """(word + 1/2) / 2**32, the word first rounded to float32: in (0, 1], so that its logarithm is finite."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(first))
    angle = second * (2.0 * math.pi)
    return radius * torch.cos(angle), radius * torch.sin(angle)
