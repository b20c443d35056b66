// device.h: what CUDA C++ offers inside a kernel: indices, barriers, shuffles and votes, atomics, and the intrinsics
// that are spelled the same everywhere. A call that threads make together is a rendezvous in block.cpp.
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
inline constexpr int warpSize = 32;

namespace cuda_on_cpu {

// Where a kernel calls something that several threads must call together.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Waits for all threads of the block that have not exited.
void block_barrier(Site site);

enum class BlockVote { kCount, kAnd, kOr };
int block_vote(BlockVote vote, bool predicate, Site site);

// Waits until all lanes of `mask` are here with the same operation; then `complete` runs once with the arguments of
// every lane (null for lanes outside the mask), and all go on. `arguments` lives on the lane's own stack.
using Complete = void (*)(void* const (&arguments)[32], unsigned mask);
void warp_rendezvous(const char* operation, unsigned mask, Complete complete, void* arguments, Site site);

unsigned lane_index();

// Stops the program with a report about the running thread.
[[noreturn]] void kernel_error(const char* what, Site site);

enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, unsigned argument, int width, Site site);

enum class Reduce { kBallot, kAdd, kMin, kMax, kMinSigned, kMaxSigned, kAnd, kOr, kXor };
unsigned warp_reduce(Reduce kind, unsigned mask, unsigned value, Site site);

template <typename T>
T shuffle_value(Shuffle kind, unsigned mask, T value, unsigned argument, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, argument, width, site);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

// ---- barriers, shuffles, votes

#define CUDA_ON_CPU_SITE cuda_on_cpu::Site site = cuda_on_cpu::Site::here()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::block_barrier(site); }
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_vote(cuda_on_cpu::BlockVote::kCount, predicate != 0, site);
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_vote(cuda_on_cpu::BlockVote::kAnd, predicate != 0, site);
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_vote(cuda_on_cpu::BlockVote::kOr, predicate != 0, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::warp_rendezvous("__syncwarp", mask, nullptr, nullptr, site);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const auto kind = cuda_on_cpu::Shuffle::kIndex;
  return cuda_on_cpu::shuffle_value(kind, mask, value, static_cast<unsigned>(source), width, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle_value(cuda_on_cpu::Shuffle::kUp, mask, value, delta, width, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle_value(cuda_on_cpu::Shuffle::kDown, mask, value, delta, width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_CPU_SITE) {
  const auto kind = cuda_on_cpu::Shuffle::kXor;
  return cuda_on_cpu::shuffle_value(kind, mask, value, static_cast<unsigned>(lanes), width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::warp_reduce(cuda_on_cpu::Reduce::kBallot, mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::warp_reduce(cuda_on_cpu::Reduce::kBallot, mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::warp_reduce(cuda_on_cpu::Reduce::kBallot, mask, predicate != 0, site) == mask;
}
#define CUDA_ON_CPU_REDUCE(name, type, kind)                                                            \
  inline type __reduce_##name##_sync(unsigned mask, type value, CUDA_ON_CPU_SITE) {                     \
    using cuda_on_cpu::Reduce;                                                                          \
    return static_cast<type>(cuda_on_cpu::warp_reduce(kind, mask, static_cast<unsigned>(value), site)); \
  }
CUDA_ON_CPU_REDUCE(add, unsigned, Reduce::kAdd)
CUDA_ON_CPU_REDUCE(add, int, Reduce::kAdd)
CUDA_ON_CPU_REDUCE(min, unsigned, Reduce::kMin)
CUDA_ON_CPU_REDUCE(min, int, Reduce::kMinSigned)
CUDA_ON_CPU_REDUCE(max, unsigned, Reduce::kMax)
CUDA_ON_CPU_REDUCE(max, int, Reduce::kMaxSigned)
CUDA_ON_CPU_REDUCE(and, unsigned, Reduce::kAnd)
CUDA_ON_CPU_REDUCE(or, unsigned, Reduce::kOr)
CUDA_ON_CPU_REDUCE(xor, unsigned, Reduce::kXor)
#undef CUDA_ON_CPU_REDUCE
#undef CUDA_ON_CPU_SITE

// Blocks do run at the same time, on several threads of the CPU.
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- atomics, on integers only: the project forbids those on floats

#define CUDA_ON_CPU_ATOMICS(type)                                                                                     \
  inline type atomicAdd(type* address, type value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }   \
  inline type atomicExch(type* address, type value) { return __atomic_exchange_n(address, value, __ATOMIC_RELAXED); } \
  inline type atomicOr(type* address, type value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }     \
  inline type atomicAnd(type* address, type value) { return __atomic_fetch_and(address, value, __ATOMIC_RELAXED); }   \
  inline type atomicCAS(type* address, type expected, type value) {                                                   \
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                \
    return expected;                                                                                                  \
  }                                                                                                                   \
  inline type atomicMax(type* address, type value) {                                                                  \
    type old = __atomic_load_n(address, __ATOMIC_RELAXED);                                                            \
    while (!__atomic_compare_exchange_n(address, &old, old > value ? old : value, false, __ATOMIC_RELAXED,            \
                                        __ATOMIC_RELAXED)) {                                                          \
    }                                                                                                                 \
    return old;                                                                                                       \
  }                                                                                                                   \
  inline type atomicMin(type* address, type value) {                                                                  \
    type old = __atomic_load_n(address, __ATOMIC_RELAXED);                                                            \
    while (!__atomic_compare_exchange_n(address, &old, old < value ? old : value, false, __ATOMIC_RELAXED,            \
                                        __ATOMIC_RELAXED)) {                                                          \
    }                                                                                                                 \
    return old;                                                                                                       \
  }
CUDA_ON_CPU_ATOMICS(int)
CUDA_ON_CPU_ATOMICS(unsigned)
CUDA_ON_CPU_ATOMICS(unsigned long long)
#undef CUDA_ON_CPU_ATOMICS
float atomicAdd(float*, float) = delete;
double atomicAdd(double*, double) = delete;

// ---- arithmetic

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
