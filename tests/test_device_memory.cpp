// test_device_memory.cpp: what a backend says of a device's memory, a device that can only be planned for, and host
// memory that the device cannot pin.
#include <numeric>

#include "kernels/cuda_workspace.h"
#include "tests/backends.h"

namespace {

// ---- a CUDA device that is not here

TEST(PlanningBackend, NeedsTheWorkspaceOfACudaDevice) {
  const std::vector<std::string> names = gpu_backend_names();
  if (names.empty()) GTEST_SKIP() << "no CUDA device";
  const auto planned = make_planning_backend(), real = make_test_backend(names[0]);
  for (const KernelShapes& shapes :
       {KernelShapes{}, KernelShapes{1, 1, 1, 1, 1, false}, KernelShapes{4, 64, 384, 6, 257, false},
        KernelShapes{8, 1024, 768, 12, 50257, true}, KernelShapes{3, 77, 1600, 25, 50304, true},
        KernelShapes{1, 2048, 12288, 96, 50257, true}, KernelShapes{64, 4096, 20480, 160, 50257, true},
        KernelShapes{1000001, 1, 8, 1, 8, true}}) {
    EXPECT_EQ(planned->workspace_bytes(shapes), real->workspace_bytes(shapes));
    EXPECT_EQ(planned->workspace_bytes(shapes) % kScratchAlignment, 0u) << "a backend leaves the rest unused";
  }
  EXPECT_EQ(planned->name(), real->name());
}

TEST(PlanningBackend, AllocatesNothing) {
  const auto backend = make_planning_backend();
  EXPECT_THROW(backend->allocate(1), std::runtime_error);
  EXPECT_THROW(backend->allocate_host(1), std::runtime_error);
  EXPECT_THROW(backend->measure_peak_flops(), std::runtime_error);
  EXPECT_EQ(backend->memory_available(), 0u);
  EXPECT_EQ(backend->allocated_bytes(), 0u);
  EXPECT_GT(backend->host_memory_available(), 0u);
  EXPECT_EQ(backend->runtime_bytes(), size_t{896} << 20);
  EXPECT_EQ(backend->description(), "a CUDA device that is not here");
  EXPECT_FALSE(backend->transforms_cosines(256, 768));
}

// ---- devices that are here

class DeviceMemory : public ::testing::TestWithParam<std::string> {
 protected:
  std::unique_ptr<Backend> backend_ = make_test_backend(GetParam());
};
INSTANTIATE_TEST_SUITE_P(All, DeviceMemory, ::testing::ValuesIn(backend_names()));

TEST_P(DeviceMemory, OfTheRuntimeIsMeasuredWithoutWhatWasGivenOut) {
  constexpr size_t kBytes = size_t{96} << 20, kTolerance = size_t{24} << 20;
  const size_t before = backend_->runtime_bytes();
  EXPECT_GT(before, 0u);
  EXPECT_LT(before, size_t{4} << 30);
  void* const untouched = backend_->allocate(kBytes);
  EXPECT_LT(backend_->runtime_bytes(), before + kTolerance);
  void *const device = backend_->allocate(kBytes), *const host = backend_->allocate_host(kBytes);
  backend_->fill(device, 1, kBytes);
  std::memset(host, 1, kBytes);
  backend_->synchronize();
  EXPECT_LT(backend_->runtime_bytes(), before + kTolerance);
  EXPECT_GT(backend_->runtime_bytes() + kTolerance, before);
  for (void* memory : {untouched, device}) backend_->release(memory);
  backend_->release_host(host);
  EXPECT_GT(backend_->host_memory_available(), kBytes);
}

// 40 numbers up and down again, twice through the same host memory; copies wait for one another as the streams say.
void expect_round_trip(Backend& backend, int32_t* up, int32_t* down) {
  constexpr int kCount = 40;
  constexpr size_t kBytes = kCount * sizeof(int32_t);
  void* const device = backend.allocate(kBytes);
  const int uploaded = backend.create_event();
  for (int round = 0; round < 2; ++round) {
    std::iota(up, up + kCount, 100 * round);
    backend.copy(device, up, kBytes, Stream::kCopy);
    backend.record(uploaded, Stream::kCopy);
    backend.wait(uploaded, Stream::kCompute);
    backend.copy(down, device, kBytes);
    backend.synchronize();
    EXPECT_EQ(std::vector<int32_t>(up, up + kCount), std::vector<int32_t>(down, down + kCount));
  }
  // Read when copy() returns, if it is not allocate_host()'s; the device is made to wait for what comes before.
  std::vector<int32_t> of_the_program(kCount, 7);
  backend.fill(device, 0, kBytes);
  backend.copy(device, of_the_program.data(), kBytes);
  of_the_program.assign(kCount, 8);
  backend.copy(down, device, kBytes);
  backend.synchronize();
  EXPECT_EQ(std::vector<int32_t>(down, down + kCount), std::vector<int32_t>(kCount, 7));
  backend.fill(down, 0, kBytes);
  backend.synchronize();
  EXPECT_EQ(std::vector<int32_t>(down, down + kCount), std::vector<int32_t>(kCount, 0));
  backend.release(device);
}

TEST_P(DeviceMemory, PinnedHostMemory) {
  void *const up = backend_->allocate_host(1000), *const down = backend_->allocate_host(1000);
  expect_round_trip(*backend_, static_cast<int32_t*>(up), static_cast<int32_t*>(down));
  EXPECT_EQ(backend_->host_memory_note(), "");
  for (void* memory : {up, down}) backend_->release_host(memory);
  EXPECT_THROW(backend_->release_host(up), std::logic_error);
}

// The shim can refuse to pin; elsewhere these variables change nothing.
class Setting {
 public:
  explicit Setting(const char* name) : name_(name) { setenv(name, "1", 1); }
  ~Setting() { unsetenv(name_); }
  Setting(const Setting&) = delete;
  Setting& operator=(const Setting&) = delete;

 private:
  const char* name_;
};

TEST_P(DeviceMemory, PageableHostMemoryInItsPlace) {
  const Setting no_pinned("CUDA_ON_CPU_NO_PINNED");
  void *const up = backend_->allocate_host(1000), *const down = backend_->allocate_host(1000);
  expect_round_trip(*backend_, static_cast<int32_t*>(up), static_cast<int32_t*>(down));
  const std::string note = backend_->host_memory_note();
  if (backend_->description().find("CUDA on CPU") != std::string::npos) {
    EXPECT_NE(note.find("pinned host memory was refused ("), std::string::npos) << note;
    EXPECT_NE(note.find("copies do not overlap"), std::string::npos) << note;
    EXPECT_THROW(backend_->allocate_host(size_t{1} << 46), std::runtime_error);
  }
  for (void* memory : {up, down}) backend_->release_host(memory);
  EXPECT_THROW(backend_->release_host(up), std::logic_error);
  void* const kept = backend_->allocate_host(10);  // released by the backend
  EXPECT_NE(kept, nullptr);
}

TEST_P(DeviceMemory, PageableHostMemoryThatTheDeviceReaches) {
  const Setting no_pinned("CUDA_ON_CPU_NO_PINNED"), reaches("CUDA_ON_CPU_REACHES_HOST");
  const auto backend = make_test_backend(GetParam());
  void *const up = backend->allocate_host(1000), *const down = backend->allocate_host(1000);
  expect_round_trip(*backend, static_cast<int32_t*>(up), static_cast<int32_t*>(down));
  for (void* memory : {up, down}) backend->release_host(memory);
}

}  // namespace
