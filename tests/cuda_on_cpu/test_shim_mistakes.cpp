// Mistakes planted into kernels: each one must be reported, or show as a wrong result under some seed.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/reduce.cuh"
#include "tests/cuda_on_cpu/report.h"
#include "tests/cuda_on_cpu/test_buffer.h"

namespace {

class ShimMistakes : public testing::Test {
 protected:
  // The shim has threads of its own: a death test starts the program anew instead of forking it.
  static void SetUpTestSuite() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

// How many of 20 seeds give another result than `expected`?
template <typename T, typename Run>
int wrong_results(const DeviceBuffer<T>& out, const std::vector<T>& expected, Run run) {
  int wrong = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    cuda_on_cpu::set_seed(seed);
    run();
    wrong += out.read() != expected ? 1 : 0;
  }
  return wrong;
}

// ---- missing synchronisation

// Reverses the block's numbers twice, the second time in place of the first.
template <bool kFirst, bool kSecond>
__global__ void reverse_kernel(int* out) {
  int* const shared = shared_memory<int>();
  const unsigned t = threadIdx.x, n = blockDim.x;
  shared[t] = static_cast<int>(t);
  __syncthreads();
  const int value = shared[n - 1 - t];
  if (kFirst) __syncthreads();
  shared[t] = value;
  if (kSecond) __syncthreads();
  out[t] = shared[n - 1 - t];
}

TEST_F(ShimMistakes, MissingBlockBarrier) {
  DeviceBuffer<int> out(128);
  std::vector<int> expected(128);
  for (int i = 0; i < 128; ++i) expected[static_cast<size_t>(i)] = i;
  const auto wrong = [&](void (*kernel)(int*)) {
    return wrong_results(out, expected,
                         [&] { launch("reverse", kernel, {.block = 128, .shared_bytes = 512}, out.data()); });
  };
  EXPECT_EQ(wrong(reverse_kernel<true, true>), 0);
  EXPECT_GE(wrong(reverse_kernel<false, true>), 10);
  EXPECT_GE(wrong(reverse_kernel<true, false>), 10);
}

template <bool kSync>
__global__ void neighbour_kernel(int* out) {
  int* const shared = shared_memory<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kSync) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

TEST_F(ShimMistakes, MissingWarpBarrier) {
  DeviceBuffer<int> out(32);
  std::vector<int> expected(32);
  for (int i = 0; i < 32; ++i) expected[static_cast<size_t>(i)] = i ^ 1;
  const auto wrong = [&](void (*kernel)(int*)) {
    return wrong_results(out, expected,
                         [&] { launch("neighbour", kernel, {.block = 32, .shared_bytes = 128}, out.data()); });
  };
  EXPECT_EQ(wrong(neighbour_kernel<true>), 0);
  EXPECT_EQ(wrong(neighbour_kernel<false>), 20);
}

// A block that relies on what another block wrote.
__global__ void chain_kernel(int* out) {
  const int before = blockIdx.x == 0 ? 0 : out[blockIdx.x - 1];
  out[blockIdx.x] = before + 1;
}

TEST_F(ShimMistakes, BlocksInOrder) {
  DeviceBuffer<int> out(16);
  std::vector<int> expected(16);
  for (int i = 0; i < 16; ++i) expected[static_cast<size_t>(i)] = i + 1;
  EXPECT_GE(wrong_results(out, expected,
                          [&] {
                            cudaMemsetAsync(out.data(), 0, 64);
                            launch("chain", chain_kernel, {.grid = 16}, out.data());
                          }),
            15);
}

template <bool kWait>
__global__ void early_read_kernel(float* out, const float* in) {
  float* const shared = shared_memory<float>();
  shared[4 * threadIdx.x] = 7;
  cp_async16(&shared[4 * threadIdx.x], &in[4 * threadIdx.x]);
  cp_async_commit();
  if (kWait) cp_async_wait<0>();
  out[threadIdx.x] = shared[4 * threadIdx.x];
  cp_async_wait<0>();
}

TEST_F(ShimMistakes, AsynchronousCopyReadTooEarly) {
  DeviceBuffer<float> in(std::vector<float>(32, 1.0f)), out(8);
  launch("early_read", early_read_kernel<true>, {.block = 8, .shared_bytes = 128}, out.data(), in.data());
  EXPECT_EQ(out.read(), std::vector<float>(8, 1.0f));
  launch("early_read", early_read_kernel<false>, {.block = 8, .shared_bytes = 128}, out.data(), in.data());
  for (float x : out.read()) EXPECT_TRUE(std::isnan(x));
}

__global__ void forgotten_copy_kernel(const float* in) {
  cp_async16(shared_memory<float>(), in);
  cp_async_commit();
}

TEST_F(ShimMistakes, AsynchronousCopyNeverWaitedFor) {
  DeviceBuffer<float> in(std::vector<float>(4));
  EXPECT_DEATH(
      {
        launch("forgotten_copy", forgotten_copy_kernel, {.shared_bytes = 16}, in.data());
        cudaDeviceSynchronize();
      },
      "asynchronous copies that it never waited for(.|\n)*forgotten_copy_kernel");
}

// ---- uninitialised memory

template <typename T>
__global__ void unwritten_kernel(float* out) {
  out[threadIdx.x] = to_float(shared_memory<T>()[threadIdx.x]);
}

TEST_F(ShimMistakes, UnwrittenMemoryIsNotANumber) {
  DeviceBuffer<float> out(16);
  for (float x : out.read()) EXPECT_TRUE(std::isnan(x));
  launch("unwritten", unwritten_kernel<float>, {.block = 16, .shared_bytes = 64}, out.data());
  for (float x : out.read()) EXPECT_TRUE(std::isnan(x));
  launch("unwritten", unwritten_kernel<bf16>, {.block = 16, .shared_bytes = 32}, out.data());
  for (float x : out.read()) EXPECT_TRUE(std::isnan(x));
}

// ---- accesses outside

__global__ void write_kernel(float* out, int64_t index) { out[index] = 1; }
__global__ void read_kernel(float* out, int64_t index) { out[0] = out[index]; }
__global__ void write_shared_kernel(int64_t index) { shared_memory<volatile float>()[index] = 1; }
__global__ void write_shared_block_kernel(int64_t index) {
  if (blockIdx.x == 3) shared_memory<volatile float>()[index] = 1;
}

void run_write(int64_t index, size_t count = 100) {
  DeviceBuffer<float> before(100), out(count), after(100);
  launch("write", write_kernel, {}, out.data(), index);
  cudaDeviceSynchronize();
}

void run_write_shared(int64_t index, size_t bytes) {
  launch("write_shared", write_shared_kernel, {.shared_bytes = bytes}, index);
  cudaDeviceSynchronize();
}

const char* const kOutside = "outside of (device )?memory: ";

TEST_F(ShimMistakes, WriteOutsideOfABuffer) {
  run_write(0);
  run_write(99);
  EXPECT_DEATH(run_write(100), "outside of device memory: 0 bytes past the end of device buffer [0-9]+ of 400 bytes");
  EXPECT_DEATH(run_write(-1), "outside of device memory: 4 bytes before the beginning of device buffer");
  EXPECT_DEATH(run_write(1100), kOutside);
  EXPECT_DEATH(run_write(1024, 1024), "past the end of device buffer(.|\n)*in kernel write_kernel, block .0, 0, 0.");
  EXPECT_DEATH(run_write(-1, 1024), kOutside);
}

TEST_F(ShimMistakes, ReadPastAPageOfABuffer) {
  EXPECT_DEATH(
      {
        DeviceBuffer<float> out(64);
        launch("read", read_kernel, {}, out.data(), 64);
        cudaDeviceSynchronize();
      },
      kOutside);
}

struct Hidden {
  float* pointer;
};
__global__ void write_hidden_kernel(Hidden out) { *out.pointer = 1; }

TEST_F(ShimMistakes, FreedMemory) {
  const auto run = [](bool hidden) {
    float* memory = nullptr;
    cudaMalloc(reinterpret_cast<void**>(&memory), 400);
    cudaFree(memory);
    if (hidden) {
      launch("write_hidden", write_hidden_kernel, {}, Hidden{memory});
    } else {
      launch("write", write_kernel, {}, memory, 0);
    }
    cudaDeviceSynchronize();
  };
  EXPECT_DEATH(run(true),
               "byte 0 of device buffer [0-9]+ of 400 bytes, which has been freed\n  in kernel write_hidden");
  EXPECT_DEATH(run(false), "argument 1 of kernel write_kernel points to no device memory");
}

TEST_F(ShimMistakes, HostPointerGivenToAKernel) {
  float on_the_host = 0;
  EXPECT_DEATH(launch("write", write_kernel, {}, &on_the_host, 0),
               "argument 1 of kernel write_kernel points to no device");
}

TEST_F(ShimMistakes, WriteOutsideOfSharedMemory) {
  run_write_shared(255, 1024);
  EXPECT_DEATH(run_write_shared(25, 100), "0 bytes past the end of the shared memory, which has 100 bytes");
  EXPECT_DEATH(run_write_shared(256, 100), "past the end of the shared memory");
  EXPECT_DEATH(run_write_shared(256, 1024), "0 bytes past the end of the shared memory, which has 1024 bytes");
  EXPECT_DEATH(run_write_shared(-1, 1024), "4 bytes before the beginning of the shared memory");
  EXPECT_DEATH(
      {
        launch("write_shared", write_shared_block_kernel, {.grid = 5, .shared_bytes = 4}, 1);
        cudaDeviceSynchronize();
      },
      "block .3, 0, 0.");
}

TEST_F(ShimMistakes, HostCodeTouchesDeviceMemory) {
  EXPECT_DEATH(
      {
        DeviceBuffer<float> buffer(std::vector<float>(100, 1.0f));
        cudaDeviceSynchronize();
        *static_cast<volatile float*>(buffer.data() + 3) = 2;
      },
      "host code touches device memory: byte 12 of device buffer");
}

__global__ void recurse_kernel(float* out, int depth) {
  volatile float room[256];
  room[threadIdx.x] = 1;
  if (depth > 0) recurse_kernel(out, depth - 1);
  out[0] = room[threadIdx.x];
}

TEST_F(ShimMistakes, StackOverflow) {
  DeviceBuffer<float> out(1);
  EXPECT_DEATH(
      {
        launch("recurse", recurse_kernel, {.block = 2}, out.data(), 100000);
        cudaDeviceSynchronize();
      },
      "stack overflow\n  in kernel recurse_kernel");
}

// ---- misalignment

__global__ void load_kernel(float* out, const float* in, int offset) {
  const Pack<float> pack = load128(in + offset);
  store128(out + 4, pack);
}

TEST_F(ShimMistakes, MisalignedWideAccess) {
  const auto run = [](int in_offset, int out_offset) {
    DeviceBuffer<float> in(16), out(16);
    launch("load", load_kernel, {}, out.data() + out_offset, in.data(), in_offset);
    cudaDeviceSynchronize();
  };
  run(4, 4);
  EXPECT_DEATH(run(1, 0), "misaligned address in load128(.|\n)*test_shim_mistakes.cpp(.|\n)*kernel load_kernel");
  EXPECT_DEATH(run(0, 2), "misaligned address in store128");
}

// ---- rendezvous that do not work out

enum Fault {
  kNone,
  kPartOfAWarp,
  kExitedLane,
  kMissingLane,
  kDifferentOperations,
  kDivergentBarrier,
  kDivergentWarpBarrier,
  kBarrierAgainstExit,
  kBarrierAgainstShuffle,
  kPartOfMma
};

__global__ void faulty_kernel(int* out, Fault fault) {
  const unsigned lane = threadIdx.x % 32;
  int value = static_cast<int>(lane);
  switch (fault) {
    case kNone: break;
    case kPartOfAWarp:
      if (lane < 16) value = __shfl_sync(0xffffu, value, 16);
      break;
    case kExitedLane:
      if (lane == 5) return;
      value = __shfl_xor_sync(kAllLanes, value, 1);
      break;
    case kMissingLane:
      if (lane == 7) __syncthreads();
      __syncwarp();
      break;
    case kDifferentOperations:
      if (lane < 16) {
        value = __shfl_xor_sync(kAllLanes, value, 1);
      } else {
        value = __any_sync(kAllLanes, value);
      }
      break;
    case kDivergentBarrier:
      if (lane < 16) __syncthreads();
      __syncthreads();
      break;
    case kDivergentWarpBarrier:
      if (threadIdx.x < 32) __syncthreads();
      __syncthreads();
      break;
    case kBarrierAgainstExit:
      __syncthreads();
      if (lane < 16) __syncthreads();
      break;
    case kBarrierAgainstShuffle:
      if (lane < 16) {
        __syncthreads();
      } else {
        value = __shfl_xor_sync(kAllLanes, value, 1);
      }
      break;
    case kPartOfMma: {
      float d[4] = {};
      const uint32_t a[4] = {}, b[2] = {};
      if (lane < 31) mma_m16n8k16(d, a, b);
      value = static_cast<int>(d[0]);
      break;
    }
  }
  out[threadIdx.x] = value;
}

TEST_F(ShimMistakes, RendezvousThatDoNotWorkOut) {
  const auto run = [](Fault fault) {
    DeviceBuffer<int> out(64);
    launch("faulty", faulty_kernel, {.block = 64}, out.data(), fault);
    cudaDeviceSynchronize();
  };
  run(kNone);
  EXPECT_DEATH(run(kPartOfAWarp), "__shfl_sync with mask 0x0000ffff: only whole warps");
  EXPECT_DEATH(run(kExitedLane),
               "waits for lanes that have exited: 0x00000020|ends while lanes of its warp wait for it");
  EXPECT_DEATH(run(kMissingLane),
               "deadlock(.|\n)*threads 7 39: wait in __syncthreads at .*test_shim_mistakes.cpp:[0-9]+\n"
               "(.|\n)*threads 0-6 8-38 40-63: wait in __syncwarp at");
  EXPECT_DEATH(run(kDifferentOperations), "different operations: (__any|__shfl)");
  EXPECT_DEATH(run(kDivergentBarrier), "a barrier in a divergent branch");
  EXPECT_DEATH(run(kDivergentWarpBarrier), "a barrier in a divergent branch");
  EXPECT_DEATH(run(kBarrierAgainstExit), "a barrier in a divergent branch");
  EXPECT_DEATH(run(kBarrierAgainstShuffle), "deadlock(.|\n)*wait in __shfl_xor_sync(.|\n)*wait in __syncthreads");
  EXPECT_DEATH(run(kPartOfMma), "mma_m16n8k16");
}

}  // namespace
