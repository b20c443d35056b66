// memory.cpp: device memory and page-locked host memory. Every buffer has a mapping of its own between two pages that
// nobody may touch; it ends at the upper one, or less than 256 bytes before it, and what is left of its pages holds a
// pattern that is checked after every execution. Outside of executions all device memory is out of reach, so host code
// that dereferences a device pointer crashes as it would with a GPU.
#include <sys/mman.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>

#include "tests/cuda_on_cpu/block.h"
#include "tests/cuda_on_cpu/queue.h"
#include "tests/cuda_on_cpu/report.h"
#include "tests/cuda_on_cpu/runtime.h"
#include "tests/cuda_on_cpu/sanitizer.h"
#include "tests/cuda_on_cpu/shared_memory.h"
#include "tests/cuda_on_cpu/stream.h"

namespace cuda_on_cpu {

namespace {

constexpr size_t kPage = 4096, kAlignment = 256;
constexpr unsigned char kCanary = 0xc7;
// Large buffers consist of large pages, which are much cheaper to hide and to show.
constexpr size_t kLarge = size_t{256} << 10, kLargePage = size_t{2} << 20;
// Filling all of a very large buffer with garbage would make it resident.
constexpr size_t kMostGarbage = size_t{256} << 20;
constexpr size_t kMostFreed = 1000;

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Buffer {
  unsigned char* mapping;
  size_t mapped;
  unsigned char* pages;  // between the guard pages
  size_t page_bytes;
  unsigned char* begin;
  size_t bytes;
  uint64_t number;  // of this allocation in the program
  bool visible;

  unsigned char* end() const { return begin + bytes; }
  unsigned char* pages_end() const { return pages + page_bytes; }
  // From here to begin, and from end to pages_end, lies the pattern that shows writes outside.
  unsigned char* front() const { return std::max(pages, begin - kPage); }
  std::string name() const {
    return "device buffer " + std::to_string(number) + " of " + std::to_string(bytes) + " bytes";
  }
};

std::map<const unsigned char*, Buffer> buffers;  // by begin
std::map<const unsigned char*, size_t> pinned;   // page-locked host memory
std::deque<Buffer> freed;                        // lately
size_t allocated = 0;
int access_depth = 0;

// The buffer that begins last at or before the address.
Buffer* buffer_before(const void* address) {
  auto it = buffers.upper_bound(static_cast<const unsigned char*>(address));
  return it == buffers.begin() ? nullptr : &std::prev(it)->second;
}

// The first byte that was written outside of a buffer, or null.
const unsigned char* check_canary(const Buffer& buffer) {
  const auto damaged = [](unsigned char byte) { return byte != kCanary; };
  unsigned char* p = std::find_if(buffer.front(), buffer.begin, damaged);
  if (p != buffer.begin) return p;
  p = std::find_if(buffer.end(), buffer.pages_end(), damaged);
  return p != buffer.pages_end() ? p : nullptr;
}

void poison(const Buffer& buffer) {
  sanitizer_poison(buffer.front(), static_cast<size_t>(buffer.begin - buffer.front()));
  sanitizer_poison(buffer.end(), static_cast<size_t>(buffer.pages_end() - buffer.end()));
}

void unpoison(const Buffer& buffer) {
  sanitizer_unpoison(buffer.front(), static_cast<size_t>(buffer.begin - buffer.front()));
  sanitizer_unpoison(buffer.end(), static_cast<size_t>(buffer.pages_end() - buffer.end()));
}

std::string describe(const Buffer& buffer, const unsigned char* address) {
  if (address < buffer.begin)
    return std::to_string(buffer.begin - address) + " bytes before the beginning of " + buffer.name();
  if (address < buffer.end()) return "byte " + std::to_string(address - buffer.begin) + " of " + buffer.name();
  return std::to_string(address - buffer.end()) + " bytes past the end of " + buffer.name();
}

void expose(const Buffer& buffer, bool visible) {
  mprotect(buffer.pages, buffer.page_bytes, visible ? PROT_READ | PROT_WRITE : PROT_NONE);
}

// Turns a crash in a guarded page into a report; any other crash goes on as it would have.
void handle_crash(int, siginfo_t* info, void*) {
  const auto* address = static_cast<const unsigned char*>(info->si_addr);
  std::string report = describe_shared_address(address);
  for (const auto& [begin, buffer] : buffers) {
    if (address >= buffer.pages - kPage && address < buffer.pages_end() + kPage) report = describe(buffer, address);
  }
  for (const Buffer& buffer : freed) {
    if (address >= buffer.pages - kPage && address < buffer.pages_end() + kPage) {
      report = describe(buffer, address) + ", which has been freed";
    }
  }
  const std::string thread = running_thread();
  if (!report.empty() && access_depth == 0) {
    fail("host code touches device memory: " + report);
  } else if (!report.empty()) {
    fail("an access outside of memory: " + report + (thread.empty() ? "" : "\n  in " + thread));
  } else if (is_stack_overflow(address)) {
    fail("stack overflow\n  in " + thread);
  } else if (!thread.empty()) {
    char text[32];
    snprintf(text, sizeof text, "%p", info->si_addr);
    fail(std::string("an access to ") + text + ", which is no memory of the block and no device memory\n  in " +
         thread);
  }
  signal(SIGSEGV, SIG_DFL);
}

}  // namespace

DeviceMemoryAccess::DeviceMemoryAccess() { ++access_depth; }

void show_device_memory(const std::vector<const void*>& addresses) {
  const auto show = [](Buffer& buffer) {
    if (buffer.visible) return;
    buffer.visible = true;
    expose(buffer, true);
  };
  for (const void* address : addresses) {
    if (touches_device_memory(address)) show(*buffer_before(address));
  }
  if (addresses.empty()) {
    for (auto& [begin, buffer] : buffers) show(buffer);
  }
}

DeviceMemoryAccess::~DeviceMemoryAccess() {
  if (--access_depth != 0) return;
  for (auto& [begin, buffer] : buffers) {
    if (!buffer.visible) continue;
    unpoison(buffer);
    if (const unsigned char* damaged = check_canary(buffer)) {
      fail("something wrote outside of device memory: " + describe(buffer, damaged) +
           "\n  found after the operations that ran until this synchronisation");
    }
    poison(buffer);
    buffer.visible = false;
    expose(buffer, false);
  }
}

bool is_device_range(const void* address, size_t bytes) {
  const std::lock_guard lock(api_mutex());
  const Buffer* buffer = buffer_before(address);
  const auto* begin = static_cast<const unsigned char*>(address);
  return buffer != nullptr && begin <= buffer->end() && bytes <= static_cast<size_t>(buffer->end() - begin);
}

bool touches_device_memory(const void* address) {
  const Buffer* buffer = buffer_before(address);
  return buffer != nullptr && static_cast<const unsigned char*>(address) < buffer->end();
}

void check_pointer_argument(const void* pointer, const void* function, size_t position) {
  if (pointer == nullptr || device_status() != cudaSuccess || is_device_range(pointer, 0) || is_pinned(pointer)) return;
  fail("argument " + std::to_string(position) + " of kernel " + kernel_name(function) +
       " points to no device memory that is allocated");
}

bool is_pinned(const void* address) {
  const std::lock_guard lock(api_mutex());
  auto it = pinned.upper_bound(static_cast<const unsigned char*>(address));
  if (it == pinned.begin()) return false;
  --it;
  return static_cast<const unsigned char*>(address) < it->first + it->second;
}

void watch_for_crashes() {
  if (kAddressSanitizer) return;
  static const bool once = [] {
    struct sigaction action = {};
    action.sa_sigaction = handle_crash;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    return true;
  }();
  (void)once;
}

static size_t memory_of_device() { return setting("CUDA_ON_CPU_MEMORY", uint64_t{4} << 30); }

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard lock(api_mutex());
  *total = memory_of_device();
  *free = *total - std::min(*total, allocated);
  return finish(device_status());
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const std::lock_guard lock(api_mutex());
  *memory = nullptr;
  if (device_status() != cudaSuccess) return finish(device_status());
  if (const cudaError_t status = forbid_during_capture(); status != cudaSuccess) return finish(status);
  if (bytes == 0) return finish(cudaSuccess);
  if (bytes > memory_of_device() || allocated > memory_of_device() - bytes) return finish(cudaErrorMemoryAllocation);
  watch_for_crashes();
  static uint64_t number = 0;
  Buffer buffer;
  const size_t page = bytes < kLarge ? kPage : kLargePage;
  buffer.page_bytes = round_up(bytes, page);
  // Guard pages on both sides, and room to begin at a multiple of the page size.
  const size_t mapped = buffer.page_bytes + page + 2 * kPage;
  void* mapping = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return finish(cudaErrorMemoryAllocation);
  buffer.mapping = static_cast<unsigned char*>(mapping);
  buffer.mapped = mapped;
  buffer.pages = buffer.mapping + round_up(reinterpret_cast<uintptr_t>(mapping) + kPage, page) -
                 reinterpret_cast<uintptr_t>(mapping);
  buffer.begin = buffer.pages_end() - round_up(bytes, kAlignment);
  buffer.bytes = bytes;
  buffer.number = ++number;
  if (bytes >= kLarge) madvise(buffer.pages, buffer.page_bytes, MADV_HUGEPAGE);
  mprotect(buffer.pages, buffer.page_bytes, PROT_READ | PROT_WRITE);
  memset(buffer.front(), kCanary, static_cast<size_t>(buffer.begin - buffer.front()));
  fill_with_garbage(buffer.begin, std::min(bytes, kMostGarbage));
  memset(buffer.end(), kCanary, static_cast<size_t>(buffer.pages_end() - buffer.end()));
  poison(buffer);
  buffer.visible = false;
  expose(buffer, false);
  buffers[buffer.begin] = buffer;
  allocated += bytes;
  *memory = buffer.begin;
  return finish(cudaSuccess);
}

cudaError_t cudaFree(void* memory) {
  const std::lock_guard lock(api_mutex());
  if (memory == nullptr) return finish(device_status());
  const auto it = buffers.find(static_cast<unsigned char*>(memory));
  if (it == buffers.end()) return finish(cudaErrorInvalidValue);
  if (const cudaError_t status = forbid_during_capture(); status != cudaSuccess) return finish(status);
  drain_all();
  const Buffer& buffer = it->second;
  allocated -= buffer.bytes;
  unpoison(buffer);
  // The addresses stay reserved for a while, so that a late access is seen and not taken for another one.
  mmap(buffer.pages, buffer.page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  freed.push_back(buffer);
  if (freed.size() > kMostFreed) {
    munmap(freed.front().mapping, freed.front().mapped);
    freed.pop_front();
  }
  buffers.erase(it);
  return finish(cudaSuccess);
}

cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  const std::lock_guard lock(api_mutex());
  *memory = nullptr;
  if (device_status() != cudaSuccess) return finish(device_status());
  if (const cudaError_t status = forbid_during_capture(); status != cudaSuccess) return finish(status);
  if (bytes == 0) return finish(cudaSuccess);
  if (setting("CUDA_ON_CPU_NO_PINNED", 0) != 0) return finish(cudaErrorMemoryAllocation);
  void* block = nullptr;
  if (posix_memalign(&block, kPage, bytes) != 0) return finish(cudaErrorMemoryAllocation);
  fill_with_garbage(block, std::min(bytes, kMostGarbage));
  pinned[static_cast<unsigned char*>(block)] = bytes;
  *memory = block;
  return finish(cudaSuccess);
}

cudaError_t cudaFreeHost(void* memory) {
  const std::lock_guard lock(api_mutex());
  if (memory == nullptr) return finish(device_status());
  const auto it = pinned.find(static_cast<unsigned char*>(memory));
  if (it == pinned.end()) return finish(cudaErrorInvalidValue);
  if (const cudaError_t status = forbid_during_capture(); status != cudaSuccess) return finish(status);
  drain_all();
  pinned.erase(it);
  free(memory);
  return finish(cudaSuccess);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const std::lock_guard lock(api_mutex());
  void* const address = const_cast<void*>(pointer);
  *attributes = {cudaMemoryTypeUnregistered, -1, nullptr, address};
  if (touches_device_memory(pointer)) *attributes = {cudaMemoryTypeDevice, 0, address, nullptr};
  if (is_pinned(pointer)) *attributes = {cudaMemoryTypeHost, 0, address, address};
  return finish(device_status());
}
