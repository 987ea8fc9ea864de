// sample_timesteps for CUDA tensors: results allocated, one kernel launched on the current stream, nothing waited for.
#include "sample_timesteps_cuda.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

namespace fastsds {
namespace {

Strategy strategy_of(std::string_view name) {
  if (name == "uniform") return Strategy::kUniform;
  if (name == "stratified") return Strategy::kStratified;
  return name == "antithetic" ? Strategy::kAntithetic : Strategy::kImportance;
}

bool is_double(const at::Tensor& tensor) { return tensor.scalar_type() == at::kDouble; }

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sample_timesteps(
    const at::Tensor& alpha, const at::Tensor& sigma, const at::Tensor& weights, int64_t batch, int64_t draws,
    const at::Tensor& seed, std::string_view strategy, int64_t t_min, int64_t t_max,
    const std::optional<at::Tensor>& cdf) {
  const c10::cuda::CUDAGuard guard(alpha.device());
  const at::Tensor alphas = alpha.contiguous(), sigmas = sigma.contiguous(), table = weights.contiguous();
  const at::Tensor mass = cdf.has_value() ? cdf->contiguous() : at::Tensor();
  const auto like = [&](const at::Tensor& tensor) { return at::empty({batch, draws}, tensor.options()); };
  const at::Tensor t = at::empty({batch, draws}, alpha.options().dtype(at::kLong));
  const at::Tensor alpha_t = like(alpha), sigma_t = like(sigma), weight = like(weights);
  const Tables tables{alphas.const_data_ptr(), sigmas.const_data_ptr(), table.const_data_ptr(),
                      is_double(alpha),        is_double(sigma),        is_double(weights)};
  const Draws out{t.mutable_data_ptr<int64_t>(), alpha_t.mutable_data_ptr(), sigma_t.mutable_data_ptr(),
                  weight.mutable_data_ptr()};
  C10_CUDA_CHECK(
      launch_sample_timesteps(strategy_of(strategy), tables, out, batch, draws, seed.const_data_ptr<int64_t>(),
                              {t_min, t_max - t_min}, mass.defined() ? mass.const_data_ptr() : nullptr,
                              mass.defined() && is_double(mass), alpha.numel(), c10::cuda::getCurrentCUDAStream()));
  return {t, alpha_t, sigma_t, weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastsds_native, CUDA, library) { library.impl("sample_timesteps", sample_timesteps); }

}  // namespace fastsds
