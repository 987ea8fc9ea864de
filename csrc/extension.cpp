// The Python module fastsds._C: what the extension was built with. Its ops are torch.ops.fastsds_native.*.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#define FASTSDS_TEXT(...) FASTSDS_TEXT_OF(__VA_ARGS__)
#define FASTSDS_TEXT_OF(...) #__VA_ARGS__

PYBIND11_MODULE(_C, module) {
  module.attr("torch") = TORCH_VERSION;
#if defined(__clang__)
  module.attr("compiler") = __VERSION__;
#else
  module.attr("compiler") = "GCC " __VERSION__;
#endif
#if defined(FASTSDS_WITH_CUDA)
  module.attr("architectures") = FASTSDS_TEXT(FASTSDS_ARCHITECTURES);
#else
  module.attr("architectures") = "";
#endif
}
