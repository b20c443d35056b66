// cpu_backend.cpp: the CPU as a device: memory, the backend's scratch, copies, and what the banner says about it. Both
// streams are the calling thread, so copies, events and waits are done when the call returns.
#include "kernels/cpu/cpu_backend.h"

#include <malloc.h>
#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/cosine_transform.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/machine.h"
#include "kernels/cpu/parallel.h"
#include "kernels/dispatch.h"

namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kHugePage = size_t{2} << 20;

// Memory that the process takes later: pieces of checkpoints on their way to a file.
constexpr size_t kFileBuffers = size_t{16} << 20;

// Address space, most of which is never used: what the allocator maps for a thread that asks for memory, a thread's
// stack, and what the thread that reads data ahead takes.
constexpr size_t kThreadHeap = size_t{128} << 20, kThreadStack = size_t{8} << 20, kReaderMapping = size_t{72} << 20;

// Of memory given back malloc keeps so much of each thread's, and nothing of larger blocks. glibc would raise both to
// the sizes it sees, up to 64 MiB a thread. What the library packs operands into (kGemmBuffers) stays below.
void limit_kept_memory() {
#ifdef M_TRIM_THRESHOLD
  mallopt(M_TRIM_THRESHOLD, 4 << 20);
  mallopt(M_MMAP_THRESHOLD, 4 << 20);
#endif
}

size_t round_up(size_t bytes, size_t alignment) { return (bytes + alignment - 1) / alignment * alignment; }

// Large blocks are aligned to and advised for huge pages: strided walks through weights then miss the TLB far less.
void* allocate_block(size_t bytes) {
  const bool large = bytes >= 2 * kHugePage;
  const size_t alignment = large ? kHugePage : kAlignment;
  void* memory = std::aligned_alloc(alignment, round_up(std::max<size_t>(bytes, 1), alignment));
  if (memory && large) madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

void* allocate_into(std::unordered_map<void*, size_t>& blocks, size_t bytes, size_t available, const char* kind) {
  // Linux promises memory it does not have and kills the process later; an error now is kinder.
  void* memory = bytes > available ? nullptr : allocate_block(bytes);
  if (!memory) {
    throw std::runtime_error("cannot allocate " + std::to_string(bytes) + " bytes of " + kind + " memory (" +
                             std::to_string(available) + " bytes are available)");
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

void* wait_for(void* gate) {
  const std::lock_guard wait(*static_cast<std::mutex*>(gate));
  return nullptr;
}

// Starts and ends `count` threads. OpenMP would end the program where they cannot be had.
void try_threads(int count) {
  std::vector<pthread_t> threads;
  std::mutex gate;
  int error = 0;
  {
    const std::lock_guard closed(gate);
    pthread_t thread;
    while (static_cast<int>(threads.size()) < count && (error = pthread_create(&thread, nullptr, wait_for, &gate)) == 0)
      threads.push_back(thread);
  }
  for (const pthread_t thread : threads) pthread_join(thread, nullptr);
  if (error != 0)
    throw std::runtime_error("only " + std::to_string(threads.size()) + " of " + std::to_string(count) +
                             " more threads can be started: " + std::strerror(error) +
                             "; use fewer --threads, or raise the limit (ulimit -u)");
}

}  // namespace

CpuBackend::CpuBackend(const CpuOptions& options)
    : threads_(options.threads), multiply_in_bf16_(options.multiply_in_bf16) {
  limit_kept_memory();
  if (threads_ < 0) throw std::runtime_error("the number of threads must be 0 (all cores) or more");
  if (threads_ == 0) threads_ = usable_cores();
}

CpuBackend::~CpuBackend() {
  for (const auto& block : device_blocks_) std::free(block.first);
  for (const auto& block : host_blocks_) std::free(block.first);
}

std::string CpuBackend::name() const { return "cpu"; }

std::string CpuBackend::description() const {
  return processor_name() + ", " + std::to_string(threads_) + (threads_ == 1 ? " thread, " : " threads, ") +
         gemm_description();
}

// A product cannot end in an error, so where address space is limited its part is set aside.
size_t CpuBackend::memory_available() const {
  const size_t mappable = mappable_memory();
  if (mappable == SIZE_MAX) return available_memory();
  const size_t aside = heaps_are_mapped_ ? 0 : kReaderMapping + (kThreadHeap + kThreadStack) * threads_;
  if (mappable <= aside)
    throw std::runtime_error("the limit on address space or data (ulimit -v, ulimit -d) leaves " +
                             std::to_string(mappable >> 20) + " MiB, " + std::to_string(threads_) +
                             " threads and their buffers alone take " + std::to_string(aside >> 20) +
                             "; raise it, or use fewer --threads");
  return std::min(available_memory(), mappable - aside);
}

void CpuBackend::check_threads() {
  if (!threads_checked_ && threads_ > 1) try_threads(threads_ - 1);
  threads_checked_ = true;
}

// What an allocation may take: asked for the first one and for large ones only.
size_t CpuBackend::room_for(size_t bytes) const {
  return device_blocks_.empty() || bytes >= 2 * kHugePage ? memory_available() : SIZE_MAX;
}

size_t CpuBackend::host_memory_available() const { return CpuBackend::memory_available(); }

size_t CpuBackend::runtime_bytes() const {
  size_t given_out = 0;
  for (const auto* blocks : {&device_blocks_, &host_blocks_})
    for (const auto& [memory, bytes] : *blocks) given_out += resident_bytes(memory, bytes);
  const size_t resident = resident_memory();
  return (resident > given_out ? resident - given_out : 0) + kFileBuffers + kGemmBuffers * threads_;
}

// The best of a few products of 1024 x 512 x 1024 (1.1 GFLOP, 8 MiB) through matmul(), within about half a second.
double CpuBackend::measure_peak_flops() {
  check_threads();
  constexpr int64_t kRows = 1024, kDepth = 512, kCols = 1024;
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
  for (int i = 0; i < 24 && total < 0.4; ++i) {
    const auto start = std::chrono::steady_clock::now();
    matmul(out, Tensor::of(a.get(), DType::kF32, {kRows, kDepth}), Tensor::of(b.get(), DType::kF32, {kDepth, kCols}),
           {});
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, 2.0 * kRows * kDepth * kCols / seconds);
    total += seconds;
  }
  profiler = outer_profiler;
  heaps_are_mapped_ = true;
  return best;
}

void* CpuBackend::allocate(size_t bytes) {
  const size_t room = room_for(bytes);
  check_threads();
  void* memory = allocate_into(device_blocks_, bytes, room, "CPU");
  allocated_ += bytes;
  return memory;
}

void CpuBackend::release(void* memory) { allocated_ -= release_from(device_blocks_, memory); }
void* CpuBackend::allocate_host(size_t bytes) { return allocate_into(host_blocks_, bytes, room_for(bytes), "host"); }
void CpuBackend::release_host(void* memory) { release_from(host_blocks_, memory); }
size_t CpuBackend::allocated_bytes() const { return allocated_; }

// An operation uses the workspace either as one piece per thread or as a whole, so its size is the larger of the two
// needs.
size_t CpuBackend::workspace_bytes(const KernelShapes& shapes) const {
  const int64_t channels = std::max<int64_t>(shapes.channels, 1);
  int64_t per_thread = 4 * (4 * channels + 1024);  // embedding rows, reductions of the optimizers
  static_assert(kLanes <= 16);  // so that this holds the vectors of a cosine transform, too: kLanes of C numbers
  per_thread = std::max(per_thread, attention_scratch_floats(shapes.sequence, channels, shapes.heads));
  if (shapes.any_bf16) per_thread = std::max(per_thread, kMatmulScratchFloats);
  const int64_t whole = (kMaxRowChunks + 1) * 4 * channels;  // bias and LayerNorm backward
  const size_t thread_bytes = round_up(static_cast<size_t>(per_thread) * sizeof(float), kAlignment);
  return std::max(thread_bytes * threads_, round_up(static_cast<size_t>(whole) * sizeof(float), kAlignment));
}

void CpuBackend::set_workspace(void* memory, size_t bytes, Stream) {
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

void CpuBackend::fill(void* destination, int byte, size_t bytes) {
  parallel_blocks(threads_, static_cast<int64_t>(bytes), int64_t{1} << 20, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(destination) + begin, byte, end - begin);
  });
}

void CpuBackend::synchronize() {}
int CpuBackend::create_event() { return 0; }
void CpuBackend::record(int, Stream) {}
void CpuBackend::wait(int, Stream) {}
void CpuBackend::synchronize_event(int) {}

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options) { return std::make_unique<CpuBackend>(options); }
