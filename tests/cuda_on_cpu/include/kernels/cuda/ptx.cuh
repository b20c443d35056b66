// ptx.cuh of the tests: the same functions as kernels/cuda/ptx.cuh, in plain C++, with checks. The compiler finds this
// file instead of that one because tests/cuda_on_cpu/include comes first on its path.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels/tensor.h"

namespace cuda_on_cpu {

extern constinit thread_local unsigned char* block_shared_memory;

void check_aligned16(const void* address, const char* what, Site site);
void check_shared(const void* address, bool expected, const char* what, Site site);
void start_async_copy(void* shared, const void* global, bool valid, Site site);
void commit_async_copies();
void wait_async_copies(int groups);
void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed, Site site);
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_SITE cuda_on_cpu::Site site = cuda_on_cpu::Site::here()

template <typename T>
inline T* shared_memory() {
  return reinterpret_cast<T*>(cuda_on_cpu::block_shared_memory);
}

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

template <typename T>
inline Pack<T> load128(const T* address, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::check_aligned16(address, "misaligned address in load128", site);
  Pack<T> pack;
  memcpy(&pack, address, sizeof pack);
  return pack;
}

template <typename T>
inline Pack<T> load128_streaming(const T* address, CUDA_ON_CPU_SITE) {
  return load128(address, site);
}

template <typename T>
inline void store128(T* address, const Pack<T>& pack, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::check_aligned16(address, "misaligned address in store128", site);
  cuda_on_cpu::check_shared(address, false, "store128 to shared memory", site);
  memcpy(address, &pack, sizeof pack);
}

template <typename T>
inline void store128_shared(T* address, const Pack<T>& pack, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::check_aligned16(address, "misaligned address in store128_shared", site);
  cuda_on_cpu::check_shared(address, true, "store128_shared to other than shared memory", site);
  memcpy(address, &pack, sizeof pack);
}

inline uint32_t pack_bf16(float low, float high) {
  return from_float<bf16>(low).bits | static_cast<uint32_t>(from_float<bf16>(high).bits) << 16;
}

// The accuracy of a CPU's exp2f, with the flushed denormals of the GPU's instruction.
inline float exp2_approximate(float x) {
  const float y = exp2f(fabsf(x) < 1.17549435e-38f ? 0.0f : x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

inline void cp_async16(void* shared, const void* global, bool valid = true, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::start_async_copy(shared, global, valid, site);
}

inline void cp_async_commit() { cuda_on_cpu::commit_async_copies(); }

template <int kGroups>
inline void cp_async_wait() {
  cuda_on_cpu::wait_async_copies(kGroups);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::ldmatrix(r, row, false, site);
}

inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::ldmatrix(r, row, true, site);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_ON_CPU_SITE) {
  cuda_on_cpu::mma(d, a, b, site);
}

#undef CUDA_ON_CPU_SITE
