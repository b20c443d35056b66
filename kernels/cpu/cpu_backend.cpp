// cpu_backend.cpp: the CPU as a device: memory, the backend's scratch, copies, and what the banner says about it. Both
// streams are the calling thread, so copies, events and waits are done when the call returns.
#include "kernels/cpu/cpu_backend.h"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/blas_core.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/machine.h"
#include "kernels/cpu/parallel.h"
#include "kernels/dispatch.h"

namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kHugePage = size_t{2} << 20;

// Memory that the process takes later: pieces of checkpoints on their way to a file, and what a thread of OpenBLAS packs
// matrices into: kGemmRows times a depth of at most 512 (Nehalem's; 320 or 384 on later processors), and about 1.5 MiB
// for the other operand, in whole huge pages.
constexpr size_t kFileBuffers = size_t{16} << 20, kBlasBuffers = size_t{8} << 20;

size_t round_up(size_t bytes, size_t alignment) { return (bytes + alignment - 1) / alignment * alignment; }

// Large blocks are aligned to and advised for huge pages: strided walks through weights then miss the TLB far less.
void* allocate_block(size_t bytes) {
  const bool large = bytes >= 2 * kHugePage;
  // Linux promises memory it does not have and kills the process later; an error now is kinder.
  if (large && bytes > available_memory()) return nullptr;
  const size_t alignment = large ? kHugePage : kAlignment;
  void* memory = std::aligned_alloc(alignment, round_up(std::max<size_t>(bytes, 1), alignment));
  if (memory && large) madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

void* allocate_into(std::unordered_map<void*, size_t>& blocks, size_t bytes, const char* kind) {
  void* memory = allocate_block(bytes);
  if (!memory) {
    throw std::runtime_error("cannot allocate " + std::to_string(bytes) + " bytes of " + kind + " memory (" +
                             std::to_string(available_memory()) + " bytes are available)");
  }
  blocks[memory] = bytes;
  return memory;
}

size_t release_from(std::unordered_map<void*, size_t>& blocks, void* memory) {
  if (!memory) return 0;
  const auto block = blocks.find(memory);
  require(block != blocks.end(), "release: not allocated by this backend");
  const size_t bytes = block->second;
  std::free(memory);
  blocks.erase(block);
  return bytes;
}

}  // namespace

CpuBackend::CpuBackend(const CpuOptions& options) : threads_(options.threads) {
  if (threads_ < 0) throw std::runtime_error("the number of threads must be 0 (all cores) or more");
  if (threads_ == 0) threads_ = usable_cores();
  use_one_blas_thread();
}

CpuBackend::~CpuBackend() {
  for (const auto& block : device_blocks_) std::free(block.first);
  for (const auto& block : host_blocks_) std::free(block.first);
}

std::string CpuBackend::name() const { return "cpu"; }

std::string CpuBackend::description() const {
  return processor_name() + ", " + std::to_string(threads_) + (threads_ == 1 ? " thread, " : " threads, ") +
         blas_description();
}

size_t CpuBackend::memory_available() const { return available_memory(); }
size_t CpuBackend::host_memory_available() const { return available_memory(); }

size_t CpuBackend::runtime_bytes() const {
  size_t given_out = 0;
  for (const auto* blocks : {&device_blocks_, &host_blocks_})
    for (const auto& [memory, bytes] : *blocks) given_out += resident_bytes(memory, bytes);
  const size_t resident = resident_memory();
  return (resident > given_out ? resident - given_out : 0) + kFileBuffers + kBlasBuffers * threads_;
}

// The best of a few products of 2048 x 1024 x 2048 (8.6 GFLOP) through matmul(), within about half a second.
double CpuBackend::measure_peak_flops() {
  constexpr int64_t kRows = 2048, kDepth = 1024, kCols = 2048;
  auto random_matrix = [](int64_t elements) {
    std::unique_ptr<float[]> values(new float[elements]);
    uint32_t state = 1;
    for (int64_t i = 0; i < elements; ++i) {
      state = state * 1664525u + 1013904223u;
      values[i] = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
    }
    return values;
  };
  const auto a = random_matrix(kRows * kDepth), b = random_matrix(kDepth * kCols), c = random_matrix(kRows * kCols);
  const Tensor out = Tensor::of(c.get(), DType::kF32, {kRows, kCols});
  Profiler* const outer_profiler = profiler;
  profiler = nullptr;
  double best = 0, total = 0;
  for (int i = 0; i < 12 && total < 0.4; ++i) {
    const auto start = std::chrono::steady_clock::now();
    matmul(out, Tensor::of(a.get(), DType::kF32, {kRows, kDepth}), Tensor::of(b.get(), DType::kF32, {kDepth, kCols}),
           {});
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, 2.0 * kRows * kDepth * kCols / seconds);
    total += seconds;
  }
  profiler = outer_profiler;
  return best;
}

void* CpuBackend::allocate(size_t bytes) {
  void* memory = allocate_into(device_blocks_, bytes, "CPU");
  allocated_ += bytes;
  return memory;
}

void CpuBackend::release(void* memory) { allocated_ -= release_from(device_blocks_, memory); }
void* CpuBackend::allocate_host(size_t bytes) { return allocate_into(host_blocks_, bytes, "host"); }
void CpuBackend::release_host(void* memory) { release_from(host_blocks_, memory); }
size_t CpuBackend::allocated_bytes() const { return allocated_; }

// An operation uses the workspace either as one piece per thread or as a whole, so its size is the larger of the two
// needs.
size_t CpuBackend::workspace_bytes(const KernelShapes& shapes) const {
  const int64_t channels = std::max<int64_t>(shapes.channels, 1);
  int64_t per_thread = 4 * (4 * channels + 1024);  // embedding rows, reductions of the optimizers
  per_thread = std::max(per_thread, attention_scratch_floats(shapes.sequence, channels, shapes.heads));
  if (shapes.any_bf16) per_thread = std::max(per_thread, kMatmulScratchFloats);
  const int64_t whole = (kMaxRowChunks + 1) * 4 * channels;  // bias and LayerNorm backward
  const size_t thread_bytes = round_up(static_cast<size_t>(per_thread) * sizeof(float), kAlignment);
  return std::max(thread_bytes * threads_, round_up(static_cast<size_t>(whole) * sizeof(float), kAlignment));
}

void CpuBackend::set_workspace(void* memory, size_t bytes) {
  workspace_ = static_cast<char*>(memory);
  workspace_bytes_ = bytes;
}

float* CpuBackend::thread_scratch(size_t bytes) const {
  const size_t part = workspace_bytes_ / threads_ / kAlignment * kAlignment;
  require(bytes <= part, "the workspace is too small for one thread's scratch");
  return reinterpret_cast<float*>(workspace_ + part * omp_get_thread_num());
}

float* CpuBackend::shared_scratch(size_t bytes) const {
  require(bytes <= workspace_bytes_, "the workspace is too small");
  return reinterpret_cast<float*>(workspace_);
}

void CpuBackend::copy(void* destination, const void* source, size_t bytes, Stream) {
  parallel_blocks(threads_, static_cast<int64_t>(bytes), int64_t{1} << 20, [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(destination) + begin, static_cast<const char*>(source) + begin, end - begin);
  });
}

void CpuBackend::fill(void* destination, int byte, size_t bytes, Stream) {
  parallel_blocks(threads_, static_cast<int64_t>(bytes), int64_t{1} << 20, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(destination) + begin, byte, end - begin);
  });
}

void CpuBackend::synchronize(Stream) {}
int CpuBackend::create_event() { return 0; }
void CpuBackend::record(int, Stream) {}
void CpuBackend::wait(int, Stream) {}
void CpuBackend::synchronize_event(int) {}

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options) { return std::make_unique<CpuBackend>(options); }
