// ptx.cuh: everything that only an NVIDIA compiler understands, behind small functions: inline PTX, cache hints, the
// dynamic shared memory. The tests compile the other files of this folder for the CPU with a ptx.cuh of their own
// (tests/cuda_on_cpu/), so the functions here are also the list of what a kernel may use beyond plain CUDA C++.
// Register layouts are those of the PTX ISA, sections "mma.m16n8k16" and "ldmatrix".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels/tensor.h"

// The dynamic shared memory of the block, the only shared memory there is. Aligned to 1024 bytes.
template <typename T>
__device__ inline T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// ---- 16-byte loads and stores of global or shared memory; the address must be a multiple of 16

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

template <typename T>
__device__ inline Pack<T> load128(const T* address) {
  const uint4 words = *reinterpret_cast<const uint4*>(address);
  Pack<T> pack;
  memcpy(&pack, &words, sizeof words);
  return pack;
}

// For data that is used once: does not displace what other kernels left in the L2 cache.
template <typename T>
__device__ inline Pack<T> load128_streaming(const T* address) {
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(address));
  Pack<T> pack;
  memcpy(&pack, &words, sizeof words);
  return pack;
}

// To global memory. A plain assignment of four words is one that the compiler may take apart, and it often does.
template <typename T>
__device__ inline void store128(T* address, const Pack<T>& pack) {
  uint4 words;
  memcpy(&words, &pack, sizeof words);
  __stwb(reinterpret_cast<uint4*>(address), words);
}

template <typename T>
__device__ inline void store128_shared(T* address, const Pack<T>& pack) {
  uint4 words;
  memcpy(&words, &pack, sizeof words);
  *reinterpret_cast<uint4*>(address) = words;
}

// ---- arithmetic

// Two floats rounded to nearest even, `low` in the lower half of the word.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// 2^x, relative error about 2^-22; 0 for -infinity.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- asynchronous copies into shared memory

// 16 bytes from global to shared memory, zeros instead when `valid` is false (nothing is read then). Not there before
// cp_async_wait and a barrier.
__device__ inline void cp_async16(void* shared, const void* global, bool valid = true) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kGroups` of this thread's newest groups are under way.
template <int kGroups>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- tensor cores; all 32 lanes of a warp call these together

// Four 8x8 matrices of 16-bit numbers from shared memory: lane l gives the address of row l % 8 of matrix l / 8, and
// gets of matrix i, in r[i], the two numbers 2 (l % 4), 2 (l % 4) + 1 of row l / 4.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same with every matrix transposed.
__device__ inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d += a b with a 16x16 and b 16x8 in bf16, d 16x8 in fp32. With g = lane / 4, t = lane % 4 and (r, c) = rows r,
// columns c, c + 1:
//   a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8)
//   b[0] rows 2t, 2t + 1 of column g    b[1] rows 2t + 8, 2t + 9 of column g
//   d[0], d[1] (g, 2t)    d[2], d[3] (g + 8, 2t)
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
