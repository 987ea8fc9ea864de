// Counter-based random numbers, the same on every device: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller.
//
// Element n takes lane n % 4 of block n / 4 of its stream, under the key `seed`. The counter of a block is its 64-bit
// index in the first two words, 0, and the stream.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTSDS_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FASTSDS_INLINE inline __attribute__((always_inline))
#else
#define FASTSDS_INLINE inline
#endif

namespace fastsds {

enum Stream : uint32_t { kNoiseStream, kJitterStream, kOrderStream, kRotationStream };

struct Words {
  uint32_t lane[4];
};

struct Pair {
  float first, second;
};

FASTSDS_INLINE uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

FASTSDS_INLINE Words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = high_product(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

FASTSDS_INLINE Words random_block(uint64_t seed, uint64_t block, Stream stream) {
  return philox4x32(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, stream,
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

FASTSDS_INLINE uint32_t random_word(uint64_t seed, uint64_t index, Stream stream) {
  return random_block(seed, index / 4, stream).lane[index % 4];
}

FASTSDS_INLINE int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTSDS_INLINE float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// (word + 1/2) / 2^32, the word first rounded to float: in (0, 1], so that its logarithm is finite. The halves make
// the conversion signed, which every instruction set has, and their sum rounds once.
FASTSDS_INLINE float uniform(uint32_t word) {
  const float rounded = static_cast<float>(static_cast<int32_t>(word >> 16)) * 65536.0f +
                        static_cast<float>(static_cast<int32_t>(word & 0xFFFFu));
  return rounded * 0x1p-32f + 0x1p-33f;
}

// ln(u) for u in (0, 1], to about an ulp at both ends: u = 2^e m with m in [sqrt(1/2), sqrt(2)), and a minimax
// polynomial in m - 1.
FASTSDS_INLINE float natural_log(float u) {
  const int32_t bits = bits_of(u);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f = float_of(bits - exponent * (1 << 23)) - 1.0f;
  float p = -0.07634497f;
  p = p * f + 0.12761576f;
  p = p * f - 0.13160183f;
  p = p * f + 0.14201757f;
  p = p * f - 0.16623357f;
  p = p * f + 0.20001227f;
  p = p * f - 0.2500082f;
  p = p * f + 0.3333333f;
  const float square = f * f, e = static_cast<float>(exponent);
  // ln 2 in two parts, the first of which has room for the exponent's bits.
  return e * 0.693359375f + (f + (square * (f * p - 0.5f) - e * 2.12194440e-4f));
}

// cos and sin of a full turn times u, for u in [0, 1]: the nearest quarter turn is taken off exactly.
FASTSDS_INLINE Pair turn(float u) {
  const int32_t quarter = static_cast<int32_t>(u * 4.0f + 0.5f);
  const float r = u - static_cast<float>(quarter) * 0.25f, q = r * r;
  const float sine = r * (6.2831855f + q * (-41.341663f + q * (81.592354f + q * -75.39356f)));
  const float cosine = 1.0f + q * (-19.739208f + q * (64.93932f + q * (-85.44374f + q * 59.245964f)));
  const bool odd = (quarter & 1) != 0;
  const int32_t cosine_sign = ((quarter + 1) & 2) << 30, sine_sign = (quarter & 2) << 30;
  return {float_of(bits_of(odd ? sine : cosine) ^ cosine_sign), float_of(bits_of(odd ? cosine : sine) ^ sine_sign)};
}

FASTSDS_INLINE Pair box_muller(uint32_t first, uint32_t second) {
  const float radius = std::sqrt(-2.0f * natural_log(uniform(first)));
  const Pair direction = turn(uniform(second));
  return {radius * direction.first, radius * direction.second};
}

}  // namespace fastsds
