// Kernels that torch.ops.fastsds reaches for CPU tensors without a way through Python, which costs more than they do.
//
// Calls for which another backend is forced, and those that a kernel does not take, go on to what Python registered for
// every device (fastsds/ops/_dispatch.py): it checks the contract, explains, and chooses.
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

template <typename Result, typename... Arguments>
constexpr auto places(Result (*)(Arguments...)) {
  return std::index_sequence_for<Arguments...>();
}

template <auto takes, auto kernel, typename Result, typename... Arguments, size_t... place>
bool serve(Result (*)(Arguments...), std::index_sequence<place...>, torch::jit::Stack& stack) {
  const auto given = torch::jit::last(stack, sizeof...(Arguments));
  const std::tuple<std::decay_t<Arguments>...> arguments{given[place].template to<std::decay_t<Arguments>>()...};
  if (!std::apply(takes, arguments)) return false;
  Result result = std::apply(kernel, arguments);
  torch::jit::drop(stack, sizeof...(Arguments));
  if constexpr (std::is_same_v<Result, at::Tensor>) {
    torch::jit::push(stack, std::move(result));
  } else {
    std::apply([&](auto&... results) { torch::jit::push(stack, std::move(results)...); }, result);
  }
  return true;
}

template <auto takes, auto kernel>
void serve_or_pass_on(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  if (is_forced_elsewhere() || !serve<takes, kernel>(kernel, places(kernel), *stack)) {
    op.redispatchBoxed(c10::DispatchKeySet(), stack);
  }
}

// `takes` is given the arguments of `kernel`, and says whether they are for it; it must refuse what breaks the
// contract.
template <auto takes, auto kernel>
torch::CppFunction direct() {
  return torch::CppFunction::makeFromBoxedFunction<&serve_or_pass_on<takes, kernel>>();
}

}  // namespace fastsds
