#include "vectorized.h"

#include <algorithm>

#include "clones.h"

#if defined(FASTSDS_X86_CLONES)
#include <immintrin.h>
#define FASTSDS_FOR(target_name) __attribute__((target(target_name)))
#else
#define FASTSDS_FOR(target_name)
#endif

namespace fastsds {
namespace {

// The block's index in two words, so that the loop has no 64-bit arithmetic.
FASTSDS_INLINE void words_of_blocks(uint64_t seed, uint64_t first_block, int64_t blocks, Stream stream, uint32_t* out) {
  const uint32_t first_low = static_cast<uint32_t>(first_block), first_high = static_cast<uint32_t>(first_block >> 32);
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int64_t i = 0; i < blocks; ++i) {
    const uint32_t low = first_low + static_cast<uint32_t>(i), carry = low < first_low ? 1 : 0;
    const Words words = philox4x32(low, first_high + carry, 0, stream, k0, k1);
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = words.lane[lane];
  }
}

template <typename T>
FASTSDS_INLINE void mix_each(T alpha, const T* z, T sigma, const float* eps, int64_t count, T* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = alpha * z[i] + sigma * static_cast<T>(eps[i]);
}

template <typename T>
FASTSDS_INLINE void guide_each(const T* text, const T* uncond, T scale, int64_t count, T* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = uncond[i] + scale * (text[i] - uncond[i]);
}

template <typename T>
FASTSDS_INLINE void scale_each(T factor, const T* x, int64_t count, T* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = factor * x[i];
}

template <typename T>
FASTSDS_INLINE void accumulate_each(T factor, const T* x, int64_t count, T* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += factor * x[i];
}

template <bool has_eps, bool has_z, typename T>
FASTSDS_INLINE T residual_at(int64_t i, const T* guided, const float* eps, T a, const T* z, T b, T slope) {
  if constexpr (has_eps && has_z) {
    return slope * (guided[i] - (a * static_cast<T>(eps[i]) + b * z[i]));
  } else if constexpr (has_eps) {
    return slope * (guided[i] - a * static_cast<T>(eps[i]));
  } else {
    return slope * (guided[i] - b * z[i]);
  }
}

// The sum runs in lanes, in an order that the compiler need not change to vectorise it.
template <bool has_eps, bool has_z, typename T>
FASTSDS_INLINE T residual_each(const T* guided, const float* eps, T a, const T* z, T b, T slope, T factor,
                               int64_t count, T* __restrict out) {
  constexpr int64_t kLanes = 32;
  T sums[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t first = 0; first < whole; first += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const T value = residual_at<has_eps, has_z>(first + lane, guided, eps, a, z, b, slope);
      out[first + lane] = factor * value;
      sums[lane] += value * value;
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    const T value = residual_at<has_eps, has_z>(i, guided, eps, a, z, b, slope);
    out[i] = factor * value;
    sums[i - whole] += value * value;
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

template <typename T>
FASTSDS_INLINE T residual_any(const T* guided, const float* eps, T a, const T* z, T b, T slope, T factor, int64_t count,
                              T* out) {
  if (z == nullptr) return residual_each<true, false>(guided, eps, a, z, b, slope, factor, count, out);
  if (eps == nullptr) return residual_each<false, true>(guided, eps, a, z, b, slope, factor, count, out);
  return residual_each<true, true>(guided, eps, a, z, b, slope, factor, count, out);
}

FASTSDS_FOR("default")
void philox_words(uint64_t seed, uint64_t first_block, int64_t blocks, Stream stream, uint32_t* out) {
  words_of_blocks(seed, first_block, blocks, stream, out);
}

#if defined(FASTSDS_X86_CLONES)
// By hand, because compilers do not find that a counter word may keep rubbish in the upper half of a 64-bit lane, which
// the 32 x 32-bit product does not read: no shuffles within the rounds.
FASTSDS_FOR("arch=x86-64-v3")
void philox_words(uint64_t seed, uint64_t first_block, int64_t blocks, Stream stream, uint32_t* out) {
  const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53u), multiplier1 = _mm256_set1_epi64x(0xCD9E8D57u);
  const int64_t whole = blocks - blocks % 4;
  for (int64_t i = 0; i < whole; i += 4) {
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(first_block + i), _mm256_set_epi64x(3, 2, 1, 0));
    __m256i c1 = _mm256_srli_epi64(c0, 32), c2 = _mm256_setzero_si256(), c3 = _mm256_set1_epi64x(stream);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m256i product0 = _mm256_mul_epu32(c0, multiplier0), product1 = _mm256_mul_epu32(c2, multiplier1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1), _mm256_set1_epi64x(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3), _mm256_set1_epi64x(k1));
      c1 = product1;
      c3 = product0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const __m256i front = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i back = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(front, back), odd = _mm256_unpackhi_epi64(front, back);
    __m256i* to = reinterpret_cast<__m256i*>(out + 4 * i);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }
  words_of_blocks(seed, first_block + whole, blocks - whole, stream, out + 4 * whole);
}

// Four chains at a time, because each waits for its own multiplications.
FASTSDS_FOR("arch=x86-64-v4")
void philox_words(uint64_t seed, uint64_t first_block, int64_t blocks, Stream stream, uint32_t* out) {
  constexpr int kChains = 4, kStep = 8 * kChains;
  const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53u), multiplier1 = _mm512_set1_epi64(0xCD9E8D57u);
  const __m512i lower = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0),
                upper = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  const __m512i steps = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), high = _mm512_set1_epi64(first_block >> 32);
  __m512i k0[10], k1[10];
  for (uint32_t round = 0; round < 10; ++round) {
    k0[round] = _mm512_set1_epi64(static_cast<uint32_t>(seed) + round * 0x9E3779B9u);
    k1[round] = _mm512_set1_epi64(static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u);
  }
  // The upper word of the index is one for all blocks, so that the first rounds are partly one for all.
  const bool is_one = (first_block + blocks) >> 32 == first_block >> 32;
  const int64_t whole = is_one ? blocks - blocks % kStep : 0;
  for (int64_t i = 0; i < whole; i += kStep) {
    __m512i c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    for (int chain = 0; chain < kChains; ++chain) {
      c0[chain] = _mm512_add_epi64(_mm512_set1_epi64(first_block + i + 8 * chain), steps);
      c1[chain] = high;
      c2[chain] = _mm512_setzero_si512();
      c3[chain] = _mm512_set1_epi64(stream);
    }
    for (int round = 0; round < 10; ++round) {
      for (int chain = 0; chain < kChains; ++chain) {
        const __m512i product0 = _mm512_mul_epu32(c0[chain], multiplier0);
        const __m512i product1 = _mm512_mul_epu32(c2[chain], multiplier1);
        c0[chain] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[chain], k0[round], 0x96);
        c2[chain] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[chain], k1[round], 0x96);
        c1[chain] = product1;
        c3[chain] = product0;
      }
    }
    for (int chain = 0; chain < kChains; ++chain) {
      const __m512i front = _mm512_mask_blend_epi32(0xAAAA, c0[chain], _mm512_slli_epi64(c1[chain], 32));
      const __m512i back = _mm512_mask_blend_epi32(0xAAAA, c2[chain], _mm512_slli_epi64(c3[chain], 32));
      uint32_t* to = out + 4 * (i + 8 * chain);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi64(front, lower, back));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(front, upper, back));
    }
  }
  words_of_blocks(seed, first_block + whole, blocks - whole, stream, out + 4 * whole);
}
#endif

// Never faults, wherever it points.
FASTSDS_INLINE void prefetch([[maybe_unused]] const char* line) {
#if defined(__GNUC__)
  __builtin_prefetch(line);
#endif
}

FASTSDS_INLINE void normals_each(const uint32_t* words, int64_t pairs, float* __restrict out) {
  for (int64_t i = 0; i < pairs; ++i) {
    const Pair pair = box_muller(words[2 * i], words[2 * i + 1]);
    out[2 * i] = pair.first;
    out[2 * i + 1] = pair.second;
  }
}

// Each step asks for a share of every region, about as many cache lines as can be on their way at a time. The last ones
// may lie past its end.
FASTSDS_CLONES
void normals_of_words(const uint32_t* words, int64_t pairs, float* out, const Region* soon, int64_t regions) {
  constexpr int64_t kStep = 64, kLine = 64;
  const int64_t steps = pairs / kStep;
  for (int64_t step = 0; step < steps; ++step) {
    for (const Region* region = soon; region != soon + regions; ++region) {
      const int64_t share = region->bytes / steps;
      for (int64_t byte = 0; byte < share; byte += kLine) prefetch(region->begin + step * share + byte);
    }
    normals_each(words + 2 * kStep * step, kStep, out + 2 * kStep * step);
  }
  const int64_t done = steps * kStep;
  normals_each(words + 2 * done, pairs - done, out + 2 * done);
}

}  // namespace

void random_words(uint64_t seed, uint64_t first_block, int64_t blocks, Stream stream, uint32_t* out) {
  philox_words(seed, first_block, blocks, stream, out);
}

void normals(uint64_t seed, uint64_t first_block, int64_t blocks, float* out, std::initializer_list<Region> soon) {
  uint32_t words[kBlock];
  for (int64_t done = 0; done < blocks; done += kBlock / 4) {
    const int64_t now = std::min(blocks - done, kBlock / 4);
    philox_words(seed, first_block + done, now, kNoiseStream, words);
    normals_of_words(words, 2 * now, out + 4 * done, soon.begin(), done == 0 ? soon.size() : 0);
  }
}

#define FASTSDS_DEFINE(T)                                                                                              \
  FASTSDS_CLONES void mix(T alpha, const T* z, T sigma, const float* eps, int64_t count, T* out) {                     \
    mix_each(alpha, z, sigma, eps, count, out);                                                                        \
  }                                                                                                                    \
  FASTSDS_CLONES void guide(const T* text, const T* uncond, T scale, int64_t count, T* out) {                          \
    guide_each(text, uncond, scale, count, out);                                                                       \
  }                                                                                                                    \
  FASTSDS_CLONES T residual(const T* guided, const float* eps, T a, const T* z, T b, T slope, T factor, int64_t count, \
                            T* out) {                                                                                  \
    return residual_any(guided, eps, a, z, b, slope, factor, count, out);                                              \
  }                                                                                                                    \
  FASTSDS_CLONES void scale(T factor, const T* x, int64_t count, T* out) { scale_each(factor, x, count, out); }        \
  FASTSDS_CLONES void accumulate(T factor, const T* x, int64_t count, T* sum) {                                        \
    accumulate_each(factor, x, count, sum);                                                                            \
  }

FASTSDS_DEFINE(float)
FASTSDS_DEFINE(double)

}  // namespace fastsds
