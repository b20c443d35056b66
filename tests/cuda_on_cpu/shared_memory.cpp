// shared_memory.cpp: see shared_memory.h and async_copy.h.
#include "tests/cuda_on_cpu/shared_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "tests/cuda_on_cpu/async_copy.h"
#include "tests/cuda_on_cpu/sanitizer.h"

namespace cuda_on_cpu {

namespace {

constexpr size_t kPage = 4096, kAlignment = 1024, kFront = 1024;
constexpr size_t kReadable = (kMaxSharedBytes + kFront + kPage - 1) / kPage * kPage;
constexpr unsigned char kCanary = 0xc7;

}  // namespace

void fill_with_garbage(void* memory, size_t bytes) {
  unsigned char* p = static_cast<unsigned char*>(memory);
  const uint64_t pattern = 0x7fa17fa17fa17fa1u;
  size_t i = 0;
  for (; i + sizeof pattern <= bytes; i += sizeof pattern) memcpy(p + i, &pattern, sizeof pattern);
  memcpy(p + i, &pattern, bytes - i);
}

SharedMemory::SharedMemory() {
  void* memory = mmap(nullptr, kReadable + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<unsigned char*>(memory);
  mprotect(mapping_ + kPage, kReadable, PROT_READ | PROT_WRITE);
  end_of_mapping_ = mapping_ + kPage + kReadable;
}

SharedMemory::~SharedMemory() {
  sanitizer_unpoison(mapping_ + kPage, kReadable);
  munmap(mapping_, kReadable + 2 * kPage);
}

void SharedMemory::start_block(size_t bytes) {
  const size_t slack = (kAlignment - bytes % kAlignment) % kAlignment;
  sanitizer_unpoison(mapping_ + kPage, kReadable);
  bytes_ = bytes;
  begin_ = end_of_mapping_ - slack - bytes;
  memset(begin_ - kFront, kCanary, kFront);
  fill_with_garbage(begin_, bytes);
  memset(begin_ + bytes, kCanary, slack);
  sanitizer_poison(mapping_ + kPage, static_cast<size_t>(begin_ - mapping_) - kPage);
  sanitizer_poison(begin_ + bytes, slack);
}

const unsigned char* SharedMemory::damage() const {
  sanitizer_unpoison(mapping_ + kPage, kReadable);
  const auto damaged = [](unsigned char byte) { return byte != kCanary; };
  unsigned char* p = std::find_if(begin_ - kFront, begin_, damaged);
  if (p != begin_) return p;
  p = std::find_if(begin_ + bytes_, end_of_mapping_, damaged);
  return p != end_of_mapping_ ? p : nullptr;
}

std::string SharedMemory::describe(const unsigned char* address) const {
  if (address < mapping_ || address >= end_of_mapping_ + kPage) return "";
  const std::string memory = "the shared memory, which has " + std::to_string(bytes_) + " bytes";
  if (address < begin_) return std::to_string(begin_ - address) + " bytes before the beginning of " + memory;
  if (address < begin_ + bytes_) return "byte " + std::to_string(address - begin_) + " of " + memory;
  return std::to_string(address - begin_ - static_cast<std::ptrdiff_t>(bytes_)) + " bytes past the end of " + memory;
}

void AsyncCopies::start(void* destination, const void* source) {
  fill_with_garbage(destination, 16);
  copies_.push_back({destination, source, open_group_});
}

void AsyncCopies::wait(int groups) {
  size_t done = 0;
  for (; done < copies_.size(); ++done) {
    const Copy& copy = copies_[done];
    // The open group is not committed: no wait makes it due.
    if (copy.group + static_cast<unsigned>(groups) >= open_group_) break;
    if (copy.source == nullptr) {
      memset(copy.destination, 0, 16);
    } else {
      memcpy(copy.destination, copy.source, 16);
    }
  }
  copies_.erase(copies_.begin(), copies_.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace cuda_on_cpu
