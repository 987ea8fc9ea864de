// add_noise and its backward on the CPU: one pass over the latents, the noise made on the way.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "elements.h"

namespace fastsds {
namespace {

template <typename T>
void add_noise_in(const at::Tensor& latents, const at::Tensor& alpha_t, const at::Tensor& sigma_t, uint64_t seed,
                  int64_t batch_offset, const at::Tensor& out) {
  const int64_t batch = alpha_t.size(0), draws = alpha_t.size(1);
  const Tasks tasks(batch, draws, batch > 0 ? latents.numel() / batch : 0);
  const at::Tensor alphas = coefficients<T>(alpha_t), sigmas = coefficients<T>(sigma_t);
  const T *alpha = alphas.const_data_ptr<T>(), *sigma = sigmas.const_data_ptr<T>();
  const Source<T> source(latents);
  Target<T> target(out);
  at::parallel_for(0, tasks.count, tasks.grain, [&](int64_t begin, int64_t end) {
    float noise_buffer[kNoiseBuffer];
    T in[kBlock], result[kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tasks.blocks, offset = task % tasks.blocks * kBlock;
      const int64_t count = std::min(kBlock, tasks.elements - offset);
      const T* z = source.read(image * tasks.elements + offset, count, in);
      for (int64_t draw = image * draws; draw < (image + 1) * draws; ++draw) {
        const int64_t first = draw * tasks.elements + offset;
        const float* eps = noise(seed, batch_offset * draws * tasks.elements + first, count, noise_buffer);
        T* made = target.place(first, result);
        mix(alpha[draw], z, sigma[draw], eps, count, made);
        target.write(first, count, made);
      }
    }
  });
  target.finish();
}

template <typename T>
void add_noise_backward_in(const at::Tensor& grad, const at::Tensor& alpha_t, const at::Tensor& out) {
  const int64_t batch = alpha_t.size(0), draws = alpha_t.size(1);
  const Tasks tasks(batch, draws, batch > 0 ? out.numel() / batch : 0);
  const at::Tensor alphas = coefficients<T>(alpha_t);
  const T* alpha = alphas.const_data_ptr<T>();
  const Source<T> source(grad);
  Target<T> target(out);
  at::parallel_for(0, tasks.count, tasks.grain, [&](int64_t begin, int64_t end) {
    T in[kBlock], result[kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tasks.blocks, offset = task % tasks.blocks * kBlock;
      const int64_t count = std::min(kBlock, tasks.elements - offset), first = image * tasks.elements + offset;
      T* sum = target.place(first, result);
      std::fill_n(sum, count, T(0));
      for (int64_t draw = image * draws; draw < (image + 1) * draws; ++draw) {
        accumulate(alpha[draw], source.read(draw * tasks.elements + offset, count, in), count, sum);
      }
      target.write(first, count, sum);
    }
  });
  target.finish();
}

void add_noise(const at::Tensor& latents, const at::Tensor& alpha_t, const at::Tensor& sigma_t, const at::Tensor& seed,
               std::optional<at::ScalarType> /*dtype*/, int64_t batch_offset, const at::Tensor& out) {
  const auto run = latents.scalar_type() == at::kDouble ? add_noise_in<double> : add_noise_in<float>;
  run(latents, alpha_t, sigma_t, *seed.const_data_ptr<int64_t>(), batch_offset, out);
}

void add_noise_backward(const at::Tensor& grad, const at::Tensor& alpha_t, at::ScalarType dtype,
                        const at::Tensor& out) {
  const auto run = dtype == at::kDouble ? add_noise_backward_in<double> : add_noise_backward_in<float>;
  run(grad, alpha_t, out);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastsds_native, library) {
  library.def(
      "add_noise(Tensor latents, Tensor alpha_t, Tensor sigma_t, Tensor seed, ScalarType? dtype, int batch_offset, "
      "Tensor(a!) out) -> ()");
  library.def("add_noise_backward(Tensor grad, Tensor alpha_t, ScalarType dtype, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(fastsds_native, CPU, library) {
  library.impl("add_noise", add_noise);
  library.impl("add_noise_backward", add_noise_backward);
}

}  // namespace fastsds
