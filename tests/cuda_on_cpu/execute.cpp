// execute.cpp: launching a kernel: its limits are checked when it is enqueued; when it runs, its blocks are shared out
// among OS threads in an order that the seed decides.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "tests/cuda_on_cpu/block.h"
#include "tests/cuda_on_cpu/report.h"
#include "tests/cuda_on_cpu/runtime.h"
#include "tests/cuda_on_cpu/stream.h"

namespace cuda_on_cpu {

namespace {

// OS threads that wait for work. Never destroyed: nobody joins them when the program ends.
class Pool {
 public:
  explicit Pool(unsigned threads) : helpers_(threads - 1) {
    for (unsigned i = 0; i < helpers_; ++i) std::thread([this] { serve(); }).detach();
  }

  // Returns when every fn(i) has; a helper that the system does not let run is not waited for.
  void run(uint64_t count, const std::function<void(uint64_t)>& fn) {
    const auto job = std::make_shared<Job>(count, fn);
    {
      std::lock_guard lock(mutex_);
      job_ = job;
    }
    start_.notify_all();
    work(*job);
    std::unique_lock lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [&] { return job->done == count; });
  }

  unsigned helpers() const { return helpers_; }

 private:
  struct Job {
    Job(uint64_t count_, const std::function<void(uint64_t)>& fn_) : count(count_), fn(fn_) {}
    const uint64_t count;
    const std::function<void(uint64_t)>& fn;  // gone when all is done
    std::atomic<uint64_t> next{0}, done{0};
  };

  void work(Job& job) {
    uint64_t finished = 0;
    for (uint64_t i; (i = job.next.fetch_add(1)) < job.count; ++finished) job.fn(i);
    if (finished == 0 || (job.done += finished) != job.count) return;
    const std::lock_guard lock(mutex_);
    done_.notify_one();
  }

  void serve() {
    std::shared_ptr<Job> job;
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        start_.wait(lock, [&] { return job_ != nullptr && job_ != job; });
        job = job_;
      }
      work(*job);
    }
  }

  const unsigned helpers_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::shared_ptr<Job> job_;
};

std::map<const void*, size_t>& opted_in() {
  static std::map<const void*, size_t> bytes;
  return bytes;
}

// CUDA_ON_CPU_FAIL_LAUNCH: "name" for the first kernel whose name contains it, "name:3" for the third.
bool is_made_to_fail(const std::string& name) {
  static uint64_t matches = 0;
  const std::string what = setting_text("CUDA_ON_CPU_FAIL_LAUNCH");
  const size_t colon = what.find(':');
  if (what.empty() || name.find(what.substr(0, colon)) == std::string::npos) return false;
  return ++matches == (colon == std::string::npos ? 1 : std::stoull(what.substr(colon + 1)));
}

// CUDA_ON_CPU_LOSE_BLOCK: of kernels whose name contains it the last block never runs.
bool loses_block(const std::string& name) {
  const std::string what = setting_text("CUDA_ON_CPU_LOSE_BLOCK");
  return !what.empty() && name.find(what) != std::string::npos;
}

void execute(Launch launch, const std::string& name) {
  static uint64_t launches = 0;
  launch.number = ++launches;
  if (is_made_to_fail(name)) return set_sticky_error(cudaErrorIllegalAddress);
  const uint64_t plane = uint64_t{launch.grid.x} * launch.grid.y, blocks = plane * launch.grid.z;
  // Block number i of the order is (first + i * stride) mod blocks, with a stride that has no factor in common with it.
  Random random(seed() * 0x9e3779b97f4a7c15u + launch.number);
  const uint64_t first = random.next() % blocks;
  uint64_t stride = random.next() % blocks + 1;
  while (std::gcd(stride, blocks) != 1) ++stride;
  const bool small = blocks * launch.block.x * launch.block.y * launch.block.z < 4096;
  const bool loses_last = loses_block(name);
  parallel_for(blocks, small, [&](uint64_t i) {
    const uint64_t number = (first + static_cast<unsigned __int128>(i) * stride % blocks) % blocks;
    if (loses_last && number + 1 == blocks) return;
    run_block(launch, {static_cast<unsigned>(number % launch.grid.x),
                       static_cast<unsigned>(number % plane / launch.grid.x), static_cast<unsigned>(number / plane)});
  });
}

}  // namespace

void parallel_for(uint64_t count, bool small, const std::function<void(uint64_t)>& fn) {
  // A forked process (a death test) has none of its parent's threads.
  static Pool* pool = nullptr;
  static pid_t owner = 0;
  if (pool == nullptr || owner != getpid()) {
    const uint64_t threads = setting("CUDA_ON_CPU_THREADS", std::thread::hardware_concurrency());
    pool = new Pool(static_cast<unsigned>(std::max<uint64_t>(threads, 1)));
    owner = getpid();
  }
  if (small || count <= 1 || pool->helpers() == 0) {
    for (uint64_t i = 0; i < count; ++i) fn(i);
  } else {
    pool->run(count, fn);
  }
}

size_t shared_memory_limit(const void* function) {
  constexpr size_t kWithoutOptIn = 48 << 10;
  const auto it = opted_in().find(function);
  return it == opted_in().end() ? kWithoutOptIn : std::max(kWithoutOptIn, it->second);
}

cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const void* function, Kernel kernel) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024 || block.z > 64 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return finish(cudaErrorInvalidConfiguration);
  }
  if (config.dynamicSmemBytes > shared_memory_limit(function)) return finish(cudaErrorInvalidValue);
  watch_for_crashes();
  const std::string name = kernel_name(function);
  Launch launch{function, std::move(kernel), grid, block, config.dynamicSmemBytes, 0};
  const cudaError_t status = enqueue(config.stream, name, [launch, name] { execute(launch, name); });
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(config.stream, &capturing);
  const bool blocking = setting("CUDA_LAUNCH_BLOCKING", 0) != 0 && capturing == cudaStreamCaptureStatusNone;
  return status == cudaSuccess && blocking ? cudaStreamSynchronize(config.stream) : status;
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(api_mutex());
  if (device_status() != cudaSuccess) return finish(device_status());
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return finish(cudaSuccess);
  if (value < 0 || value > shared_memory_per_block()) return finish(cudaErrorInvalidValue);
  opted_in()[kernel] = static_cast<size_t>(value);
  return finish(cudaSuccess);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const std::lock_guard lock(api_mutex());
  *attributes = {static_cast<int>(shared_memory_limit(kernel)), 1024};
  return finish(device_status());
}
