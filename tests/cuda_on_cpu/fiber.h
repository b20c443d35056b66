// fiber.h: stacks that an OS thread switches between, on Boost.Context's jump_fcontext. A switch costs some 10 ns, and
// every return that follows it: the processor expects it to go elsewhere. A fiber belongs to the OS thread that created
// it.
#pragma once

#include <boost/context/detail/fcontext.hpp>
#include <cstddef>

#include "tests/cuda_on_cpu/sanitizer.h"

namespace cuda_on_cpu {

// A stack with a guard page below it.
class Fiber {
 public:
  // The stack an OS thread was born with; switched away from first, and back to last.
  Fiber();
  // Will call entry() when first switched to; entry() never returns.
  Fiber(void (*entry)(), size_t index);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves `from`, which is the running one, for `to`; returns when somebody switches back.
  static void switch_to(Fiber& from, Fiber& to);

  // Is the address in the guard page, as after a stack overflow?
  bool is_guard(const void* address) const;

 private:
  struct Switch {
    Fiber* from;
    Fiber* to;
  };
  static void start(boost::context::detail::transfer_t transfer);
  static void arrive(boost::context::detail::transfer_t transfer);

  boost::context::detail::fcontext_t context_ = nullptr;
  void (*entry_)() = nullptr;
  char* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
  // For AddressSanitizer.
  const void* stack_bottom_ = nullptr;
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
};

inline void Fiber::arrive(boost::context::detail::transfer_t transfer) {
  const Switch& hop = *static_cast<Switch*>(transfer.data);
  hop.from->context_ = transfer.fctx;
  sanitizer_finish_switch(hop.to->fake_stack_, &hop.from->stack_bottom_, &hop.from->stack_bytes_);
}

inline void Fiber::switch_to(Fiber& from, Fiber& to) {
  Switch hop{&from, &to};
  sanitizer_start_switch(&from.fake_stack_, to.stack_bottom_, to.stack_bytes_);
  arrive(boost::context::detail::jump_fcontext(to.context_, &hop));
}

}  // namespace cuda_on_cpu
