// What kernels can do in the shim: indices, barriers, reductions, arguments. Shuffles, copies and tensor cores are
// tested by the kernels that use them, against formulas.
#include <gtest/gtest.h>

#include <vector>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/reduce.cuh"
#include "tests/cuda_on_cpu/report.h"
#include "tests/cuda_on_cpu/test_buffer.h"

namespace {

__global__ void block_sums_kernel(float* sums, const float* in, int per_block) {
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < per_block; i += static_cast<int>(blockDim.x)) {
    sum += in[static_cast<size_t>(blockIdx.x) * static_cast<size_t>(per_block) + static_cast<size_t>(i)];
  }
  sum = block_sum(sum, shared_memory<float>());
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

TEST(ShimKernels, BlockReductionOverManyBlocks) {
  const int blocks = 300, per_block = 1000;
  std::vector<float> in(static_cast<size_t>(blocks) * per_block);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 1237);
  DeviceBuffer<float> device_in(in), sums(blocks);
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    cuda_on_cpu::set_seed(seed);
    launch("block_sums", block_sums_kernel, {.grid = blocks, .block = 256, .shared_bytes = 8 * sizeof(float)},
           sums.data(), device_in.data(), per_block);
    const std::vector<float> result = sums.read();
    for (int b = 0; b < blocks; ++b) {
      double expected = 0;
      for (int i = 0; i < per_block; ++i) expected += in[static_cast<size_t>(b) * per_block + static_cast<size_t>(i)];
      ASSERT_EQ(result[static_cast<size_t>(b)], expected) << "block " << b << " seed " << seed;
    }
  }
}

__global__ void count_visits_kernel(int* visits) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(&visits[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
}

TEST(ShimKernels, EveryThreadOfEveryBlockRunsOnce) {
  const dim3 grids[] = {{1}, {7, 5, 3}, {64, 3, 1}}, blocks[] = {{1}, {5, 3, 2}, {33}, {1024}};
  for (const dim3 grid : grids) {
    for (const dim3 block : blocks) {
      std::vector<int> zeros(grid.x * grid.y * grid.z * block.x * block.y * block.z);
      DeviceBuffer<int> visits(zeros);
      launch("count_visits", count_visits_kernel, {.grid = grid, .block = block}, visits.data());
      EXPECT_EQ(visits.read(), std::vector<int>(zeros.size(), 1));
    }
  }
}

// Threads that have exited are not waited for.
__global__ void early_return_kernel(int* out, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  int* const shared = shared_memory<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[n - 1 - static_cast<int>(threadIdx.x)];
}

TEST(ShimKernels, BarriersCountThreadsThatAreLeft) {
  DeviceBuffer<int> out(50);
  launch("early_return", early_return_kernel, {.block = 96, .shared_bytes = 200}, out.data(), 50);
  const std::vector<int> result = out.read();
  for (int i = 0; i < 50; ++i) EXPECT_EQ(result[static_cast<size_t>(i)], 49 - i);
}

struct Numbers {
  int values[10];
};

__global__ void write_numbers_kernel(int* out, Numbers numbers, long long big) {
  numbers.values[0] += static_cast<int>(threadIdx.x);  // of this thread alone
  atomicAdd(&out[0], numbers.values[0]);
  atomicAdd(&out[1], numbers.values[9]);
  if (big == 1ll << 40) atomicAdd(&out[2], 1);
}

TEST(ShimKernels, ArgumentsAreCopiedAtTheLaunch) {
  DeviceBuffer<int> out(std::vector<int>(3, 0));
  Numbers numbers{{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}};
  launch("write_numbers", write_numbers_kernel, {.grid = 8, .block = 32}, out.data(), numbers, 1ll << 40);
  numbers = {};
  EXPECT_EQ(out.read(), (std::vector<int>{8 * (32 + 31 * 16), 8 * 32 * 10, 8 * 32}));
}

}  // namespace
