// The parts of the contract that several ops share (fastsds/ops/_checks.py), for the plain case: dense tensors on the
// CPU. Nothing is explained here; what is not plain, or not right, is left to Python.
#pragma once

#include <ATen/ATen.h>

namespace fastsds {

inline bool is_seed(const at::Tensor& seed) {
  return seed.is_cpu() && seed.scalar_type() == at::kLong && seed.numel() == 1;
}

inline bool is_coefficient_dtype(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kDouble; }

inline bool is_latent_dtype(at::ScalarType dtype) {
  return is_coefficient_dtype(dtype) || dtype == at::kHalf || dtype == at::kBFloat16;
}

inline bool is_plain(const at::Tensor& tensor) {
  return tensor.is_cpu() && is_latent_dtype(tensor.scalar_type()) && tensor.is_contiguous() && tensor.numel() > 0;
}

// `[batch, draws]` coefficients.
template <typename... Others>
bool are_coefficients(int64_t batch, const at::Tensor& first, const Others&... others) {
  const auto fits = [&](const at::Tensor& tensor) {
    return tensor.is_cpu() && is_coefficient_dtype(tensor.scalar_type()) && tensor.sizes() == first.sizes();
  };
  return first.dim() == 2 && first.size(0) == batch && fits(first) && (fits(others) && ...);
}

// `[batch, draws, *latent]` for `[batch, draws]` coefficients and `[batch, *latent]` latents.
inline bool has_shape_of_draws(const at::Tensor& tensor, const at::Tensor& coefficient, const at::Tensor& latents) {
  return tensor.dim() == latents.dim() + 1 && tensor.sizes().slice(0, 2) == coefficient.sizes() &&
         tensor.sizes().slice(2) == latents.sizes().slice(1);
}

}  // namespace fastsds
