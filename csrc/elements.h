// Reads and writes a tensor's elements by blocks, in the type that is computed in.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>

#include "pages.h"
#include "vectorized.h"

namespace fastsds {

#define FASTSDS_DISPATCH(dtype, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, name, __VA_ARGS__)

// Where elements lie in memory; nowhere for an array that is not there.
inline Region region_of(const void* data, at::ScalarType dtype, int64_t first, int64_t count) {
  if (data == nullptr) return {};
  const auto size = static_cast<int64_t>(c10::elementSize(dtype));
  return {static_cast<const char*>(data) + first * size, count * size};
}

// A dense input. `read` gives its own memory where no conversion is needed, else fills `buffer`.
template <typename T>
class Source {
 public:
  Source() = default;
  explicit Source(const at::Tensor& tensor)
      : tensor_(tensor.contiguous()), data_(tensor_.const_data_ptr()), dtype_(tensor_.scalar_type()) {}

  bool defined() const { return data_ != nullptr; }

  Region region(int64_t first, int64_t count) const { return region_of(data_, dtype_, first, count); }

  const T* read(int64_t first, int64_t count, T* buffer) const {
    if (dtype_ == c10::CppTypeToScalarType<T>::value) return static_cast<const T*>(data_) + first;
    FASTSDS_DISPATCH(dtype_, "fastsds read", [&] {
      const scalar_t* from = static_cast<const scalar_t*>(data_) + first;
      for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<T>(from[i]);
    });
    return buffer;
  }

 private:
  at::Tensor tensor_;
  const void* data_ = nullptr;
  at::ScalarType dtype_ = at::kFloat;
};

// An output of any layout. Results are made in `place` and, where a conversion is needed, taken over by `write`;
// `finish` lays them out as the output is.
template <typename T>
class Target {
 public:
  Target() = default;
  explicit Target(const at::Tensor& tensor)
      : tensor_(tensor),
        dense_(tensor.is_contiguous() ? tensor : at::empty(tensor.sizes(), tensor.options())),
        data_(dense_.mutable_data_ptr()),
        dtype_(tensor.scalar_type()) {
    prefer_huge_pages(data_, dense_.nbytes());
  }

  bool defined() const { return data_ != nullptr; }

  Region region(int64_t first, int64_t count) const { return region_of(data_, dtype_, first, count); }

  T* place(int64_t first, T* buffer) const {
    return dtype_ == c10::CppTypeToScalarType<T>::value ? static_cast<T*>(data_) + first : buffer;
  }

  void write(int64_t first, int64_t count, const T* made) const {
    if (dtype_ == c10::CppTypeToScalarType<T>::value) return;
    FASTSDS_DISPATCH(dtype_, "fastsds write", [&] {
      scalar_t* to = static_cast<scalar_t*>(data_) + first;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<scalar_t>(made[i]);
    });
  }

  void finish() {
    if (defined() && !dense_.is_same(tensor_)) tensor_.copy_(dense_);
  }

 private:
  at::Tensor tensor_, dense_;
  void* data_ = nullptr;
  at::ScalarType dtype_ = at::kFloat;
};

// The noise of the elements `first`, `first + 1`, …; `buffer` has room for kNoiseBuffer, and
// what is used `soon` is fetched meanwhile.
constexpr int64_t kNoiseBuffer = kBlock + 8;

inline const float* noise(uint64_t seed, uint64_t first, int64_t count, float* buffer,
                          std::initializer_list<Region> soon) {
  const int64_t skipped = static_cast<int64_t>(first % 4);
  normals(seed, first / 4, (skipped + count + 3) / 4, buffer, soon);
  return buffer + skipped;
}

// sum = factor x for the first of several x, sum += factor x for the others.
template <typename T>
void sum_up(bool is_first, T factor, const T* x, int64_t count, T* sum) {
  is_first ? scale(factor, x, count, sum) : accumulate(factor, x, count, sum);
}

// `[batch, draws]` coefficients in the compute type, dense.
template <typename T>
at::Tensor coefficients(const at::Tensor& tensor) {
  return tensor.to(c10::CppTypeToScalarType<T>::value).contiguous();
}

// A latent's elements are cut into blocks; a task is one block of one latent, with all its draws.
struct Tasks {
  int64_t elements, blocks, count, grain;

  Tasks(int64_t batch, int64_t draws, int64_t elements) : elements(elements) {
    blocks = (elements + kBlock - 1) / kBlock;
    count = draws > 0 ? batch * blocks : 0;
    constexpr int64_t kElementsPerThread = 16384;
    const int64_t per_task = std::max<int64_t>(1, std::min(elements, kBlock) * draws);
    grain = std::max<int64_t>(1, kElementsPerThread / per_task);
  }
};

}  // namespace fastsds
