// test_ptx_warps.cu: what threads do together on the interpreter: shuffles and votes, tensor cores, barriers, atomics,
// asynchronous copies. No kernel here has a mistake, so none may be found.
#include <cuda_bf16.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cuda/launch.cuh"
#include "tests/ptx/async_copy_kernel.cuh"
#include "tests/ptx/device_buffer.h"
#include "tests/ptx/last_block_kernel.cuh"

namespace {

struct Shuffled {
  int bfly[32], up[32], down[32], idx[32], ballot[32], any_all[32], half[32], after_divergence[32];
};

__global__ void shuffle_kernel(Shuffled* out) {
  const int l = static_cast<int>(threadIdx.x);
  out->bfly[l] = __shfl_xor_sync(~0u, l * 3, 5);
  out->up[l] = __shfl_up_sync(~0u, l, 3, 8);
  out->down[l] = __shfl_down_sync(~0u, l, 7, 16);
  out->idx[l] = __shfl_sync(~0u, l, 5, 8);
  out->ballot[l] = static_cast<int>(__ballot_sync(~0u, l % 3 == 0));
  out->any_all[l] = __any_sync(~0u, l == 31) * 2 + __all_sync(~0u, l < 31);
  int v = 0;
  if (l % 2) v = __shfl_xor_sync(0xaaaaaaaau, l, 2);
  out->half[l] = v;
  for (int k = 0; k < l; ++k) v += k;  // each thread another number of times, then together again
  out->after_divergence[l] = __shfl_xor_sync(~0u, v, 1);
}

TEST(PtxWarps, ShufflesAndVotes) {
  const DeviceBuffer<Shuffled> out(1);
  launch("shuffle_kernel", shuffle_kernel, {.grid = 1, .block = 32}, out.data());
  const Shuffled o = out.read()[0];
  uint32_t every_third = 0;
  for (int k = 0; k < 32; k += 3) every_third |= 1u << k;
  for (int l = 0; l < 32; ++l) {
    EXPECT_EQ(o.bfly[l], (l ^ 5) * 3);
    EXPECT_EQ(o.up[l], l % 8 >= 3 ? l - 3 : l);
    EXPECT_EQ(o.down[l], l % 16 + 7 < 16 ? l + 7 : l);
    EXPECT_EQ(o.idx[l], l / 8 * 8 + 5);
    EXPECT_EQ(o.ballot[l], static_cast<int>(every_third));
    EXPECT_EQ(o.any_all[l], 2);
    const auto half = [](int j) { return j % 2 ? j ^ 2 : 0; };
    EXPECT_EQ(o.half[l], half(l));
    EXPECT_EQ(o.after_divergence[l], half(l ^ 1) + (l ^ 1) * ((l ^ 1) - 1) / 2);
  }
}

// A 16 x 16 times B 16 x 8 plus C by ldmatrix and mma.
__global__ void mma_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, const float* c, float* d,
                           uint32_t* fragments) {
  __shared__ __align__(16) __nv_bfloat16 sa[16 * 16], sb[16 * 8];
  const int l = static_cast<int>(threadIdx.x);
  for (int i = l; i < 256; i += 32) sa[i] = a[i];
  for (int i = l; i < 128; i += 32) sb[i] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[2];
  const uint32_t pa = static_cast<uint32_t>(__cvta_generic_to_shared(&sa[(l % 16) * 16 + l / 16 * 8]));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
               : "r"(pa)
               : "memory");
  const uint32_t pb = static_cast<uint32_t>(__cvta_generic_to_shared(&sb[(l % 16) * 8]));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(fb[0]), "=r"(fb[1])
               : "r"(pb)
               : "memory");
  float f[4];
  const int g = l / 4, t = l % 4;
  for (int k = 0; k < 4; ++k) f[k] = c[(g + k / 2 * 8) * 8 + 2 * t + k % 2];
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])
      : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  for (int k = 0; k < 4; ++k) d[(g + k / 2 * 8) * 8 + 2 * t + k % 2] = f[k];
  for (int k = 0; k < 4; ++k) fragments[l * 4 + k] = fa[k];
}

// Small integers and eighths: every sum is exact.
TEST(PtxWarps, TensorCores) {
  std::mt19937 random(3);
  const auto eighths = [&](size_t count) {
    std::vector<__nv_bfloat16> x(count);
    for (__nv_bfloat16& v : x) v = __float2bfloat16((static_cast<float>(random() % 64) - 32) / 8);
    return x;
  };
  const std::vector<__nv_bfloat16> a = eighths(256), b = eighths(128);
  std::vector<float> c(128);
  for (float& x : c) x = static_cast<float>(random() % 100);
  const DeviceBuffer<__nv_bfloat16> device_a(a), device_b(b);
  const DeviceBuffer<float> device_c(c), device_d(128);
  const DeviceBuffer<uint32_t> device_fragments(128);
  launch("mma_kernel", mma_kernel, {.grid = 1, .block = 32}, device_a.data(), device_b.data(), device_c.data(),
         device_d.data(), device_fragments.data());
  const std::vector<float> d = device_d.read();
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = c[i * 8 + j];
      for (int k = 0; k < 16; ++k) sum += __bfloat162float(a[i * 16 + k]) * __bfloat162float(b[k * 8 + j]);
      EXPECT_EQ(d[i * 8 + j], sum) << i << ", " << j;
    }
  }
  // Lane 4 * 1 + 2 holds row 1 and, in its last register, row 9 and columns 12 and 13.
  uint16_t low, high;
  std::memcpy(&low, &a[9 * 16 + 12], 2);
  std::memcpy(&high, &a[9 * 16 + 13], 2);
  EXPECT_EQ(device_fragments.read()[6 * 4 + 3], low | static_cast<uint32_t>(high) << 16);
}

__global__ void block_sum_kernel(const float* in, float* out, int n) {
  extern __shared__ float partial[];
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int i = thread; i < n; i += static_cast<int>(blockDim.x)) sum += in[i];
  partial[thread] = sum;
  __syncthreads();
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    if (thread < half) partial[thread] += partial[thread + half];
    __syncthreads();
  }
  if (thread == 0) *out = partial[0];
}

TEST(PtxWarps, BarriersOfABlock) {
  std::vector<float> x(1000);
  float sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] = static_cast<float>(i * 37 % 1000);
  const DeviceBuffer<float> in(x), out(1);
  launch("block_sum_kernel", block_sum_kernel, {.grid = 1, .block = 256, .shared_bytes = 1024}, in.data(), out.data(),
         1000);
  EXPECT_EQ(out.read()[0], sum);
}

__global__ void atomic_kernel(int* total, float* count) {
  atomicAdd(total, static_cast<int>(threadIdx.x));
  atomicAdd(count, 1.0f);
}

TEST(PtxWarps, Atomics) {
  const DeviceBuffer<int> total(std::vector<int>{5});
  const DeviceBuffer<float> count(std::vector<float>{0.5f});
  launch("atomic_kernel", atomic_kernel, {.grid = 3, .block = 100}, total.data(), count.data());
  EXPECT_EQ(total.read()[0], 5 + 3 * 4950);
  EXPECT_EQ(count.read()[0], 300.5f);
}

TEST(PtxWarps, TheLastBlockSeesTheOthers) {
  const DeviceBuffer<float> partials(192), out(64);
  const DeviceBuffer<int> counter(std::vector<int>{0});
  launch("last_block_kernel", last_block_kernel, {.grid = 3, .block = 64}, partials.data(), counter.data(), out.data(),
         FenceMistake::kNone);
  const std::vector<float> sums = out.read();
  for (int i = 0; i < 64; ++i) EXPECT_EQ(sums[i], 3.0f * static_cast<float>(i) + 3);
}

TEST(PtxWarps, AsynchronousCopies) {
  std::vector<float> x(256);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i + 1);
  const DeviceBuffer<float> in(x), out(256);
  launch("async_copy_kernel", async_copy_kernel, {.grid = 1, .block = 64}, in.data(), out.data(), CopyMistake::kNone);
  const std::vector<float> copied = out.read();
  for (size_t i = 0; i < 256; ++i) {
    const size_t from = (i + 128) % 256;
    EXPECT_EQ(copied[i], from >= 252 ? 0 : x[from]) << i;  // the last copy reads nothing and writes zeros
  }
}

}  // namespace
