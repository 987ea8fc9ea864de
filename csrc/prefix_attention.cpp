// prefix_attention and its backward on the CPU: keys and values are read where they lie, scores stay in the cache.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "clones.h"
#include "philox.h"

namespace fastsds {
namespace {

// Prompts that are worked on at a time. Sums over prompts are partitioned by it, and so do not depend on the number of
// threads.
constexpr int64_t kPrompts = 32;

// Tokens of one image or of all: a token's heads lie together.
template <typename T>
struct Tokens {
  T* data;
  int64_t image_stride, token_stride;

  T* at(int64_t image, int64_t token) const { return data + image * image_stride + token * token_stride; }
};

// The queries, keys and values of one head of one prompt.
template <typename T>
struct Head {
  const T *q, *k, *v, *prefix_k, *prefix_v;
  int64_t q_stride, k_stride, v_stride, prefix_k_stride, prefix_v_stride;
  int64_t first, tokens, prefix, head_dim;  // `first` is the number in the suffix of the first query
  T scale;
};

template <typename T>
FASTSDS_INLINE T dot(const T* a, const T* b, int64_t count) {
  constexpr int64_t kLanes = 16;
  T sums[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t first = 0; first < whole; first += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[first + lane] * b[first + lane];
  }
  for (int64_t i = whole; i < count; ++i) sums[i - whole] += a[i] * b[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

template <typename T>
FASTSDS_INLINE void add(T factor, const T* __restrict x, int64_t count, T* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += factor * x[i];
}

// Each query's output and the logarithm of its softmax's sum; `weights` has room for prefix + tokens.
template <typename T>
FASTSDS_INLINE void attend_each(const Head<T>& head, T* weights, T* out, int64_t out_stride, T* log_sums,
                                int64_t log_sums_stride) {
  for (int64_t token = head.first; token < head.tokens; ++token) {
    const int64_t query = token - head.first, keys = head.prefix + token + 1;
    const T* q = head.q + query * head.q_stride;
    T largest = -std::numeric_limits<T>::infinity();
    for (int64_t key = 0; key < keys; ++key) {
      const T* k =
          key < head.prefix ? head.prefix_k + key * head.prefix_k_stride : head.k + (key - head.prefix) * head.k_stride;
      weights[key] = head.scale * dot(q, k, head.head_dim);
      largest = std::max(largest, weights[key]);
    }
    T sum = 0;
    for (int64_t key = 0; key < keys; ++key) sum += weights[key] = std::exp(weights[key] - largest);
    T* attended = out + query * out_stride;
    std::fill_n(attended, head.head_dim, T(0));
    for (int64_t key = 0; key < keys; ++key) {
      const T* v =
          key < head.prefix ? head.prefix_v + key * head.prefix_v_stride : head.v + (key - head.prefix) * head.v_stride;
      add(weights[key] / sum, v, head.head_dim, attended);
    }
    log_sums[query * log_sums_stride] = largest + std::log(sum);
  }
}

// Where the gradients of one head are added up; those of the suffix are null where they are not needed.
template <typename T>
struct HeadGradients {
  T *q, *k, *v, *prefix_k, *prefix_v;
  int64_t q_stride, k_stride, prefix_stride;
};

template <typename T>
FASTSDS_INLINE void attend_backward_each(const Head<T>& head, const T* grad, const T* out, int64_t out_stride,
                                         const T* log_sums, int64_t log_sums_stride, const HeadGradients<T>& to) {
  const int64_t dim = head.head_dim;
  for (int64_t token = head.first; token < head.tokens; ++token) {
    const int64_t query = token - head.first;
    const T *q = head.q + query * head.q_stride, *upstream = grad + query * out_stride;
    const T mean = dot(upstream, out + query * out_stride, dim), log_sum = log_sums[query * log_sums_stride];
    for (int64_t key = 0; key <= head.prefix + token; ++key) {
      const bool shared = key < head.prefix;
      const int64_t own = key - head.prefix;
      const T* k = shared ? head.prefix_k + key * head.prefix_k_stride : head.k + own * head.k_stride;
      const T* v = shared ? head.prefix_v + key * head.prefix_v_stride : head.v + own * head.v_stride;
      const T weight = std::exp(head.scale * dot(q, k, dim) - log_sum);
      const T in_logit = head.scale * weight * (dot(upstream, v, dim) - mean);
      if (shared) {
        add(in_logit, q, dim, to.prefix_k + key * to.prefix_stride);
        add(weight, upstream, dim, to.prefix_v + key * to.prefix_stride);
      } else if (to.q != nullptr) {
        add(in_logit, q, dim, to.k + own * to.k_stride);
        add(weight, upstream, dim, to.v + own * to.k_stride);
      }
      if (to.q != nullptr) add(in_logit, k, dim, to.q + query * to.q_stride);
    }
  }
}

#define FASTSDS_DEFINE(T)                                                                                       \
  FASTSDS_CLONES void attend(const Head<T>& head, T* weights, T* out, int64_t out_stride, T* log_sums,          \
                             int64_t log_sums_stride) {                                                         \
    attend_each(head, weights, out, out_stride, log_sums, log_sums_stride);                                     \
  }                                                                                                             \
  FASTSDS_CLONES void attend_backward(const Head<T>& head, const T* grad, const T* out, int64_t out_stride,     \
                                      const T* log_sums, int64_t log_sums_stride, const HeadGradients<T>& to) { \
    attend_backward_each(head, grad, out, out_stride, log_sums, log_sums_stride, to);                           \
  }

FASTSDS_DEFINE(float)
FASTSDS_DEFINE(double)

// In the type that is computed in, with the heads of a token together; a copy only where it does not lie so.
template <typename T>
at::Tensor readable(const at::Tensor& tensor) {
  const at::Tensor converted = tensor.to(c10::CppTypeToScalarType<T>::value);
  return converted.stride(3) == 1 && converted.stride(2) == converted.size(3) ? converted : converted.contiguous();
}

template <typename T>
Tokens<const T> read(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.size(0) == 1 ? 0 : tensor.stride(0), tensor.stride(1)};
}

template <typename T>
Tokens<T> written(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return {nullptr, 0, 0};
  return {tensor.mutable_data_ptr<T>(), tensor.size(0) == 1 ? 0 : tensor.stride(0), tensor.stride(1)};
}

// A dense tensor in the type that is computed in, to be laid out as `target` by `copy_`.
template <typename T>
at::Tensor scratch(const at::Tensor& target) {
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  return target.scalar_type() == dtype && target.is_contiguous()
             ? target
             : at::empty(target.sizes(), target.options().dtype(dtype));
}

void deliver(const at::Tensor& made, const at::Tensor& target) {
  if (!made.is_same(target)) target.copy_(made);
}

template <typename T>
class Problem {
 public:
  Problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& prefix_k,
          const at::Tensor& prefix_v, const at::Tensor& offsets, int64_t max_length)
      : tensors_{readable<T>(q), readable<T>(k), readable<T>(v), readable<T>(prefix_k), readable<T>(prefix_v)},
        offsets_(offsets.contiguous()),
        q_(read<T>(tensors_[0])),
        k_(read<T>(tensors_[1])),
        v_(read<T>(tensors_[2])),
        prefix_k_(read<T>(tensors_[3])),
        prefix_v_(read<T>(tensors_[4])) {
    images = prefix_k.size(0), prompts = offsets.size(0) - 1, prefix = prefix_k.size(1);
    heads = q.size(2), head_dim = q.size(3), room = prefix + max_length;
    shared = q.size(0) == 1, ends_only = q.size(1) != k.size(1);
    blocks = (prompts + kPrompts - 1) / kPrompts;
    bool rising = start(0) == 0 && start(prompts) == k.size(1);
    for (int64_t prompt = 0; prompt < prompts; ++prompt) {
      const int64_t tokens = start(prompt + 1) - start(prompt);
      rising = rising && 1 <= tokens && tokens <= max_length;
    }
    TORCH_CHECK(rising, "offsets: expected to rise from 0 to ", k.size(1), " in steps of 1 to max_length=", max_length);
  }

  int64_t start(int64_t prompt) const { return offsets_.const_data_ptr<int32_t>()[prompt]; }
  // The number of a prompt's first query.
  int64_t query(int64_t prompt) const { return ends_only ? prompt : start(prompt); }

  Head<T> head(int64_t image, int64_t prompt, int64_t head) const {
    const int64_t token = start(prompt), tokens = start(prompt + 1) - token, column = head * head_dim;
    return {q_.at(image, query(prompt)) + column,
            k_.at(image, token) + column,
            v_.at(image, token) + column,
            prefix_k_.at(image, 0) + column,
            prefix_v_.at(image, 0) + column,
            q_.token_stride,
            k_.token_stride,
            v_.token_stride,
            prefix_k_.token_stride,
            prefix_v_.token_stride,
            ends_only ? tokens - 1 : 0,
            tokens,
            prefix,
            head_dim,
            T(1) / std::sqrt(T(head_dim))};
  }

  int64_t images, prompts, prefix, heads, head_dim, room, blocks;
  bool shared, ends_only;

 private:
  at::Tensor tensors_[5], offsets_;
  Tokens<const T> q_, k_, v_, prefix_k_, prefix_v_;
};

template <typename T>
void forward_in(const Problem<T>& problem, const at::Tensor& out, const at::Tensor& log_sums) {
  const at::Tensor made = scratch<T>(out), sums = scratch<T>(log_sums);
  T *out_data = made.mutable_data_ptr<T>(), *sums_data = sums.mutable_data_ptr<T>();
  const int64_t queries = out.size(1), width = problem.heads * problem.head_dim;
  at::parallel_for(0, problem.images * problem.blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> weights(problem.room);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / problem.blocks, first = task % problem.blocks * kPrompts;
      for (int64_t prompt = first; prompt < std::min(first + kPrompts, problem.prompts); ++prompt) {
        const int64_t row = image * queries + problem.query(prompt);
        for (int64_t head = 0; head < problem.heads; ++head) {
          attend(problem.head(image, prompt, head), weights.data(), out_data + row * width + head * problem.head_dim,
                 width, sums_data + row * problem.heads + head, problem.heads);
        }
      }
    }
  });
  deliver(made, out);
  deliver(sums, log_sums);
}

template <typename T>
void backward_in(const Problem<T>& problem, const at::Tensor& grad, const at::Tensor& out, const at::Tensor& log_sums,
                 const std::vector<at::Tensor>& gradients) {
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  const at::Tensor upstream = grad.to(dtype).contiguous(), attended = out.to(dtype).contiguous(),
                   sums = log_sums.contiguous();
  const T *grad_data = upstream.const_data_ptr<T>(), *out_data = attended.const_data_ptr<T>(),
          *sums_data = sums.const_data_ptr<T>();
  const int64_t queries = out.size(1), width = problem.heads * problem.head_dim, prefix = problem.prefix;
  std::vector<at::Tensor> made;
  for (int i = 0; i < 3; ++i) made.push_back(scratch<T>(gradients[i]));
  if (problem.images == 0) {
    for (const at::Tensor& gradient : gradients) gradient.zero_();
    return;
  }
  const Tokens<T> in_q = written<T>(made[0]), in_k = written<T>(made[1]), in_v = written<T>(made[2]);
  // Each block of prompts has sums of its own, which are added in order in the end.
  const at::Tensor parts = at::empty({2, problem.images, problem.blocks, prefix, width}, upstream.options());
  T* parts_data = parts.mutable_data_ptr<T>();
  const int64_t part = prefix * width, values = problem.images * problem.blocks * part;
  // Where all images have the same suffixes, a task adds up the images of one block.
  const int64_t outer = problem.shared ? 1 : problem.images, inner = problem.images / outer;
  at::parallel_for(0, outer * problem.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % problem.blocks, first = block * kPrompts;
      const int64_t last = std::min(first + kPrompts, problem.prompts);
      for (int64_t image = task / problem.blocks * inner; image < (task / problem.blocks + 1) * inner; ++image) {
        T* in_prefix = parts_data + (image * problem.blocks + block) * part;
        std::fill_n(in_prefix, part, T(0));
        std::fill_n(in_prefix + values, part, T(0));
        if (in_q.data != nullptr && (image == 0 || !problem.shared)) {
          const int64_t query = problem.query(first), token = problem.start(first);
          std::fill_n(in_q.at(image, query), (problem.query(last) - query) * width, T(0));
          std::fill_n(in_k.at(image, token), (problem.start(last) - token) * width, T(0));
          std::fill_n(in_v.at(image, token), (problem.start(last) - token) * width, T(0));
        }
        for (int64_t prompt = first; prompt < last; ++prompt) {
          const int64_t row = image * queries + problem.query(prompt), token = problem.start(prompt);
          for (int64_t head = 0; head < problem.heads; ++head) {
            const int64_t column = head * problem.head_dim;
            HeadGradients<T> to{nullptr, nullptr, nullptr, in_prefix + column, in_prefix + values + column,
                                width,   width,   width};
            if (in_q.data != nullptr) {
              to.q = in_q.at(image, problem.query(prompt)) + column;
              to.k = in_k.at(image, token) + column;
              to.v = in_v.at(image, token) + column;
            }
            attend_backward(problem.head(image, prompt, head), grad_data + row * width + column,
                            out_data + row * width + column, width, sums_data + row * problem.heads + head,
                            problem.heads, to);
          }
        }
      }
    }
  });
  for (int i = 0; i < 3; ++i) deliver(made[i], gradients[i]);
  const at::Tensor summed = parts.sum(2).view({2, problem.images, prefix, problem.heads, problem.head_dim});
  gradients[3].copy_(summed[0]);
  gradients[4].copy_(summed[1]);
}

void prefix_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& prefix_k,
                      const at::Tensor& prefix_v, const at::Tensor& offsets, int64_t max_length, const at::Tensor& out,
                      const at::Tensor& log_sums) {
  if (q.scalar_type() == at::kDouble) {
    forward_in(Problem<double>(q, k, v, prefix_k, prefix_v, offsets, max_length), out, log_sums);
  } else {
    forward_in(Problem<float>(q, k, v, prefix_k, prefix_v, offsets, max_length), out, log_sums);
  }
}

void prefix_attention_backward(const at::Tensor& grad, const at::Tensor& out, const at::Tensor& log_sums,
                               const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& prefix_k, const at::Tensor& prefix_v, const at::Tensor& offsets,
                               int64_t max_length, bool /*needs_suffix*/, const at::Tensor& in_q,
                               const at::Tensor& in_k, const at::Tensor& in_v, const at::Tensor& in_prefix_k,
                               const at::Tensor& in_prefix_v) {
  const std::vector<at::Tensor> gradients{in_q, in_k, in_v, in_prefix_k, in_prefix_v};
  if (q.scalar_type() == at::kDouble) {
    backward_in(Problem<double>(q, k, v, prefix_k, prefix_v, offsets, max_length), grad, out, log_sums, gradients);
  } else {
    backward_in(Problem<float>(q, k, v, prefix_k, prefix_v, offsets, max_length), grad, out, log_sums, gradients);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastsds_native, library) {
  library.def(
      "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor offsets, "
      "int max_length, Tensor(a!) out, Tensor(b!) log_sums) -> ()");
  library.def(
      "prefix_attention_backward(Tensor grad, Tensor out, Tensor log_sums, Tensor q, Tensor k, Tensor v, "
      "Tensor prefix_k, Tensor prefix_v, Tensor offsets, int max_length, bool needs_suffix, Tensor(a!) in_q, "
      "Tensor(b!) in_k, Tensor(c!) in_v, Tensor(d!) in_prefix_k, Tensor(e!) in_prefix_v) -> ()");
}

TORCH_LIBRARY_IMPL(fastsds_native, CPU, library) {
  library.impl("prefix_attention", prefix_attention);
  library.impl("prefix_attention_backward", prefix_attention_backward);
}

}  // namespace fastsds
