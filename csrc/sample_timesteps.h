// sample_timesteps: what a draw is, once for the CPU and CUDA. Integers, and float64 without fused multiply-add: every
// device draws the same timesteps.
#pragma once

#include "philox.h"

namespace fastsds {

enum class Strategy { kUniform, kStratified, kAntithetic, kImportance };

struct Range {
  int64_t first, span;
};

struct Drawn {
  int64_t t;
  double correction;
};

// A position in [0, bound), from a random word; bound < 2^31.
FASTSDS_INLINE int64_t position_of(uint32_t word, int64_t bound) {
  return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(bound)) >> 32);
}

FASTSDS_INLINE int64_t mirrored(int64_t index, uint32_t pairs_word, const Range& range) {
  const int64_t offset = position_of(pairs_word, range.span);
  return range.first + (index % 2 == 0 ? offset : range.span - 1 - offset);
}

FASTSDS_INLINE int64_t within_stratum(int64_t stratum, uint32_t word, int64_t count, const Range& range) {
  return range.first + (stratum * range.span + position_of(word, range.span)) / count;
}

// The inverse of `cdf` `[timesteps]`, which need not be normalised, at a random place of a stratum; with
// 1 / (span p(t)), p being the probability within the range.
template <typename T>
FASTSDS_INLINE Drawn by_mass(int64_t stratum, uint32_t word, int64_t count, const T* cdf, int64_t timesteps,
                             const Range& range) {
  const int64_t end = range.first + range.span;
  const double below = range.first > 0 ? static_cast<double>(cdf[range.first - 1]) : 0.0;
  const double mass = static_cast<double>(cdf[end - 1]) - below;
  const double place = static_cast<double>(stratum) + static_cast<double>(word) * 0x1p-32;
  const double wanted = below + place / static_cast<double>(count) * mass;
  // The first timestep whose cdf exceeds `wanted`, by halving without a branch, which no processor could predict.
  int64_t t = 0;
  for (int64_t length = timesteps; length > 0;) {
    const int64_t half = (length + 1) / 2;
    t += half * static_cast<int64_t>(!(static_cast<double>(cdf[t + half - 1]) > wanted));
    length -= half;
  }
  t = t < range.first ? range.first : t > end - 1 ? end - 1 : t;
  const double before = t > 0 ? static_cast<double>(cdf[t - 1]) : 0.0;
  const double own = static_cast<double>(cdf[t]) - before;
  return {t, mass / (static_cast<double>(range.span) * own)};
}

}  // namespace fastsds
