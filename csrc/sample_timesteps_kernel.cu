// sample_timesteps on CUDA: one launch, the seed read on the device. Compiled without fused multiply-add.
#include "sample_timesteps_cuda.h"

namespace fastsds {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 4 * kThreads;  // words that a block of threads makes at a time

// The place of `image` when the batch is sorted by the order words of a part: how many are smaller, or equal and
// before it. All threads of the block are in the same part.
__device__ int64_t place_of(uint64_t seed, int64_t part, int64_t image, int64_t batch) {
  __shared__ uint32_t tile[kTile];
  const uint64_t first = static_cast<uint64_t>(part) * batch;
  const uint32_t own = random_word(seed, first + image, kOrderStream);
  // The part's words begin within a block of four.
  const uint64_t first_block = first / 4;
  const int64_t skipped = static_cast<int64_t>(first % 4);
  int64_t place = 0;
  for (int64_t start = 0; start < skipped + batch; start += kTile) {
    const Words words = random_block(seed, first_block + start / 4 + threadIdx.x, kOrderStream);
    for (int lane = 0; lane < 4; ++lane) tile[4 * threadIdx.x + lane] = words.lane[lane];
    __syncthreads();
    const int64_t other = start - skipped, begin = other < 0 ? -other : 0;
    const int64_t end = batch - other < kTile ? batch - other : kTile;
    for (int64_t i = begin; i < end; ++i) place += tile[i] < own || (tile[i] == own && other + i < image);
    __syncthreads();
  }
  return place;
}

__device__ double at(const void* table, bool is_double, int64_t t) {
  return is_double ? static_cast<const double*>(table)[t] : static_cast<const float*>(table)[t];
}

__device__ void put(void* out, bool is_double, int64_t index, double value) {
  if (is_double) {
    static_cast<double*>(out)[index] = value;
  } else {
    static_cast<float*>(out)[index] = static_cast<float>(value);
  }
}

template <typename T>
__device__ Drawn by_mass(int64_t stratum, uint32_t word, int64_t count, const T* cdf, int64_t timesteps,
                         const Range& range) {
  const Mass mass = mass_of(cdf, range.first, range.first + range.span);
  const double wanted = quantile(stratum, word, count, mass);
  int64_t t = 0;
  for (int64_t length = timesteps; length > 0; length /= 2) t = moved(t, (length + 1) / 2, cdf, wanted);
  return drawn_at(t, cdf, mass, range);
}

// A block of threads serves kThreads images in one part of the range, each of them with the draw that falls there.
template <Strategy strategy>
__global__ void sample(Tables tables, Draws out, int64_t batch, int64_t draws, const int64_t* seed_on_device,
                       Range range, const void* cdf, bool double_cdf, int64_t timesteps) {
  constexpr bool stratified = strategy == Strategy::kStratified || strategy == Strategy::kImportance;
  const int64_t tiles = (batch + kThreads - 1) / kThreads, count = batch * draws;
  const uint64_t seed = static_cast<uint64_t>(*seed_on_device);
  const int64_t part = blockIdx.x / tiles, image = blockIdx.x % tiles * kThreads + threadIdx.x;
  int64_t draw = part, stratum = 0;
  if (stratified) {
    stratum = part * batch + place_of(seed, part, image, batch);  // before the return: the block synchronises
    draw -= position_of(random_word(seed, image, kRotationStream), draws);
    if (draw < 0) draw += draws;
  }
  if (image >= batch) return;
  const int64_t index = image * draws + draw;
  const uint64_t word_index = strategy == Strategy::kAntithetic ? index / 2 : index;
  const uint32_t jitter = random_word(seed, word_index, kJitterStream);
  Drawn drawn{0, 1.0};
  if (strategy == Strategy::kUniform) {
    drawn.t = range.first + position_of(jitter, range.span);
  } else if (strategy == Strategy::kAntithetic) {
    drawn.t = mirrored(index, jitter, range);
  } else if (strategy == Strategy::kStratified) {
    drawn.t = within_stratum(stratum, jitter, count, range);
  } else if (double_cdf) {
    drawn = by_mass(stratum, jitter, count, static_cast<const double*>(cdf), timesteps, range);
  } else {
    drawn = by_mass(stratum, jitter, count, static_cast<const float*>(cdf), timesteps, range);
  }
  out.t[index] = drawn.t;
  put(out.alpha, tables.double_alpha, index, at(tables.alpha, tables.double_alpha, drawn.t));
  put(out.sigma, tables.double_sigma, index, at(tables.sigma, tables.double_sigma, drawn.t));
  const double weight = at(tables.weights, tables.double_weights, drawn.t);
  put(out.weight, tables.double_weights, index, strategy == Strategy::kImportance ? weight * drawn.correction : weight);
}

}  // namespace

cudaError_t launch_sample_timesteps(Strategy strategy, const Tables& tables, const Draws& out, int64_t batch,
                                    int64_t draws, const int64_t* seed, const Range& range, const void* cdf,
                                    bool double_cdf, int64_t timesteps, cudaStream_t stream) {
  const int64_t blocks = (batch + kThreads - 1) / kThreads * draws;
  if (blocks == 0) return cudaSuccess;
  const auto kernel = strategy == Strategy::kUniform      ? sample<Strategy::kUniform>
                      : strategy == Strategy::kAntithetic ? sample<Strategy::kAntithetic>
                      : strategy == Strategy::kStratified ? sample<Strategy::kStratified>
                                                          : sample<Strategy::kImportance>;
  kernel<<<static_cast<unsigned int>(blocks), kThreads, 0, stream>>>(tables, out, batch, draws, seed, range, cdf,
                                                                     double_cdf, timesteps);
  return cudaGetLastError();
}

}  // namespace fastsds
