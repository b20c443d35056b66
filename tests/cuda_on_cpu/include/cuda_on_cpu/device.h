// device.h: what the kernels take of CUDA C++: indices, barriers, shuffles and votes of whole warps, atomic addition. A
// call that threads make together is a rendezvous in block.cpp.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <type_traits>

#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#if !defined(__restrict__)
#define __restrict__ __restrict
#endif

// Of the thread that runs; the scheduler sets them before it goes on with a thread.
extern constinit thread_local uint3 threadIdx;
extern constinit thread_local uint3 blockIdx;
extern constinit thread_local dim3 blockDim;
extern constinit thread_local dim3 gridDim;

namespace cuda_on_cpu {

// Where a kernel calls something that several threads must call together.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Waits for all threads of the block that have not exited.
void block_barrier(Site site);

// Waits until all 32 lanes of the warp are here with the same operation; then `complete` runs once with the arguments
// of every lane, and all go on. `arguments` lives on the lane's own stack.
using Complete = void (*)(void* const (&arguments)[32]);
void warp_rendezvous(const char* operation, unsigned mask, Complete complete, void* arguments, Site site);

// Stops the program with a report about the running thread.
[[noreturn]] void kernel_error(const char* what, Site site);

unsigned lane_index();
uint64_t shuffle(const char* operation, unsigned mask, uint64_t bits, unsigned source, Site site);
bool any(unsigned mask, bool predicate, Site site);

template <typename T>
T shuffle_value(const char* operation, unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(operation, mask, bits, source % 32, site);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

// ---- barriers, shuffles, votes

#define CUDA_ON_CPU_SITE cuda_on_cpu::Site site = cuda_on_cpu::Site::here()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::block_barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::warp_rendezvous("__syncwarp", mask, nullptr, nullptr, site);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle_value("__shfl_sync", mask, value, static_cast<unsigned>(source), site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, CUDA_ON_CPU_SITE) {
  const unsigned source = cuda_on_cpu::lane_index() ^ static_cast<unsigned>(lanes);
  return cuda_on_cpu::shuffle_value("__shfl_xor_sync", mask, value, source, site);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::any(mask, predicate != 0, site);
}
#undef CUDA_ON_CPU_SITE

// Blocks do run at the same time, on several threads of the CPU.
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "the project forbids atomic operations on floats");
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// ---- arithmetic

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
