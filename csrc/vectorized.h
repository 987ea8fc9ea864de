// Loops over short, dense arrays: each is compiled for several instruction sets, and the machine's best is taken when
// the library is loaded. Multiply-adds are fused where they say so and nowhere else, so that every instruction set
// gives the same bits.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "philox.h"

namespace fastsds {

// Elements that are worked on at a time: a few such arrays fit the first-level cache. Sums are partitioned by it, and
// so do not depend on the number of threads.
constexpr int64_t kBlock = 2048;

// The words of `blocks` blocks of a stream: `out` has room for 4 * blocks.
void random_words(uint64_t seed, uint64_t first_block, int64_t blocks, Stream stream, uint32_t* out);

// Memory that is to be read or written.
struct Region {
  const char* begin = nullptr;
  int64_t bytes = 0;
};

// The standard normals of `blocks` blocks of the noise: `out` has room for 4 * blocks. Making them takes no memory
// traffic: what is used `soon` is fetched into the cache meanwhile.
void normals(uint64_t seed, uint64_t first_block, int64_t blocks, float* out, std::initializer_list<Region> soon);

// The loops that float and double latents share, in either type.
#define FASTSDS_DECLARE(T)                                                                                       \
  /* out = alpha z + sigma eps */                                                                                \
  void mix(T alpha, const T* z, T sigma, const float* eps, int64_t count, T* out);                               \
  /* out = uncond + scale (text - uncond) */                                                                     \
  void guide(const T* text, const T* uncond, T scale, int64_t count, T* out);                                    \
  /* out = factor r, r = slope (guided - (a eps + b z)) without the term whose array is null; returns sum r^2 */ \
  T residual(const T* guided, const float* eps, T a, const T* z, T b, T slope, T factor, int64_t count, T* out); \
  /* out = factor x */                                                                                           \
  void scale(T factor, const T* x, int64_t count, T* out);                                                       \
  /* sum += factor x */                                                                                          \
  void accumulate(T factor, const T* x, int64_t count, T* sum);

FASTSDS_DECLARE(float)
FASTSDS_DECLARE(double)
#undef FASTSDS_DECLARE

}  // namespace fastsds
