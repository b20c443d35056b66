// launch.h: how a kernel and its arguments become something that can be run later, several times, once per thread.
#pragma once

#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

namespace cuda_on_cpu {

// Calls the kernel for one thread. What it captures are copies of the arguments, made at the launch.
using Kernel = std::function<void()>;

// Stops the program when a GPU could not follow the pointer: it is neither null nor into device or page-locked memory.
void check_pointer_argument(const void* pointer, const void* function, size_t position);

template <typename T>
void check_argument(const T& argument, const void* function, size_t position) {
  if constexpr (std::is_pointer_v<T>) check_pointer_argument(argument, function, position);
}

cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const void* function, Kernel kernel);

}  // namespace cuda_on_cpu

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "a GPU copies the bytes of an argument");
  static_assert((!std::is_reference_v<Parameters> && ...), "a reference to host memory means nothing on a GPU");
  std::tuple<Parameters...> copies{static_cast<Parameters>(std::forward<Arguments>(arguments))...};
  static_assert(sizeof copies <= 4096, "the arguments of a kernel have at most 4096 bytes");
  const void* const function = reinterpret_cast<const void*>(kernel);
  std::apply(
      [&](const auto&... argument) {
        [[maybe_unused]] size_t position = 0;
        (cuda_on_cpu::check_argument(argument, function, ++position), ...);
      },
      copies);
  return cuda_on_cpu::launch_kernel(*config, function, [kernel, copies] { std::apply(kernel, copies); });
}
