// fiber.cpp: see fiber.h.
#include "tests/cuda_on_cpu/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#include "tests/cuda_on_cpu/sanitizer.h"

namespace cuda_on_cpu {

namespace {

using boost::context::detail::transfer_t;

constexpr size_t kPage = 4096;
// The sanitizers put red zones around every variable.
constexpr size_t kStackBytes = kAddressSanitizer ? 512 << 10 : 64 << 10;

}  // namespace

Fiber::Fiber() = default;

Fiber::Fiber(void (*entry)(), size_t index) : entry_(entry) {
  mapped_bytes_ = kPage + kStackBytes + kPage;
  void* memory =
      mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(memory);
  mprotect(mapping_, kPage, PROT_NONE);
  // Stacks that begin at different offsets in a page do not compete for the same lines of the first-level cache.
  char* top = mapping_ + mapped_bytes_ - index % 16 * 256;
  stack_bytes_ = static_cast<size_t>(top - (mapping_ + kPage));
  stack_bottom_ = mapping_ + kPage;
  context_ = boost::context::detail::make_fcontext(top, stack_bytes_, &Fiber::start);
}

Fiber::~Fiber() {
  if (mapping_ == nullptr) return;
  sanitizer_unpoison(mapping_, mapped_bytes_);
  munmap(mapping_, mapped_bytes_);
}

bool Fiber::is_guard(const void* address) const {
  return mapping_ != nullptr && address >= mapping_ && address < mapping_ + kPage;
}

void Fiber::start(transfer_t transfer) {
  Fiber* self = static_cast<Switch*>(transfer.data)->to;
  arrive(transfer);
  self->entry_();
}

}  // namespace cuda_on_cpu
