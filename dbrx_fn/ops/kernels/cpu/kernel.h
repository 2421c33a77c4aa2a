// What a kernel gets. Kernels include no header of MLX, so that they compile fast.
#pragma once

#include <cstdint>

namespace dbrx {

struct Arguments {
  // Row-contiguous, each starting at its first element.
  const void* const* inputs;
  void* const* outputs;
  const int64_t* numbers;
  const float* constants;
};

using Kernel = void (*)(const Arguments&);

}  // namespace dbrx

// A kernel is looked up by this name.
#define DBRX_KERNEL(name) extern "C" void dbrx_kernel_##name(const dbrx::Arguments& given)
