// Counter-based random numbers, the same on every device: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller.
//
// Element n takes lane n % 4 of block n / 4 of its stream, under the key `seed`. The counter of a block is its 64-bit
// index in the first two words, 0, and the stream. Multiply-adds are `std::fma`, which rounds alike on every machine.
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

// (word + 1/2) / 2^32 times a power of two, the word first rounded to float: u in (0, 1], with a finite logarithm.
FASTSDS_INLINE float uniform(uint32_t word, float times = 1.0f) {
  return std::fma(static_cast<float>(word), times * 0x1p-32f, times * 0x1p-33f);
}

// -2 ln(u) for u in (0, 1], to 2e-7 of its value: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and a minimax
// polynomial for ln(1 + f).
FASTSDS_INLINE float minus_twice_log(float u) {
  const int32_t bits = bits_of(u), exponent = (bits - 0x3F3504F3) >> 23;
  const float f = float_of(bits - exponent * (1 << 23)) - 1.0f;
  float p = -0.1740087f;
  p = std::fma(p, f, 0.28534973f);
  p = std::fma(p, f, -0.29829538f);
  p = std::fma(p, f, 0.3315517f);
  p = std::fma(p, f, -0.39926127f);
  p = std::fma(p, f, 0.50002676f);
  p = std::fma(p, f, -0.6666782f);
  p = std::fma(p, f, 1.0f);
  p = std::fma(p, f, -2.0f);
  return std::fma(static_cast<float>(exponent), -1.3862944f, p * f);
}

// cos and sin of `half_turns` times pi, for half_turns in [0, 2]: whole half turns are taken off exactly and flip the
// signs; minimax polynomials for the rest, to 2e-7.
FASTSDS_INLINE Pair direction(float half_turns) {
  const int32_t whole = static_cast<int32_t>(half_turns + 0.5f);
  const float r = half_turns - static_cast<float>(whole), q = r * r;
  float cosine = -0.0244207f;
  cosine = std::fma(cosine, q, 0.23495393f);
  cosine = std::fma(cosine, q, -1.335216f);
  cosine = std::fma(cosine, q, 4.0587096f);
  cosine = std::fma(cosine, q, -4.934802f);
  cosine = std::fma(cosine, q, 1.0f);
  float sine = 0.07756039f;
  sine = std::fma(sine, q, -0.5982421f);
  sine = std::fma(sine, q, 2.5500698f);
  sine = std::fma(sine, q, -5.16771f);
  sine = std::fma(sine, q, 3.1415927f);
  sine = sine * r;
  const int32_t sign = static_cast<int32_t>(static_cast<uint32_t>(whole) << 31);
  return {float_of(bits_of(cosine) ^ sign), float_of(bits_of(sine) ^ sign)};
}

FASTSDS_INLINE Pair box_muller(uint32_t first, uint32_t second) {
  const float radius = std::sqrt(minus_twice_log(uniform(first)));
  const Pair unit = direction(uniform(second, 2.0f));
  return {radius * unit.first, radius * unit.second};
}

}  // namespace fastsds
