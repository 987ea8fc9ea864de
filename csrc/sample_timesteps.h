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

// The mass of a range of a `cdf` `[timesteps]`, which need not be normalised.
struct Mass {
  double below, own;
};

template <typename T>
FASTSDS_INLINE Mass mass_of(const T* cdf, int64_t first, int64_t end) {
  const double below = first > 0 ? static_cast<double>(cdf[first - 1]) : 0.0;
  return {below, static_cast<double>(cdf[end - 1]) - below};
}

// A random place of a stratum, in the mass of the range.
FASTSDS_INLINE double quantile(int64_t stratum, uint32_t word, int64_t count, const Mass& mass) {
  const double place = static_cast<double>(stratum) + static_cast<double>(word) * 0x1p-32;
  return mass.below + place / static_cast<double>(count) * mass.own;
}

// One step of the search for the first timestep whose cdf exceeds `wanted`: `t` moves over `half` timesteps that do
// not. Without a branch, which no processor could predict.
template <typename T>
FASTSDS_INLINE int64_t moved(int64_t t, int64_t half, const T* cdf, double wanted) {
  return t + (half & -static_cast<int64_t>(!(static_cast<double>(cdf[t + half - 1]) > wanted)));
}

// What was found, with 1 / (span p(t)), p being the probability within the range.
template <typename T>
FASTSDS_INLINE Drawn drawn_at(int64_t t, const T* cdf, const Mass& mass, const Range& range) {
  const int64_t end = range.first + range.span;
  t = t < range.first ? range.first : t > end - 1 ? end - 1 : t;
  return {t, mass.own / (static_cast<double>(range.span) * mass_of(cdf, t, t + 1).own)};
}

}  // namespace fastsds
