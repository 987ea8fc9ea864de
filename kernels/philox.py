"""The noise contract of `fastsds.ops.philox` in Triton: the same words bit for bit, the same normals to a few ulp.

Rounds are written out on 32-bit words, because `tl.rand` has no fourth counter word and changes with Triton.
"""

import triton
import triton.language as tl


@triton.jit
def words(seed, block, stream: tl.constexpr):
    """The four uint32 words of Philox4x32-10 for int64 counters `block` under an int64 `seed`."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0) + stream
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # A 64-bit product gives both words in one instruction.
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (second >> 32).to(tl.uint32) ^ c1 ^ k0, (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = second.to(tl.uint32), first.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normals(seed, block):
    """The four standard normals of every counter of the noise stream, float32, one tensor per lane."""
    first, second, third, fourth = words(seed, block, 0)
    n0, n1 = _box_muller(first, second)
    n2, n3 = _box_muller(third, fourth)
    return n0, n1, n2, n3


@triton.jit
def normal(seed, element):
    """The standard normal of every element of the noise, float32: a whole counter for each, so any order will do."""
    first, second, third, fourth = words(seed, element // 4, 0)
    lane = element % 4
    cosine, sine = _box_muller(tl.where(lane < 2, first, third), tl.where(lane < 2, second, fourth))
    return tl.where(lane % 2 == 0, cosine, sine)


@triton.jit
def _box_muller(first, second):
    """`sqrt(-2 log u) * (cos 2 pi v, sin 2 pi v)`, u and v the uniforms of two words."""
    # Whole half turns are taken off v exactly, and each turns the signs of both.
    angle = second.to(tl.float32)
    shifted = tl.fma(angle, 2.0**-31, 12582912.0)  # 1.5 * 2**23: rounded to an integer, which its low bits hold
    rest = tl.fma(angle, 2.0**-31, 12582912.0 - shifted)
    sign = shifted.to(tl.int32, bitcast=True) << 31
    radius = tl.sqrt(_minus_twice_log(_uniform(first)))
    radius = (radius.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    # Minimax polynomials of cos and sin of pi times the rest, in [-1/2, 1/2].
    square = rest * rest
    cosine = tl.fma(square, tl.fma(square, 0.22008065, -1.33209386), 4.05845134)
    cosine = tl.fma(square, tl.fma(square, cosine, -4.93479552), 1.0)
    sine = tl.fma(square, tl.fma(square, 0.07765941, -0.59829216), 2.55007766)
    sine = tl.fma(square, tl.fma(square, sine, -5.16771009), 3.14159264) * rest
    return radius * cosine, radius * sine


@triton.jit
def _minus_twice_log(u):
    """`-2 log u` for u in (0, 1]: u is 2**e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), and log(1 + f) / f a polynomial."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000  # e * 2**23
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, tl.fma(f, 0.20213768, -0.32445152), 0.34501663)
    p = tl.fma(f, tl.fma(f, p, -0.39800332), 0.49939818)
    p = tl.fma(f, tl.fma(f, p, -0.66670118), 1.0000073)
    p = tl.fma(f, p, -1.9999999)
    return tl.fma(exponent.to(tl.float32), -1.38629436 * 2.0**-23, p * f)


@triton.jit
def _uniform(word):
    """(word + 1/2) / 2**32, the word first rounded to float32."""
    return tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)
