// What kernels can do in the shim: indices, barriers, shuffles, votes, atomics, asynchronous copies, tensor cores,
// against references of their own.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <random>
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

// What CUDA's documentation says about the source lane, in terms of positions in the segment; -1: the own value.
int expected_source(int kind, int lane, int argument, int width) {
  const int begin = lane / width * width, position = lane % width;
  if (kind == 0) return begin + argument % width;
  if (kind == 1) return position - argument < 0 ? -1 : lane - argument;
  if (kind == 2) return position + argument >= width ? -1 : lane + argument;
  return (lane ^ argument) >= begin + width ? -1 : lane ^ argument;
}

template <typename T>
__global__ void shuffle_kernel(T* out, const T* in, int kind, int argument, int width) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const T value = in[i];
  T result;
  if (kind == 0) {
    result = __shfl_sync(kAllLanes, value, argument, width);
  } else if (kind == 1) {
    result = __shfl_up_sync(kAllLanes, value, static_cast<unsigned>(argument), width);
  } else if (kind == 2) {
    result = __shfl_down_sync(kAllLanes, value, static_cast<unsigned>(argument), width);
  } else {
    result = __shfl_xor_sync(kAllLanes, value, argument, width);
  }
  out[i] = result;
}

template <typename T>
void check_shuffles() {
  std::vector<T> in(128);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<T>(1000 + 7 * i);
  DeviceBuffer<T> device_in(in), out(in.size());
  for (int kind = 0; kind < 4; ++kind) {
    for (int width : {1, 2, 8, 16, 32}) {
      for (int argument : {0, 1, 3, 5, 16, 31}) {
        launch("shuffle", shuffle_kernel<T>, {.grid = 2, .block = 64}, out.data(), device_in.data(), kind, argument,
               width);
        const std::vector<T> result = out.read();
        for (size_t i = 0; i < in.size(); ++i) {
          const int source = expected_source(kind, static_cast<int>(i % 32), argument, width);
          const T expected = source < 0 ? in[i] : in[i / 32 * 32 + static_cast<size_t>(source)];
          ASSERT_EQ(result[i], expected) << kind << " lane " << i << " argument " << argument << " width " << width;
        }
      }
    }
  }
}

TEST(ShimKernels, ShufflesOf4And8Bytes) {
  check_shuffles<float>();
  check_shuffles<double>();
  check_shuffles<int>();
  check_shuffles<unsigned long long>();
}

// Halves of a warp that shuffle and vote by themselves, at different times.
__global__ void halves_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int value = lane;
  for (int round = 0; round < (lane < 16 ? 3 : 5); ++round) value = __shfl_xor_sync(mask, value, 1, 16) + 1;
  const unsigned odd = __ballot_sync(mask, lane & 1);
  const int any = __any_sync(mask, lane == 3), all = __all_sync(mask, lane < 16);
  __syncwarp();
  out[threadIdx.x] = value + (odd == (mask & 0xaaaaaaaau) ? 100 : 0) + (any != 0 ? 1000 : 0) + (all != 0 ? 10000 : 0);
}

TEST(ShimKernels, HalvesOfAWarpWorkAlone) {
  DeviceBuffer<int> out(64);
  launch("halves", halves_kernel, {.block = 64}, out.data());
  const std::vector<int> result = out.read();
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32;
    EXPECT_EQ(result[static_cast<size_t>(i)], (lane ^ 1) + (lane < 16 ? 3 + 11100 : 5 + 100)) << i;
  }
}

__global__ void reduce_kernel(int* out, const int* in) {
  const int value = in[threadIdx.x];
  int results[] = {
      __reduce_add_sync(kAllLanes, value), __reduce_min_sync(kAllLanes, value),
      __reduce_max_sync(kAllLanes, value), static_cast<int>(__reduce_xor_sync(kAllLanes, static_cast<unsigned>(value))),
      __syncthreads_count(value > 0),      __syncthreads_and(value > -1000),
      __syncthreads_or(value == 12345)};
  for (int i = 0; i < 7; ++i) out[i * 64 + static_cast<int>(threadIdx.x)] = results[i];
}

TEST(ShimKernels, ReductionsAndVotes) {
  std::vector<int> in(64);
  for (size_t i = 0; i < 64; ++i) in[i] = static_cast<int>(i * 37 % 64) - 31;
  DeviceBuffer<int> device_in(in), out(7 * 64);
  launch("reduce", reduce_kernel, {.block = 64}, out.data(), device_in.data());
  const std::vector<int> result = out.read();
  const int positive = static_cast<int>(std::ranges::count_if(in, [](int x) { return x > 0; }));
  for (size_t i = 0; i < 64; ++i) {
    const auto begin = in.begin() + static_cast<std::ptrdiff_t>(i / 32 * 32), end = begin + 32;
    int sum = 0, exclusive = 0;
    for (auto it = begin; it != end; ++it) sum += *it, exclusive ^= *it;
    const int expected[] = {sum, *std::min_element(begin, end), *std::max_element(begin, end), exclusive, positive, 1,
                            0};
    for (size_t k = 0; k < 7; ++k) EXPECT_EQ(result[k * 64 + i], expected[k]) << k << " " << i;
  }
}

// Threads that have exited are not waited for.
__global__ void early_return_kernel(int* out, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  int* const shared = shared_memory<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[n - 1 - static_cast<int>(threadIdx.x)] + 1000 * __syncthreads_count(1);
}

TEST(ShimKernels, BarriersCountThreadsThatAreLeft) {
  DeviceBuffer<int> out(50);
  launch("early_return", early_return_kernel, {.block = 96, .shared_bytes = 200}, out.data(), 50);
  const std::vector<int> result = out.read();
  for (int i = 0; i < 50; ++i) EXPECT_EQ(result[static_cast<size_t>(i)], 49 - i + 50000);
}

struct Numbers {
  int values[10];
};

__global__ void write_numbers_kernel(int* out, Numbers numbers, long long big) {
  numbers.values[0] += static_cast<int>(threadIdx.x);  // of this thread alone
  atomicMax(&out[0], numbers.values[0]);
  atomicMin(&out[1], numbers.values[9]);
  if (big == 1ll << 40) atomicCAS(&out[2], 5, 6);
}

TEST(ShimKernels, ArgumentsAreCopiedAtTheLaunch) {
  DeviceBuffer<int> out(std::vector<int>{0, 100, 5});
  Numbers numbers{{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}};
  launch("write_numbers", write_numbers_kernel, {.grid = 8, .block = 32}, out.data(), numbers, 1ll << 40);
  numbers = {};
  EXPECT_EQ(out.read(), (std::vector<int>{32, 10, 6}));
}

// ---- asynchronous copies

// Three tiles under way at a time, as in a real pipeline; the copies of invalid rows are zeros.
__global__ void pipeline_kernel(float* out, const float* in, int tiles, int valid_threads) {
  float* const shared = shared_memory<float>();
  const int t = static_cast<int>(threadIdx.x), per_tile = 4 * static_cast<int>(blockDim.x);
  const auto fetch = [&](int tile) {
    if (tile < tiles) cp_async16(&shared[tile % 3 * per_tile + 4 * t], &in[tile * per_tile + 4 * t], t < valid_threads);
    cp_async_commit();
  };
  fetch(0);
  fetch(1);
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<1>();
    __syncthreads();
    fetch(tile + 2);
    for (int i = 0; i < 4; ++i) {
      out[tile * per_tile + 4 * t + i] = shared[tile % 3 * per_tile + (4 * t + i + 5) % per_tile];
    }
  }
  cp_async_wait<0>();
}

TEST(ShimKernels, AsynchronousCopiesInAPipeline) {
  const size_t tiles = 9, per_tile = 256;
  std::vector<float> in(tiles * per_tile);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  DeviceBuffer<float> device_in(in), out(in.size());
  launch("pipeline", pipeline_kernel, {.block = 64, .shared_bytes = 3 * per_tile * 4}, out.data(), device_in.data(),
         static_cast<int>(tiles), 60);
  const std::vector<float> result = out.read();
  for (size_t i = 0; i < in.size(); ++i) {
    const size_t from = (i % per_tile + 5) % per_tile;
    ASSERT_EQ(result[i], from / 4 < 60 ? in[i / per_tile * per_tile + from] : 0.0f) << i;
  }
}

// ---- tensor cores. The references use the layouts as CUTLASS states them (cute/atom/mma_traits_sm80.hpp), as strides
// over (lane % 4, lane / 4, value bits), so that they share nothing with the shim's own formulas.

float value_of(bf16 x) { return to_float(x); }

std::vector<bf16> random_bf16(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<bf16> values(count);
  for (bf16& value : values) value = from_float<bf16>(normal(generator));
  return values;
}

__global__ void mma_kernel(float* d, const uint32_t* a, const uint32_t* b) {
  const unsigned lane = threadIdx.x;
  float fragment_d[4];
  uint32_t fragment_a[4], fragment_b[2];
  for (unsigned i = 0; i < 4; ++i) fragment_d[i] = d[4 * lane + i];
  for (unsigned i = 0; i < 4; ++i) fragment_a[i] = a[4 * lane + i];
  for (unsigned i = 0; i < 2; ++i) fragment_b[i] = b[2 * lane + i];
  mma_m16n8k16(fragment_d, fragment_a, fragment_b);
  for (unsigned i = 0; i < 4; ++i) d[4 * lane + i] = fragment_d[i];
}

TEST(ShimKernels, MmaOfFragmentsInTheDocumentedLayout) {
  const std::vector<bf16> a = random_bf16(16 * 16, 1), b = random_bf16(16 * 8, 2);  // row-major
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  std::vector<float> c(16 * 8);
  for (float& x : c) x = normal(generator);
  std::vector<uint32_t> fragment_a(32 * 4), fragment_b(32 * 2);
  std::vector<float> fragment_d(32 * 4);
  const auto bit = [](size_t v, int i) { return v >> i & 1; };
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t v = 0; v < 8; ++v) {  // index m + 16 k
      const size_t at = 32 * (lane % 4) + lane / 4 + 16 * bit(v, 0) + 8 * bit(v, 1) + 128 * bit(v, 2);
      fragment_a[4 * lane + v / 2] |= uint32_t{a[at % 16 * 16 + at / 16].bits} << (16 * (v % 2));
    }
    for (size_t v = 0; v < 4; ++v) {  // index n + 8 k
      const size_t at = 16 * (lane % 4) + lane / 4 + 8 * bit(v, 0) + 64 * bit(v, 1);
      fragment_b[2 * lane + v / 2] |= uint32_t{b[at / 8 * 8 + at % 8].bits} << (16 * (v % 2));
    }
    for (size_t v = 0; v < 4; ++v) {  // index m + 16 n
      const size_t at = 32 * (lane % 4) + lane / 4 + 16 * bit(v, 0) + 8 * bit(v, 1);
      fragment_d[4 * lane + v] = c[at % 16 * 8 + at / 16];
    }
  }
  DeviceBuffer<uint32_t> device_a(fragment_a), device_b(fragment_b);
  DeviceBuffer<float> device_d(fragment_d);
  launch("mma", mma_kernel, {.block = 32}, device_d.data(), device_a.data(), device_b.data());
  const std::vector<float> result = device_d.read();
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t v = 0; v < 4; ++v) {
      const size_t at = 32 * (lane % 4) + lane / 4 + 16 * bit(v, 0) + 8 * bit(v, 1), m = at % 16, n = at / 16;
      double expected = c[m * 8 + n];
      for (size_t k = 0; k < 16; ++k) expected += double{value_of(a[m * 16 + k])} * value_of(b[k * 8 + n]);
      EXPECT_NEAR(result[4 * lane + v], expected, 1e-5) << "row " << m << " column " << n;
    }
  }
}

__global__ void ldmatrix_kernel(uint32_t* out, bool transposed) {
  uint16_t* const shared = shared_memory<uint16_t>();
  for (unsigned i = threadIdx.x; i < 4 * 8 * 8; i += 32) shared[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t r[4];
  if (transposed) {
    ldmatrix_x4_transposed(r, &shared[8 * threadIdx.x]);
  } else {
    ldmatrix_x4(r, &shared[8 * threadIdx.x]);
  }
  for (unsigned i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

// Element (row, column) of matrix i is 64 i + 8 row + column. Lane 4 row + column / 2 gets the elements of a row; with
// .trans the matrix is the transpose of what lies in memory.
TEST(ShimKernels, LdmatrixGivesEachLaneItsPairs) {
  DeviceBuffer<uint32_t> out(128);
  for (const bool transposed : {false, true}) {
    launch("ldmatrix", ldmatrix_kernel, {.block = 32, .shared_bytes = 512}, out.data(), transposed);
    const std::vector<uint32_t> result = out.read();
    for (uint32_t i = 0; i < 4; ++i) {
      for (uint32_t row = 0; row < 8; ++row) {
        for (uint32_t column = 0; column < 8; ++column) {
          const uint32_t word = result[4 * (4 * row + column / 2) + i];
          const uint32_t element = column % 2 == 0 ? word & 0xffff : word >> 16;
          EXPECT_EQ(element, 64 * i + (transposed ? 8 * column + row : 8 * row + column));
        }
      }
    }
  }
}

constexpr int kPitch = 24;  // elements; rows of 48 bytes

// One warp: d [16, 16] = a [16, 16] b, where b lies in memory as [16, 16] (k, n) or as its transpose (n, k).
__global__ void tile_matmul_kernel(float* d, const bf16* a, const bf16* b, bool b_transposed) {
  bf16* const shared_a = shared_memory<bf16>();
  bf16* const shared_b = shared_a + 16 * kPitch;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 32; i += 32) {
    const auto eight_a = load128(&a[8 * i]), eight_b = load128_streaming(&b[8 * i]);
    memcpy(&shared_a[i / 2 * kPitch + i % 2 * 8], &eight_a, sizeof eight_a);
    memcpy(&shared_b[i / 2 * kPitch + i % 2 * 8], &eight_b, sizeof eight_b);
  }
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[4];
  // Matrices: upper left, lower left, upper right, lower right.
  ldmatrix_x4(fragment_a, &shared_a[lane % 16 * kPitch + lane / 16 * 8]);
  if (b_transposed) {  // rows of n: (n 0-7, k 0-7), (n 0-7, k 8-15), (n 8-15, k 0-7), (n 8-15, k 8-15)
    ldmatrix_x4(fragment_b, &shared_b[(lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8]);
  } else {  // rows of k: (k 0-7, n 0-7), (k 8-15, n 0-7), (k 0-7, n 8-15), (k 8-15, n 8-15)
    ldmatrix_x4_transposed(fragment_b, &shared_b[lane % 16 * kPitch + lane / 16 * 8]);
  }
  for (int half = 0; half < 2; ++half) {
    float sums[4] = {0, 0, 0, 0};
    const uint32_t half_b[2] = {fragment_b[2 * half], fragment_b[2 * half + 1]};
    mma_m16n8k16(sums, fragment_a, half_b);
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}

TEST(ShimKernels, LdmatrixAndMmaMultiplyTiles) {
  const std::vector<bf16> a = random_bf16(256, 4), b = random_bf16(256, 5);
  DeviceBuffer<bf16> device_a(a), device_b(b);
  DeviceBuffer<float> d(256);
  for (const bool b_transposed : {false, true}) {
    launch("tile_matmul", tile_matmul_kernel, {.block = 32, .shared_bytes = 2 * 16 * kPitch * sizeof(bf16)}, d.data(),
           device_a.data(), device_b.data(), b_transposed);
    const std::vector<float> result = d.read();
    for (size_t m = 0; m < 16; ++m) {
      for (size_t n = 0; n < 16; ++n) {
        double expected = 0;
        for (size_t k = 0; k < 16; ++k) {
          expected += double{value_of(a[m * 16 + k])} * value_of(b_transposed ? b[n * 16 + k] : b[k * 16 + n]);
        }
        EXPECT_NEAR(result[m * 16 + n], expected, 1e-5) << m << " " << n << " " << b_transposed;
      }
    }
  }
}

__global__ void arithmetic_kernel(uint32_t* words, float* numbers) {
  words[0] = pack_bf16(1.0f, -2.0f);
  words[1] = pack_bf16(1.00390625f, 1.01171875f);  // ties: to even, down and up
  numbers[0] = exp2_approximate(3.0f);
  numbers[1] = exp2_approximate(-std::numeric_limits<float>::infinity());
  numbers[2] = exp2_approximate(-130.0f);  // would be denormal
  numbers[3] = rsqrtf(4.0f);
}

TEST(ShimKernels, Arithmetic) {
  DeviceBuffer<uint32_t> words(2);
  DeviceBuffer<float> numbers(4);
  launch("arithmetic", arithmetic_kernel, {}, words.data(), numbers.data());
  EXPECT_EQ(words.read(), (std::vector<uint32_t>{0xc0003f80u, 0x3f823f80u}));
  EXPECT_EQ(numbers.read(), (std::vector<float>{8, 0, 0, 0.5f}));
}

}  // namespace
