// sds_loss and its backward on the CPU: guidance, residual, loss and gradients in one pass over the prediction.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <string_view>

#include "contract.h"
#include "direct.h"
#include "elements.h"

namespace fastsds {
namespace {

using Optional = std::optional<at::Tensor>;

struct Options {
  std::string_view prediction_type, jacobian;
  double guidance_scale;
  int64_t batch_offset;
};

// The residual of a draw is `slope (guided - (a eps + b z))`.
template <typename T>
struct Line {
  T slope, a, b, slope_latents;
  bool reads_eps, reads_latents;
};

template <typename T>
Line<T> line_of(std::string_view prediction_type, T alpha, T sigma) {
  if (prediction_type == "epsilon") return {1, 1, 0, 0, true, false};
  if (prediction_type == "v_prediction") return {alpha, alpha, -sigma, alpha * sigma, true, true};
  if (prediction_type == "sample") return {-alpha / sigma, 0, 1, alpha / sigma, false, true};
  return {alpha, 1, -1, alpha, true, true};
}

// Gradients in prediction, latents and prediction_uncond; those that are not wanted are undefined.
using Gradients = std::array<at::Tensor, 3>;

template <typename T>
void residual_pass(const at::Tensor& grad, const at::Tensor& prediction, const at::Tensor& latents,
                   const at::Tensor& alpha_t, const at::Tensor& sigma_t, const at::Tensor& weight, uint64_t seed,
                   const Optional& prediction_uncond, const Options& options, const at::Tensor& loss,
                   const Gradients& gradients) {
  const int64_t batch = alpha_t.size(0), draws = alpha_t.size(1);
  const Tasks tasks(batch, draws, batch > 0 ? latents.numel() / batch : 0);
  const bool skip = options.jacobian == "skip", guided_by_uncond = prediction_uncond.has_value();
  const T text_share = guided_by_uncond ? options.guidance_scale : 1.0;
  const at::Tensor alphas = coefficients<T>(alpha_t), sigmas = coefficients<T>(sigma_t);
  const at::Tensor weights = coefficients<T>(weight);
  const at::Tensor upstreams = grad.defined() ? coefficients<T>(grad) : weights;
  const T *alpha = alphas.const_data_ptr<T>(), *sigma = sigmas.const_data_ptr<T>();
  const T *w = weights.const_data_ptr<T>(), *upstream = upstreams.const_data_ptr<T>();

  const Source<T> text(prediction), source(latents);
  const Source<T> uncond = guided_by_uncond ? Source<T>(*prediction_uncond) : Source<T>();
  auto target_of = [](const at::Tensor& gradient) { return gradient.defined() ? Target<T>(gradient) : Target<T>(); };
  Target<T> grad_text = target_of(gradients[0]), grad_latents = target_of(gradients[1]);
  Target<T> grad_uncond = target_of(gradients[2]);
  const int wanted = grad_text.defined() + grad_latents.defined() + grad_uncond.defined();

  const at::Tensor squares = at::empty({batch * draws, tasks.blocks}, alphas.options());
  T* sums_of_squares = squares.mutable_data_ptr<T>();
  at::parallel_for(0, tasks.count, tasks.grain, [&](int64_t begin, int64_t end) {
    float noise_buffer[kNoiseBuffer];
    T text_buffer[kBlock], uncond_buffer[kBlock], latents_buffer[kBlock];
    T combined[kBlock], residuals[kBlock], result[kBlock], sums[kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tasks.blocks, block = task % tasks.blocks, offset = block * kBlock;
      const int64_t count = std::min(kBlock, tasks.elements - offset), first_latent = image * tasks.elements + offset;
      T* sum = grad_latents.place(first_latent, sums);
      for (int64_t draw = image * draws; draw < (image + 1) * draws; ++draw) {
        const int64_t first = draw * tasks.elements + offset;
        const bool is_first = draw == image * draws;
        const Line<T> line = line_of(options.prediction_type, alpha[draw], sigma[draw]);
        const uint64_t index = options.batch_offset * draws * tasks.elements + first;
        const float* eps = nullptr;
        if (line.reads_eps) {
          eps = noise(seed, index, count, noise_buffer,
                      {text.region(first, count), uncond.region(first, count), grad_text.region(first, count),
                       grad_uncond.region(first, count), grad_latents.region(first_latent, count)});
        }
        const T* z = line.reads_latents ? source.read(first_latent, count, latents_buffer) : nullptr;
        const T* guided = text.read(first, count, text_buffer);
        if (guided_by_uncond) {
          guide(guided, uncond.read(first, count, uncond_buffer), text_share, count, combined);
          guided = combined;
        }
        const T scaled = upstream[draw] * w[draw] * (skip ? T(1) : T(2) / static_cast<T>(tasks.elements));
        const T in_text = text_share * line.slope * scaled, in_uncond = (1 - text_share) * line.slope * scaled;
        const T in_latents = skip ? scaled : line.slope_latents * scaled;
        // A gradient that is the only one is made on the way, several are made from the residuals.
        T *made = residuals, factor = 1;
        if (wanted == 1 && grad_text.defined()) made = grad_text.place(first, result), factor = in_text;
        if (wanted == 1 && grad_latents.defined() && is_first) made = sum, factor = in_latents;
        sums_of_squares[draw * tasks.blocks + block] =
            residual(guided, eps, line.a, z, line.b, line.slope, factor, count, made);
        if (made == residuals) {
          const auto write = [&](const Target<T>& target, T share) {
            if (!target.defined()) return;
            T* to = target.place(first, result);
            scale(share, residuals, count, to);
            target.write(first, count, to);
          };
          write(grad_text, in_text);
          write(grad_uncond, in_uncond);
          if (grad_latents.defined()) sum_up(is_first, in_latents, residuals, count, sum);
        } else if (grad_text.defined()) {
          grad_text.write(first, count, made);
        }
      }
      if (grad_latents.defined()) grad_latents.write(first_latent, count, sum);
    }
  });

  T* losses = loss.mutable_data_ptr<T>();
  for (int64_t draw = 0; draw < batch * draws; ++draw) {
    T sum = 0;
    for (int64_t block = 0; block < tasks.blocks; ++block) sum += sums_of_squares[draw * tasks.blocks + block];
    losses[draw] = w[draw] * (sum / static_cast<T>(tasks.elements));
  }
  grad_text.finish();
  grad_latents.finish();
  grad_uncond.finish();
  if (draws == 0 && grad_latents.defined()) gradients[1].zero_();
}

void run(const at::Tensor& grad, const at::Tensor& prediction, const at::Tensor& latents, const at::Tensor& alpha_t,
         const at::Tensor& sigma_t, const at::Tensor& weight, const at::Tensor& seed, const Optional& prediction_uncond,
         const Options& options, const at::Tensor& loss, const Gradients& gradients) {
  const auto pass = latents.scalar_type() == at::kDouble ? residual_pass<double> : residual_pass<float>;
  pass(grad, prediction, latents, alpha_t, sigma_t, weight, *seed.const_data_ptr<int64_t>(), prediction_uncond, options,
       loss, gradients);
}

void sds_loss(const at::Tensor& prediction, const at::Tensor& latents, const at::Tensor& alpha_t,
              const at::Tensor& sigma_t, const at::Tensor& weight, const at::Tensor& seed,
              std::string_view prediction_type, const Optional& prediction_uncond, double guidance_scale,
              std::string_view jacobian, int64_t batch_offset, const at::Tensor& loss) {
  const Options options{prediction_type, jacobian, guidance_scale, batch_offset};
  run({}, prediction, latents, alpha_t, sigma_t, weight, seed, prediction_uncond, options, loss, {});
}

void sds_loss_backward(const at::Tensor& grad, const at::Tensor& prediction, const at::Tensor& latents,
                       const at::Tensor& alpha_t, const at::Tensor& sigma_t, const at::Tensor& weight,
                       const at::Tensor& seed, std::string_view prediction_type, const Optional& prediction_uncond,
                       double guidance_scale, std::string_view jacobian, int64_t batch_offset,
                       std::array<bool, 3> needs, const at::Tensor& loss, const at::Tensor& grad_prediction,
                       const at::Tensor& grad_latents, const at::Tensor& grad_prediction_uncond) {
  Gradients gradients;
  if (needs[0]) gradients[0] = grad_prediction;
  if (needs[1]) gradients[1] = grad_latents;
  if (needs[2] && prediction_uncond.has_value()) gradients[2] = grad_prediction_uncond;
  if (jacobian == "skip") {
    for (at::Tensor* gradient : {&gradients[0], &gradients[2]}) {
      if (gradient->defined()) gradient->zero_();
      gradient->reset();
    }
  }
  const Options options{prediction_type, jacobian, guidance_scale, batch_offset};
  run(grad, prediction, latents, alpha_t, sigma_t, weight, seed, prediction_uncond, options, loss, gradients);
}

bool is_plain_call(const at::Tensor& prediction, const at::Tensor& latents, const at::Tensor& alpha_t,
                   const at::Tensor& sigma_t, const at::Tensor& weight, const at::Tensor& seed,
                   std::string_view prediction_type, const Optional& prediction_uncond, double guidance_scale,
                   std::string_view jacobian, int64_t batch_offset) {
  const auto is_prediction = [&](const at::Tensor& tensor) {
    return is_plain(tensor) && has_shape_of_draws(tensor, alpha_t, latents);
  };
  return is_plain(latents) && latents.dim() >= 2 && are_coefficients(latents.size(0), alpha_t, sigma_t, weight) &&
         is_prediction(prediction) && is_seed(seed) && batch_offset >= 0 &&
         (prediction_uncond.has_value() ? is_prediction(*prediction_uncond) : guidance_scale == 1.0) &&
         (prediction_type == "epsilon" || prediction_type == "v_prediction" || prediction_type == "sample" ||
          prediction_type == "flow") &&
         (jacobian == "full" || jacobian == "skip");
}

at::Tensor empty_loss(const at::Tensor& latents, const at::Tensor& alpha_t) {
  const auto dtype = latents.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::empty(alpha_t.sizes(), latents.options().dtype(dtype));
}

at::Tensor loss_of(const at::Tensor& prediction, const at::Tensor& latents, const at::Tensor& alpha_t,
                   const at::Tensor& sigma_t, const at::Tensor& weight, const at::Tensor& seed,
                   std::string_view prediction_type, const Optional& prediction_uncond, double guidance_scale,
                   std::string_view jacobian, int64_t batch_offset) {
  const at::Tensor loss = empty_loss(latents, alpha_t);
  sds_loss(prediction, latents, alpha_t, sigma_t, weight, seed, prediction_type, prediction_uncond, guidance_scale,
           jacobian, batch_offset, loss);
  return loss;
}

bool is_plain_backward_call(const at::Tensor& grad, const at::Tensor& prediction, const at::Tensor& latents,
                            const at::Tensor& alpha_t, const at::Tensor& sigma_t, const at::Tensor& weight,
                            const at::Tensor& seed, std::string_view prediction_type, const Optional& prediction_uncond,
                            double guidance_scale, std::string_view jacobian, int64_t batch_offset,
                            std::array<bool, 3> /*needs*/) {
  return grad.is_cpu() && grad.sizes() == alpha_t.sizes() &&
         is_plain_call(prediction, latents, alpha_t, sigma_t, weight, seed, prediction_type, prediction_uncond,
                       guidance_scale, jacobian, batch_offset);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> loss_and_gradients(
    const at::Tensor& grad, const at::Tensor& prediction, const at::Tensor& latents, const at::Tensor& alpha_t,
    const at::Tensor& sigma_t, const at::Tensor& weight, const at::Tensor& seed, std::string_view prediction_type,
    const Optional& prediction_uncond, double guidance_scale, std::string_view jacobian, int64_t batch_offset,
    std::array<bool, 3> needs) {
  const auto gradient_of = [&](const at::Tensor& tensor, bool needed) {
    return at::empty(needed ? tensor.sizes() : at::IntArrayRef{0}, (needed ? tensor : latents).options());
  };
  const at::Tensor loss = empty_loss(latents, alpha_t), in_prediction = gradient_of(prediction, needs[0]);
  const at::Tensor in_latents = gradient_of(latents, needs[1]);
  const at::Tensor in_uncond = gradient_of(prediction_uncond.value_or(latents), needs[2] && prediction_uncond);
  sds_loss_backward(grad, prediction, latents, alpha_t, sigma_t, weight, seed, prediction_type, prediction_uncond,
                    guidance_scale, jacobian, batch_offset, needs, loss, in_prediction, in_latents, in_uncond);
  return {loss, in_prediction, in_latents, in_uncond};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastsds_native, library) {
  library.def(
      "sds_loss(Tensor prediction, Tensor latents, Tensor alpha_t, Tensor sigma_t, Tensor weight, Tensor seed, "
      "str prediction_type, Tensor? prediction_uncond, float guidance_scale, str jacobian, int batch_offset, "
      "Tensor(a!) loss) -> ()");
  library.def(
      "sds_loss_backward(Tensor grad, Tensor prediction, Tensor latents, Tensor alpha_t, Tensor sigma_t, "
      "Tensor weight, Tensor seed, str prediction_type, Tensor? prediction_uncond, float guidance_scale, "
      "str jacobian, int batch_offset, bool[3] needs, Tensor(a!) loss, Tensor(b!) grad_prediction, "
      "Tensor(c!) grad_latents, Tensor(d!) grad_prediction_uncond) -> ()");
}

TORCH_LIBRARY_IMPL(fastsds_native, CPU, library) {
  library.impl("sds_loss", sds_loss);
  library.impl("sds_loss_backward", sds_loss_backward);
}

TORCH_LIBRARY_IMPL(fastsds, CPU, library) {
  library.impl("sds_loss", direct<is_plain_call, loss_of>());
  library.impl("sds_loss_backward", direct<is_plain_backward_call, loss_and_gradients>());
}

}  // namespace fastsds
