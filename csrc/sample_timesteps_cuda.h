// The launch of sample_timesteps on CUDA, in plain pointers, so that the kernels compile without PyTorch's headers.
#pragma once

#include <cuda_runtime_api.h>

#include "sample_timesteps.h"

namespace fastsds {

struct Tables {
  const void *alpha, *sigma, *weights;
  bool double_alpha, double_sigma, double_weights;
};

struct Draws {
  int64_t* t;
  void *alpha, *sigma, *weight;
};

// `cdf` `[timesteps]` is read for importance only.
cudaError_t launch_sample_timesteps(Strategy strategy, const Tables& tables, const Draws& out, int64_t batch,
                                    int64_t draws, const int64_t* seed, const Range& range, const void* cdf,
                                    bool double_cdf, int64_t timesteps, cudaStream_t stream);

}  // namespace fastsds
