// async_copy_kernel.cuh: a block of 64 threads copies through shared memory by cp.async, right or with a mistake.
#pragma once

#include <cstdint>

enum class CopyMistake { kNone, kNoWait, kNoBarrier };

__device__ inline void copy_16_bytes(void* to, const void* from, int bytes) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}

// out[i] = in[(i + 128) % 256], and 0 for the last four of `in`.
__global__ static void async_copy_kernel(const float* in, float* out, CopyMistake mistake) {
  __shared__ __align__(16) float s[256];
  const int l = static_cast<int>(threadIdx.x);
  copy_16_bytes(&s[4 * l], in + 4 * l, l == 63 ? 0 : 16);
  asm volatile("cp.async.commit_group;" ::: "memory");
  if (mistake != CopyMistake::kNoWait) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (mistake != CopyMistake::kNoBarrier) __syncthreads();
  for (int k = 0; k < 4; ++k) out[4 * l + k] = s[(4 * l + k + 128) % 256];
}
