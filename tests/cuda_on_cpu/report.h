// report.h: what the shim says when it finds a mistake, and settings read from the environment.
#pragma once

#include <cstdint>
#include <string>

namespace cuda_on_cpu {

// Prints the report and ends the program (std::abort): going on would compute with garbage.
[[noreturn]] void fail(const std::string& report);

// A whole number from the environment; the default when the variable is missing or empty.
uint64_t setting(const char* variable, uint64_t otherwise);

std::string setting_text(const char* variable);

// What all orders are drawn from: CUDA_ON_CPU_SEED, or what a test has set since.
uint64_t seed();
void set_seed(uint64_t seed);

// The name of a kernel by its address, from the symbol table of this program; "kernel at 0x..." without one.
std::string kernel_name(const void* function);

// A fast generator for the order of things: xorshift64*.
class Random {
 public:
  explicit Random(uint64_t seed = 1) { reset(seed); }
  void reset(uint64_t seed) {
    state_ = (seed + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
    if (state_ == 0) state_ = 1;
    next();
    next();
  }
  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1du) >> 32);
  }
  // One of 0 .. n-1.
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((uint64_t{next()} * n) >> 32); }

 private:
  uint64_t state_;
};

}  // namespace cuda_on_cpu
