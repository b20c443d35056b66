// launch.cuh: the one way a kernel is launched. Checks every error, opts in to more than 48 KB of shared memory, and
// names the kernel in what it throws.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

// Throws std::runtime_error saying what was being done when `status` is not success.
inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// What to say of a launch that failed. Kernels run after their launch has returned, so an error may be an earlier
// one's, unless the environment makes each launch wait.
inline std::runtime_error launch_error(cudaError_t status, const char* name) {
  const char* const blocking = std::getenv("CUDA_LAUNCH_BLOCKING");
  const bool waits = blocking && std::string(blocking) == "1";
  const bool refused = status == cudaErrorInvalidValue || status == cudaErrorInvalidConfiguration;
  const std::string error = std::string("CUDA: ") + cudaGetErrorString(status);
  if (waits || refused) return std::runtime_error(error + " in kernel " + name);
  return std::runtime_error(error + " in kernel " + name +
                            " or an earlier one (with the environment variable CUDA_LAUNCH_BLOCKING=1 and "
                            "--no-cuda-graph the message names it)");
}

struct LaunchShape {
  dim3 grid = {1, 1, 1};
  dim3 block = {1, 1, 1};
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "as many arguments as the kernel has parameters");
  constexpr size_t kWithoutOptIn = 48 << 10;
  if (shape.shared_bytes > kWithoutOptIn) {
    const auto function = reinterpret_cast<const void*>(kernel);
    const int bytes = static_cast<int>(shape.shared_bytes);
    cudaFuncAttributes attributes;
    cudaError_t status = cudaFuncGetAttributes(&attributes, function);
    // Never less than before: a graph may hold a launch that needs more than this one.
    if (status == cudaSuccess && attributes.maxDynamicSharedSizeBytes < bytes)
      status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) throw launch_error(status, name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (status != cudaSuccess) throw launch_error(status, name);
}
