// add_noise and its backward on the CPU: one pass over the latents, the noise made on the way.
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "contract.h"
#include "direct.h"
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
      const int64_t count = std::min(kBlock, tasks.elements - offset), first_latent = image * tasks.elements + offset;
      const T* z = source.read(first_latent, count, in);
      for (int64_t draw = image * draws; draw < (image + 1) * draws; ++draw) {
        const int64_t first = draw * tasks.elements + offset;
        const float* eps = noise(seed, batch_offset * draws * tasks.elements + first, count, noise_buffer,
                                 {source.region(first_latent, count), target.region(first, count)});
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
      for (int64_t draw = image * draws; draw < (image + 1) * draws; ++draw) {
        const T* upstream = source.read(draw * tasks.elements + offset, count, in);
        sum_up(draw == image * draws, alpha[draw], upstream, count, sum);
      }
      target.write(first, count, sum);
    }
  });
  target.finish();
  if (draws == 0) out.zero_();
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

bool is_plain_call(const at::Tensor& latents, const at::Tensor& alpha_t, const at::Tensor& sigma_t,
                   const at::Tensor& seed, std::optional<at::ScalarType> dtype, int64_t batch_offset) {
  return is_plain(latents) && latents.dim() >= 2 && are_coefficients(latents.size(0), alpha_t, sigma_t) &&
         is_seed(seed) && batch_offset >= 0 && is_latent_dtype(dtype.value_or(at::kFloat));
}

at::Tensor noised(const at::Tensor& latents, const at::Tensor& alpha_t, const at::Tensor& sigma_t,
                  const at::Tensor& seed, std::optional<at::ScalarType> dtype, int64_t batch_offset) {
  std::vector<int64_t> shape = alpha_t.sizes().vec();
  shape.insert(shape.end(), latents.sizes().begin() + 1, latents.sizes().end());
  const at::Tensor out = at::empty(shape, latents.options().dtype(dtype.value_or(latents.scalar_type())));
  add_noise(latents, alpha_t, sigma_t, seed, dtype, batch_offset, out);
  return out;
}

bool is_plain_backward_call(const at::Tensor& grad, const at::Tensor& alpha_t, at::ScalarType dtype) {
  return is_plain(grad) && grad.dim() >= 3 && are_coefficients(grad.size(0), alpha_t) &&
         alpha_t.sizes() == grad.sizes().slice(0, 2) && is_latent_dtype(dtype);
}

at::Tensor grad_of_latents(const at::Tensor& grad, const at::Tensor& alpha_t, at::ScalarType dtype) {
  std::vector<int64_t> shape = grad.sizes().vec();
  shape.erase(shape.begin() + 1);
  const at::Tensor out = at::empty(shape, grad.options().dtype(dtype));
  add_noise_backward(grad, alpha_t, dtype, out);
  return out;
}

auto add_noise_op() {
  using Op = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        std::optional<at::ScalarType>, c10::SymInt);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastsds::add_noise", "").typed<Op>();
  return op;
}

auto add_noise_backward_op() {
  using Op = at::Tensor(const at::Tensor&, const at::Tensor&, at::ScalarType);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastsds::add_noise_backward", "").typed<Op>();
  return op;
}

// For create_graph: the definition, which autograd differentiates in its turn.
at::Tensor differentiable_backward(const at::Tensor& grad, const at::Tensor& alpha_t, at::ScalarType dtype) {
  std::vector<int64_t> shape(grad.dim(), 1);
  std::copy_n(alpha_t.sizes().begin(), 2, shape.begin());
  const at::Tensor alpha = alpha_t.to(dtype == at::kDouble ? at::kDouble : at::kFloat).reshape(shape);
  return (alpha * grad).sum(1).to(dtype);
}

// The gradient that fastsds/ops/add_noise.py registers for every device.
class AddNoise : public torch::autograd::Function<AddNoise> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& latents,
                            const at::Tensor& alpha_t, const at::Tensor& sigma_t, const at::Tensor& seed,
                            std::optional<at::ScalarType> dtype, c10::SymInt batch_offset) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({alpha_t});
    context->saved_data["dtype"] = latents.scalar_type();
    return add_noise_op().call(latents, alpha_t, sigma_t, seed, dtype, std::move(batch_offset));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    torch::autograd::variable_list results(6);
    if (context->needs_input_grad(0)) {
      const at::Tensor alpha_t = context->get_saved_variables()[0];
      const at::ScalarType dtype = context->saved_data["dtype"].toScalarType();
      results[0] = at::GradMode::is_enabled() ? differentiable_backward(grads[0], alpha_t, dtype)
                                              : add_noise_backward_op().call(grads[0], alpha_t, dtype);
    }
    return results;
  }
};

at::Tensor differentiable_add_noise(const at::Tensor& latents, const at::Tensor& alpha_t, const at::Tensor& sigma_t,
                                    const at::Tensor& seed, std::optional<at::ScalarType> dtype,
                                    c10::SymInt batch_offset) {
  return AddNoise::apply(latents, alpha_t, sigma_t, seed, dtype, batch_offset);
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

TORCH_LIBRARY_IMPL(fastsds, CPU, library) {
  library.impl("add_noise", direct<is_plain_call, noised>());
  library.impl("add_noise_backward", direct<is_plain_backward_call, grad_of_latents>());
}

TORCH_LIBRARY_IMPL(fastsds, AutogradCPU, library) { library.impl("add_noise", differentiable_add_noise); }

}  // namespace fastsds
