// shared_memory.h: the dynamic shared memory of one block. It ends at a page that nobody may touch, or up to 1023 bytes
// before it (the beginning is aligned to 1024 bytes), and those bytes are checked after the block.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_on_cpu {

inline constexpr size_t kMaxSharedBytes = 227 << 10;

// What uninitialised memory is filled with: 0x7fa1 repeated, a signalling NaN in fp32 and bf16, a huge integer.
void fill_with_garbage(void* memory, size_t bytes);

class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // Garbage everywhere.
  void start_block(size_t bytes);
  unsigned char* begin() const { return begin_; }
  size_t bytes() const { return bytes_; }
  // The first byte that was written outside; null if none was.
  const unsigned char* damage() const;
  // "3 bytes past the end of the shared memory, which has 64 bytes"; empty for an address that is not near it.
  std::string describe(const unsigned char* address) const;

 private:
  unsigned char* mapping_ = nullptr;
  unsigned char* end_of_mapping_ = nullptr;  // where the guard page begins
  unsigned char* begin_ = nullptr;
  size_t bytes_ = 0;
};

// Inside what the running block asked for?
bool in_shared_memory(const void* address, size_t bytes);

}  // namespace cuda_on_cpu
