// The host's side of the shim: streams, events, graphs, copies, limits and errors behave as the documentation says, and
// what a GPU would answer with wrong numbers some of the time is wrong here under some seed.
#include <gtest/gtest.h>

#include <cstdio>
#include <vector>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "tests/cuda_on_cpu/test_buffer.h"

namespace {

__global__ void add_kernel(int* out, const int* in, int value) { out[threadIdx.x] = in[threadIdx.x] + value; }

void add(int* out, const int* in, int value, cudaStream_t stream) {
  launch("add", add_kernel, {.block = 8, .stream = stream}, out, in, value);
}

class ShimStreams : public testing::Test {
 protected:
  static void SetUpTestSuite() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }

  void SetUp() override {
    for (cudaStream_t* stream : {&compute_, &copy_}) {
      ASSERT_EQ(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), cudaSuccess);
    }
    for (cudaEvent_t* event : {&event_, &event2_}) ASSERT_EQ(cudaEventCreate(event), cudaSuccess);
    void* memory = nullptr;
    ASSERT_EQ(cudaMallocHost(&memory, 8 * sizeof(int)), cudaSuccess);
    pinned_ = static_cast<int*>(memory);
  }

  void TearDown() override {
    EXPECT_EQ(cudaFreeHost(pinned_), cudaSuccess);
    for (cudaEvent_t event : {event_, event2_}) EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
    for (cudaStream_t stream : {compute_, copy_}) EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  }

  // How often does `run` give the wrong result in 30 tries?
  template <typename Run>
  static int wrong_results(Run run) {
    int wrong = 0;
    for (int i = 0; i < 30; ++i) wrong += run() ? 0 : 1;
    return wrong;
  }

  cudaStream_t compute_ = nullptr, copy_ = nullptr;
  cudaEvent_t event_ = nullptr, event2_ = nullptr;
  int* pinned_ = nullptr;
};

// ---- order

TEST_F(ShimStreams, TheDeviceIsMostlyLateAndSometimesFast) {
  DeviceBuffer<int> x(std::vector<int>(8, 1));
  int late = 0, value = 1;
  for (int i = 0; i < 100; ++i) {
    add(x.data(), x.data(), 1, compute_);
    ++value;
    pinned_[0] = -5;
    ASSERT_EQ(cudaMemcpyAsync(pinned_, x.data(), 32, cudaMemcpyDefault, compute_), cudaSuccess);
    EXPECT_EQ(cudaEventRecord(event_, compute_), cudaSuccess);
    if (pinned_[0] == -5) {
      ++late;
      EXPECT_EQ(cudaEventQuery(event_), cudaErrorNotReady);
      EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    }
    EXPECT_EQ(cudaEventSynchronize(event_), cudaSuccess);
    EXPECT_EQ(pinned_[0], value);
    EXPECT_EQ(cudaEventQuery(event_), cudaSuccess);
  }
  EXPECT_GE(late, 50);
  EXPECT_LE(late, 95);
}

TEST_F(ShimStreams, EventsOrderStreams) {
  DeviceBuffer<int> x(8), y(8);
  const auto run = [&](bool wait_before_compute, bool wait_before_copy) {
    cudaMemsetAsync(x.data(), 0, 32);
    cudaMemsetAsync(y.data(), 0, 32);
    cudaDeviceSynchronize();
    for (int i = 0; i < 8; ++i) pinned_[i] = i;
    cudaMemcpyAsync(x.data(), pinned_, 32, cudaMemcpyDefault, copy_);
    cudaEventRecord(event_, copy_);
    if (wait_before_compute) cudaStreamWaitEvent(compute_, event_);
    add(y.data(), x.data(), 10, compute_);
    cudaEventRecord(event2_, compute_);
    if (wait_before_copy) cudaStreamWaitEvent(copy_, event2_);
    cudaMemcpyAsync(pinned_, y.data(), 32, cudaMemcpyDefault, copy_);
    cudaStreamSynchronize(copy_);
    bool right = true;
    for (int i = 0; i < 8; ++i) right = right && pinned_[i] == i + 10;
    cudaDeviceSynchronize();
    return right;
  };
  EXPECT_EQ(wrong_results([&] { return run(true, true); }), 0);
  EXPECT_GE(wrong_results([&] { return run(false, true); }), 5);
  EXPECT_GE(wrong_results([&] { return run(true, false); }), 5);
}

// A buffer that the copy stream still reads is overwritten by the compute stream.
TEST_F(ShimStreams, MissingWaitBeforeReuse) {
  DeviceBuffer<int> x(8);
  const auto run = [&](bool wait) {
    cudaMemsetAsync(x.data(), 0, 32);
    cudaDeviceSynchronize();
    add(x.data(), x.data(), 1, compute_);
    cudaEventRecord(event_, compute_);
    cudaStreamWaitEvent(copy_, event_);
    cudaMemcpyAsync(pinned_, x.data(), 32, cudaMemcpyDefault, copy_);
    cudaEventRecord(event2_, copy_);
    if (wait) cudaStreamWaitEvent(compute_, event2_);
    add(x.data(), x.data(), 1, compute_);
    cudaStreamSynchronize(compute_);
    cudaStreamSynchronize(copy_);
    return pinned_[0] == 1;
  };
  EXPECT_EQ(wrong_results([&] { return run(true); }), 0);
  EXPECT_GE(wrong_results([&] { return run(false); }), 5);
}

TEST_F(ShimStreams, AWaitIsForTheLatestRecordBeforeIt) {
  DeviceBuffer<int> x(std::vector<int>(8, 0)), y(8);
  cudaDeviceSynchronize();
  ASSERT_EQ(cudaStreamWaitEvent(copy_, event_), cudaSuccess);  // never recorded: no wait
  add(x.data(), x.data(), 1, compute_);
  ASSERT_EQ(cudaEventRecord(event_, compute_), cudaSuccess);
  ASSERT_EQ(cudaStreamWaitEvent(copy_, event_), cudaSuccess);
  ASSERT_EQ(cudaMemcpyAsync(y.data(), x.data(), 32, cudaMemcpyDefault, copy_), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(event_, copy_), cudaSuccess);
  ASSERT_EQ(cudaEventSynchronize(event_), cudaSuccess);
  EXPECT_EQ(y.read(), std::vector<int>(8, 1));
}

TEST_F(ShimStreams, EventsMeasureTime) {
  DeviceBuffer<int> x(std::vector<int>(8, 0));
  cudaEventRecord(event_, compute_);
  add(x.data(), x.data(), 1, compute_);
  cudaEventRecord(event2_, compute_);
  float milliseconds = -1;
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, event_, event2_), cudaEventQuery(event2_));
  cudaStreamSynchronize(compute_);
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, event_, event2_), cudaSuccess);
  EXPECT_GE(milliseconds, 0);
}

// ---- copies

TEST_F(ShimStreams, PageableSourcesAreReadAtTheCallPinnedOnesLater) {
  DeviceBuffer<int> x(8);
  std::vector<int> pageable(8, 1);
  cudaMemcpyAsync(x.data(), pageable.data(), 32, cudaMemcpyDefault, compute_);
  pageable.assign(8, 2);
  EXPECT_EQ(x.read(), std::vector<int>(8, 1));
  // Changing a page-locked buffer too early is wrong, and so is changing it too late.
  int early = 0, late = 0;
  for (int i = 0; i < 100; ++i) {
    pinned_[3] = 1;
    cudaMemcpyAsync(x.data(), pinned_, 32, cudaMemcpyDefault, compute_);
    pinned_[3] = 2;
    ++(x.read()[3] == 1 ? early : late);
  }
  EXPECT_GE(early, 5);
  EXPECT_GE(late, 50);
}

TEST_F(ShimStreams, PageableDestinationsAreWrittenAtTheCall) {
  DeviceBuffer<int> x(std::vector<int>(8, 1));
  std::vector<int> pageable(8, 0);
  add(x.data(), x.data(), 1, compute_);
  cudaMemcpyAsync(pageable.data(), x.data(), 32, cudaMemcpyDefault, compute_);
  EXPECT_EQ(pageable, std::vector<int>(8, 2));
}

TEST_F(ShimStreams, CopiesThatCannotBe) {
  DeviceBuffer<int> x(8);
  std::vector<int> host(16);
  EXPECT_EQ(cudaMemcpyAsync(x.data(), host.data(), 33, cudaMemcpyDefault), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpyAsync(host.data(), x.data() + 1, 32, cudaMemcpyDefault), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(x.data() + 1, 0, 32), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(host.data(), 0, 32), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
}

// ---- graphs

TEST_F(ShimStreams, GraphsAreRecordedAndReplayed) {
  DeviceBuffer<int> x(std::vector<int>(8, 0)), y(std::vector<int>(8, 0));
  cudaDeviceSynchronize();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaStreamCaptureStatus status;
  ASSERT_EQ(cudaStreamBeginCapture(compute_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  EXPECT_EQ(cudaStreamIsCapturing(compute_, &status), cudaSuccess);
  EXPECT_EQ(status, cudaStreamCaptureStatusActive);
  add(x.data(), x.data(), 1, compute_);
  // A branch on another stream, joined again.
  cudaEventRecord(event_, compute_);
  cudaStreamWaitEvent(copy_, event_);
  cudaMemcpyAsync(pinned_, x.data(), 32, cudaMemcpyDefault, copy_);
  cudaEventRecord(event2_, copy_);
  add(y.data(), x.data(), 100, compute_);
  cudaStreamWaitEvent(compute_, event2_);
  cudaMemsetAsync(x.data() + 7, 0, 4, compute_);
  ASSERT_EQ(cudaStreamEndCapture(compute_, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph), cudaSuccess);
  ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(x.read(), std::vector<int>(8, 0)) << "capturing runs nothing";
  for (int i = 1; i <= 10; ++i) {
    ASSERT_EQ(cudaGraphLaunch(executable, compute_), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(compute_), cudaSuccess);
    EXPECT_EQ(pinned_[0], i);
    EXPECT_EQ(pinned_[7], 1);
    EXPECT_EQ(y.read(), (std::vector<int>{100 + i, 100 + i, 100 + i, 100 + i, 100 + i, 100 + i, 100 + i, 101}));
  }
  EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
}

TEST_F(ShimStreams, WhatACaptureDoesNotPermit) {
  DeviceBuffer<int> x(std::vector<int>(8, 0));
  std::vector<int> host(8);
  cudaGraph_t graph = nullptr;
  const auto refused = [&](auto call, cudaError_t error) {
    EXPECT_EQ(cudaStreamBeginCapture(compute_, cudaStreamCaptureModeGlobal), cudaSuccess);
    EXPECT_EQ(call(), error);
    EXPECT_EQ(cudaStreamEndCapture(compute_, &graph), cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(graph, nullptr);
    EXPECT_EQ(cudaGetLastError(), cudaErrorStreamCaptureInvalidated);
  };
  void* memory = nullptr;
  const cudaError_t unsupported = cudaErrorStreamCaptureUnsupported;
  refused([&] { return cudaStreamSynchronize(compute_); }, unsupported);
  refused([&] { return cudaDeviceSynchronize(); }, unsupported);
  refused([&] { return cudaMalloc(&memory, 100); }, unsupported);
  refused([&] { return cudaMemcpyAsync(x.data(), host.data(), 32, cudaMemcpyDefault, compute_); }, unsupported);
  refused([&] { return cudaMemcpyAsync(host.data(), x.data(), 32, cudaMemcpyDefault, compute_); }, unsupported);
  cudaEventRecord(event_, copy_);
  refused([&] { return cudaStreamWaitEvent(compute_, event_); }, cudaErrorStreamCaptureIsolation);
  EXPECT_EQ(cudaStreamEndCapture(compute_, &graph), cudaErrorStreamCaptureUnmatched);

  // A branch that does not come back.
  EXPECT_EQ(cudaStreamBeginCapture(compute_, cudaStreamCaptureModeGlobal), cudaSuccess);
  add(x.data(), x.data(), 1, compute_);
  cudaEventRecord(event_, compute_);
  EXPECT_EQ(cudaEventSynchronize(event_), cudaErrorCapturedEvent);
  cudaStreamWaitEvent(copy_, event_);
  add(x.data(), x.data(), 1, copy_);
  EXPECT_EQ(cudaStreamEndCapture(compute_, &graph), cudaErrorStreamCaptureUnjoined);
  EXPECT_EQ(cudaGetLastError(), cudaErrorStreamCaptureUnjoined);
  EXPECT_EQ(cudaStreamWaitEvent(copy_, event_), cudaErrorCapturedEvent);
  EXPECT_EQ(cudaGetLastError(), cudaErrorCapturedEvent);
  EXPECT_EQ(x.read(), std::vector<int>(8, 0));
}

// ---- limits

__global__ void nothing_kernel() {}
__global__ void nothing_either_kernel() {}

TEST_F(ShimStreams, LaunchLimits) {
  const auto launch_with = [](dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)() = nothing_kernel) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    return cudaLaunchKernelEx(&config, kernel);
  };
  EXPECT_EQ(launch_with(1, 1024, 48 << 10), cudaSuccess);
  EXPECT_EQ(launch_with(1, {16, 1, 64}, 0), cudaSuccess);
  EXPECT_EQ(launch_with({1, 65535, 1}, 1, 0), cudaSuccess);
  EXPECT_EQ(launch_with(1, 1025, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch_with(1, {4, 1, 65}, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch_with(1, {32, 33}, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch_with({1, 65536, 1}, 1, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch_with({1, 1, 65536}, 1, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch_with(0x80000000u, 1, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch_with(0, 1, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch_with(1, 0, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch_with(1, 32, (48 << 10) + 1), cudaErrorInvalidValue);
  const auto opt_in = [](int bytes) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(nothing_kernel),
                                cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  cudaDeviceProp properties;
  ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
  const int most = static_cast<int>(properties.sharedMemPerBlockOptin);  // 227 KB of compute capability 9.0
  EXPECT_EQ(opt_in(most + 1), cudaErrorInvalidValue);
  EXPECT_EQ(opt_in(90 << 10), cudaSuccess);
  EXPECT_EQ(launch_with(1, 32, 90 << 10), cudaSuccess);
  EXPECT_EQ(launch_with(1, 32, (90 << 10) + 1), cudaErrorInvalidValue);
  EXPECT_EQ(launch_with(1, 32, 90 << 10, nothing_either_kernel), cudaErrorInvalidValue);
  EXPECT_EQ(opt_in(most), cudaSuccess);
  EXPECT_EQ(launch_with(1, 32, static_cast<size_t>(most)), cudaSuccess);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST_F(ShimStreams, MemoryIsLimited) {
  setenv("CUDA_ON_CPU_MEMORY", "1000000", 1);
  void *first = nullptr, *second = nullptr;
  size_t free = 0, total = 0;
  EXPECT_EQ(cudaMalloc(&first, 600000), cudaSuccess);
  EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  EXPECT_EQ(total, 1000000u);
  EXPECT_EQ(free, 400000u);
  EXPECT_EQ(cudaMalloc(&second, 400001), cudaErrorMemoryAllocation);
  EXPECT_EQ(second, nullptr);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(cudaFree(first), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&second, 400001), cudaSuccess);
  EXPECT_EQ(cudaFree(second), cudaSuccess);
  EXPECT_EQ(cudaFree(second), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
  unsetenv("CUDA_ON_CPU_MEMORY");
}

// ---- failing devices, each in a process of its own

#define EXPECT_IN_CHILD(condition) \
  if (!(condition)) {              \
    fprintf(stderr, #condition);   \
    exit(1);                       \
  }

void check_sticky_error() {
  setenv("CUDA_ON_CPU_FAIL_LAUNCH", "add_kernel", 1);
  DeviceBuffer<int> x(std::vector<int>(8, 0));
  EXPECT_IN_CHILD(cudaDeviceSynchronize() == cudaSuccess);
  launch("nothing", nothing_kernel, {});
  EXPECT_IN_CHILD(cudaDeviceSynchronize() == cudaSuccess);
  add(x.data(), x.data(), 1, nullptr);
  EXPECT_IN_CHILD(cudaDeviceSynchronize() == cudaErrorIllegalAddress);
  EXPECT_IN_CHILD(cudaGetLastError() == cudaErrorIllegalAddress);
  EXPECT_IN_CHILD(cudaGetLastError() == cudaErrorIllegalAddress);
  void* memory = nullptr;
  EXPECT_IN_CHILD(cudaMalloc(&memory, 4) == cudaErrorIllegalAddress);
  try {
    add(x.data(), x.data(), 1, nullptr);
  } catch (const std::runtime_error& error) {
    fprintf(stderr, "%s", error.what());
    exit(0);
  }
  exit(1);
}

TEST_F(ShimStreams, AnErrorOfTheDeviceStays) {
  const char* const message = "CUDA: an illegal memory access was encountered in kernel add or an earlier one";
  EXPECT_EXIT(check_sticky_error(), testing::ExitedWithCode(0), message);
}

void check_missing_device(const char* variable, const char* value, cudaError_t expected) {
  setenv(variable, value, 1);
  int count = -1;
  EXPECT_IN_CHILD(cudaGetDeviceCount(&count) == expected);
  EXPECT_IN_CHILD(count == 0);
  void* memory = nullptr;
  EXPECT_IN_CHILD(cudaMalloc(&memory, 100) == expected);
  fprintf(stderr, "%s", cudaGetErrorString(cudaGetLastError()));
  exit(0);
}

TEST_F(ShimStreams, NoDevice) {
  EXPECT_EXIT(check_missing_device("CUDA_ON_CPU_DEVICES", "0", cudaErrorNoDevice), testing::ExitedWithCode(0),
              "no CUDA-capable device is detected");
  EXPECT_EXIT(check_missing_device("CUDA_ON_CPU_DRIVER_TOO_OLD", "1", cudaErrorInsufficientDriver),
              testing::ExitedWithCode(0), "driver version is insufficient");
}

}  // namespace
