#include "vectorized.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FASTSDS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTSDS_CLONES
#endif

namespace fastsds {
namespace {

// The block's index in two words, without 64-bit arithmetic in the loop.
FASTSDS_INLINE Words block_at(uint64_t seed, uint64_t first_block, int64_t offset, Stream stream) {
  const uint32_t first_low = static_cast<uint32_t>(first_block), first_high = static_cast<uint32_t>(first_block >> 32);
  const uint32_t low = first_low + static_cast<uint32_t>(offset), carry = low < first_low ? 1 : 0;
  return philox4x32(low, first_high + carry, 0, stream, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
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
FASTSDS_INLINE T residual_each(const T* guided, const float* eps, T a, const T* z, T b, T slope, int64_t count,
                               T* __restrict out) {
  constexpr int64_t kLanes = 32;
  T sums[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t first = 0; first < whole; first += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const T value = residual_at<has_eps, has_z>(first + lane, guided, eps, a, z, b, slope);
      out[first + lane] = value;
      sums[lane] += value * value;
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    out[i] = residual_at<has_eps, has_z>(i, guided, eps, a, z, b, slope);
    sums[i - whole] += out[i] * out[i];
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

template <typename T>
FASTSDS_INLINE T residual_any(const T* guided, const float* eps, T a, const T* z, T b, T slope, int64_t count, T* out) {
  if (z == nullptr) return residual_each<true, false>(guided, eps, a, z, b, slope, count, out);
  if (eps == nullptr) return residual_each<false, true>(guided, eps, a, z, b, slope, count, out);
  return residual_each<true, true>(guided, eps, a, z, b, slope, count, out);
}

}  // namespace

FASTSDS_CLONES
void random_words(uint64_t seed, uint64_t first_block, int64_t blocks, Stream stream, uint32_t* out) {
  for (int64_t i = 0; i < blocks; ++i) {
    const Words words = block_at(seed, first_block, i, stream);
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = words.lane[lane];
  }
}

FASTSDS_CLONES
void normals(uint64_t seed, uint64_t first_block, int64_t blocks, float* out) {
  for (int64_t i = 0; i < blocks; ++i) {
    const Words words = block_at(seed, first_block, i, kNoiseStream);
    const Pair first = box_muller(words.lane[0], words.lane[1]), second = box_muller(words.lane[2], words.lane[3]);
    out[4 * i] = first.first;
    out[4 * i + 1] = first.second;
    out[4 * i + 2] = second.first;
    out[4 * i + 3] = second.second;
  }
}

#define FASTSDS_DEFINE(T)                                                                                              \
  FASTSDS_CLONES void mix(T alpha, const T* z, T sigma, const float* eps, int64_t count, T* out) {                     \
    mix_each(alpha, z, sigma, eps, count, out);                                                                        \
  }                                                                                                                    \
  FASTSDS_CLONES void guide(const T* text, const T* uncond, T scale, int64_t count, T* out) {                          \
    guide_each(text, uncond, scale, count, out);                                                                       \
  }                                                                                                                    \
  FASTSDS_CLONES T residual(const T* guided, const float* eps, T a, const T* z, T b, T slope, int64_t count, T* out) { \
    return residual_any(guided, eps, a, z, b, slope, count, out);                                                      \
  }                                                                                                                    \
  FASTSDS_CLONES void scale(T factor, const T* x, int64_t count, T* out) { scale_each(factor, x, count, out); }        \
  FASTSDS_CLONES void accumulate(T factor, const T* x, int64_t count, T* sum) {                                        \
    accumulate_each(factor, x, count, sum);                                                                            \
  }

FASTSDS_DEFINE(float)
FASTSDS_DEFINE(double)

}  // namespace fastsds
