// test_ptx_mistakes.cu: kernels with mistakes, each of which the interpreter must find and name.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/launch.cuh"
#include "tests/ptx/async_copy_kernel.cuh"
#include "tests/ptx/device_buffer.h"
#include "tests/ptx/last_block_kernel.cuh"
#include "tests/ptx/runtime.h"

namespace {

class PtxMistakes : public ::testing::Test {
 protected:
  // Of this category something was found; other findings may follow from it.
  static void expect_found(const std::string& category) {
    cudaDeviceSynchronize();
    bool found = false;
    std::string all;
    for (const std::string& finding : ptxsim_take_findings()) {
      found |= finding.compare(0, category.size() + 1, category + ":") == 0;
      all += "\n" + finding;
    }
    EXPECT_TRUE(found) << "no " << category << " among:" << all;
  }

  DeviceBuffer<float> out{64}, ones{std::vector<float>(256, 1.0f)}, out256{256};
  DeviceBuffer<int> ints{64}, never_written{64}, counter{std::vector<int>{0}};
};

// ---- races

__global__ void no_barrier(float* out) {
  __shared__ float s[64];
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = s[63 - threadIdx.x];
}
TEST_F(PtxMistakes, NoBarrier) {
  launch("no_barrier", no_barrier, {.grid = 1, .block = 64}, out.data());
  expect_found("race in a block");
}

__global__ void no_warp_barrier(float* out) {
  __shared__ float s[32];
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = s[31 - threadIdx.x];
}
TEST_F(PtxMistakes, NoWarpBarrier) {
  launch("no_warp_barrier", no_warp_barrier, {.grid = 1, .block = 32}, out.data());
  expect_found("race in a warp");
}

__global__ void write_after_read(float* out) {
  __shared__ float s[64];
  s[threadIdx.x] = 1;
  __syncthreads();
  const float v = s[63 - threadIdx.x];
  s[threadIdx.x] = 2;
  out[threadIdx.x] = v;
}
TEST_F(PtxMistakes, WriteAfterRead) {
  launch("write_after_read", write_after_read, {.grid = 1, .block = 64}, out.data());
  expect_found("race in a block");
}

__global__ void two_blocks_write(float* out) { out[threadIdx.x] = static_cast<float>(blockIdx.x); }
TEST_F(PtxMistakes, TwoBlocksWrite) {
  launch("two_blocks_write", two_blocks_write, {.grid = 2, .block = 32}, out.data());
  expect_found("race between blocks");
}

__global__ void neighbours_in_place(float* x, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const float v = x[(i + 1) % n];
  x[i] = v + 1;
}
TEST_F(PtxMistakes, NeighboursInPlace) {
  launch("neighbours_in_place", neighbours_in_place, {.grid = 2, .block = 32}, ones.data(), 64);
  expect_found("race between blocks");
}

TEST_F(PtxMistakes, NoFenceBeforeArriving) {
  launch("last_block_kernel", last_block_kernel, {.grid = 3, .block = 64}, out256.data(), counter.data(), out.data(),
         FenceMistake::kNoneBefore);
  expect_found("race between blocks");
}
TEST_F(PtxMistakes, NoFenceAfterArriving) {
  launch("last_block_kernel", last_block_kernel, {.grid = 3, .block = 64}, out256.data(), counter.data(), out.data(),
         FenceMistake::kNoneAfter);
  expect_found("race between blocks");
}

// ---- accesses

__global__ void beside(float* out, int n) { out[static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) + n] = 1; }
TEST_F(PtxMistakes, PastTheEnd) {
  launch("beside", beside, {.grid = 1, .block = 32}, out.data(), 33);
  expect_found("fault");
}
TEST_F(PtxMistakes, BeforeTheBeginning) {
  launch("beside", beside, {.grid = 1, .block = 32}, out.data(), -1);
  expect_found("fault");
}

__global__ void past_shared_memory(float* out, int n) {
  extern __shared__ float dynamic[];
  dynamic[static_cast<int>(threadIdx.x) + n] = 1;
  __syncthreads();
  out[threadIdx.x] = dynamic[threadIdx.x];
}
TEST_F(PtxMistakes, PastSharedMemory) {
  launch("past_shared_memory", past_shared_memory, {.grid = 1, .block = 32, .shared_bytes = 128}, out.data(), 1);
  expect_found("fault");
}

__global__ void misaligned(float* out, const float* in) {
  *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(in + 1);
}
TEST_F(PtxMistakes, Misaligned) {
  launch("misaligned", misaligned, {.grid = 1, .block = 1}, out.data(), ones.data());
  expect_found("fault");
}

__global__ void partly_written(float* out) {
  __shared__ float s[64];
  if (threadIdx.x < 32) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x] * 2;
}
TEST_F(PtxMistakes, StoresWhatWasNeverWritten) {
  launch("partly_written", partly_written, {.grid = 1, .block = 64}, out.data());
  expect_found("undefined value stored");
}

__global__ void branches_on(float* out, const int* numbers) {
  if (numbers[threadIdx.x] > 3) out[0] = 1;
}
TEST_F(PtxMistakes, BranchesOnWhatWasNeverWritten) {
  launch("branches_on", branches_on, {.grid = 1, .block = 64}, out.data(), never_written.data());
  expect_found("undefined branch");
}

// ---- threads that should be together

__global__ void divergent_shuffle(int* out) {
  int v = static_cast<int>(threadIdx.x);
  if (threadIdx.x < 16)
    v = __shfl_xor_sync(~0u, v, 1);
  else
    v = __shfl_xor_sync(~0u, v, 2) + 1;
  out[threadIdx.x] = v;
}
TEST_F(PtxMistakes, DivergentShuffle) {
  launch("divergent_shuffle", divergent_shuffle, {.grid = 1, .block = 32}, ints.data());
  expect_found("deadlock");
}

__global__ void barrier_for_some(int* out) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    out[0] = 1;
  __syncthreads();
  out[threadIdx.x] = 1;
}
TEST_F(PtxMistakes, BarrierForSome) {
  launch("barrier_for_some", barrier_for_some, {.grid = 1, .block = 64}, ints.data());
  expect_found("deadlock");
}

__global__ void mma_of_31_threads(float* out) {
  float f[4] = {};
  if (threadIdx.x < 31)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
        : "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])
        : "r"(0));
  out[threadIdx.x] = f[0];
}
TEST_F(PtxMistakes, MmaOf31Threads) {
  launch("mma_of_31_threads", mma_of_31_threads, {.grid = 1, .block = 32}, out.data());
  expect_found("warp-synchronous");
}

// ---- asynchronous copies

TEST_F(PtxMistakes, CopyWithoutWaiting) {
  launch("async_copy_kernel", async_copy_kernel, {.grid = 1, .block = 64}, ones.data(), out256.data(),
         CopyMistake::kNoWait);
  expect_found("asynchronous copy");
}
TEST_F(PtxMistakes, CopyWithoutBarrier) {
  launch("async_copy_kernel", async_copy_kernel, {.grid = 1, .block = 64}, ones.data(), out256.data(),
         CopyMistake::kNoBarrier);
  expect_found("race in a block");
}

// ---- of the host

TEST_F(PtxMistakes, CopyPastTheEnd) {
  char host[1028] = {};
  EXPECT_NE(cudaMemcpy(out.data(), host, 257, cudaMemcpyDefault), cudaSuccess);
  expect_found("copy");
}

}  // namespace
