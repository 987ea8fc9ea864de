// Kernels that torch.ops.fastsds reaches for CPU tensors without a way through Python, which costs more than they do.
//
// What the contract refuses, and calls for which another backend is forced, go on to the kernel that Python registered
// for every device (fastsds/ops/_dispatch.py): it explains, or chooses.
#pragma once

#include <torch/library.h>

#include <cstdlib>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

namespace fastsds {

inline bool is_forced_elsewhere() {
  const char* forced = std::getenv("FASTSDS_BACKEND");
  return forced != nullptr && *forced != '\0' && std::string_view(forced) != "cpp";
}

template <auto is_valid, auto kernel, typename Result, typename... Arguments, size_t... place>
bool serve(Result (*)(Arguments...), std::index_sequence<place...>, torch::jit::Stack& stack) {
  const auto given = torch::jit::last(stack, sizeof...(Arguments));
  const std::tuple<std::decay_t<Arguments>...> arguments{given[place].template to<std::decay_t<Arguments>>()...};
  if (!std::apply(is_valid, arguments)) return false;
  Result result = std::apply(kernel, arguments);
  torch::jit::drop(stack, sizeof...(Arguments));
  if constexpr (std::is_same_v<Result, at::Tensor>) {
    torch::jit::push(stack, std::move(result));
  } else {
    std::apply([&](auto&... results) { torch::jit::push(stack, std::move(results)...); }, result);
  }
  return true;
}

template <typename Result, typename... Arguments>
constexpr auto places(Result (*)(Arguments...)) {
  return std::index_sequence_for<Arguments...>();
}

template <auto is_valid, auto kernel>
void serve_or_pass_on(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  if (is_forced_elsewhere() || !serve<is_valid, kernel>(kernel, places(kernel), *stack)) {
    op.redispatchBoxed(c10::DispatchKeySet(), stack);
  }
}

// `is_valid` takes the arguments of `kernel`, and says whether they keep the op's contract.
template <auto is_valid, auto kernel>
torch::CppFunction direct() {
  return torch::CppFunction::makeFromBoxedFunction<&serve_or_pass_on<is_valid, kernel>>();
}

}  // namespace fastsds
