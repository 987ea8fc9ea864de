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
    """`sqrt(-2 log u) * (cos 2 pi v, sin 2 pi v)`.

    The angle is reduced in turns, which is exact; the library's functions reduce radians, on the stack when those
    are large. The polynomials in the quarter turn's remainder, in [-1/2, 1/2], are minimax fits, good to float32.
    """
    radius = tl.sqrt(-2.0 * tl.log(_uniform(first)))
    quarters = _uniform(second) * 4.0
    shifted = quarters + 12582912.0  # 1.5 * 2**23: the sum is rounded to an integer, which its low bits hold
    quadrant = shifted.to(tl.int32, bitcast=True)
    rest = quarters - (shifted - 12582912.0)
    square = rest * rest
    sine = tl.fma(square, tl.fma(square, -0.004601657848, 0.07968003276), -0.6459634602)
    sine = rest * tl.fma(square, sine, 1.570796322)
    cosine = tl.fma(square, tl.fma(square, 9.067033147e-4, -0.0208615146), 0.2536694091)
    cosine = tl.fma(square, tl.fma(square, cosine, -1.233700549), 1.0)
    odd = (quadrant & 1) != 0
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    y = tl.where((quadrant & 2) != 0, -y, y)
    return radius * x, radius * y


@triton.jit
def _uniform(word):
    """(word + 1/2) / 2**32, the word first rounded to float32."""
    return tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)
