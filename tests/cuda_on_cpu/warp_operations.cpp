// warp_operations.cpp: what the lanes of a warp compute together: shuffles, votes, ldmatrix and mma; and the checks of
// wide and asynchronous copies. Each operation gathers the arguments of all lanes and writes all results when the last
// lane has come.
#include <cstring>

#include "kernels/cuda/ptx.cuh"
#include "tests/cuda_on_cpu/async_copy.h"
#include "tests/cuda_on_cpu/scheduler.h"
#include "tests/cuda_on_cpu/shared_memory.h"

namespace cuda_on_cpu {

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

struct ShuffleArguments {
  uint64_t value, result;
  unsigned source;
};

void complete_shuffle(void* const (&arguments)[32]) {
  for (void* const lane : arguments) {
    auto* own = static_cast<ShuffleArguments*>(lane);
    own->result = static_cast<ShuffleArguments*>(arguments[own->source])->value;
  }
}

void complete_any(void* const (&arguments)[32]) {
  bool any = false;
  for (void* const lane : arguments) any = any || *static_cast<bool*>(lane);
  for (void* const lane : arguments) *static_cast<bool*>(lane) = any;
}

struct LdmatrixArguments {
  uint32_t* r;
  const unsigned char* row;
  bool transposed;
};

// PTX ISA, "ldmatrix": lanes 8i .. 8i + 7 give the addresses of rows 0 .. 7 of matrix i; lane l receives row l / 4,
// elements 2 (l % 4) and 2 (l % 4) + 1, the first one in the lower half. With .trans it receives the elements (row,
// column) = (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
void complete_ldmatrix(void* const (&arguments)[32]) {
  uint16_t matrix[4][8][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    memcpy(matrix[lane / 8][lane % 8], static_cast<const LdmatrixArguments*>(arguments[lane])->row, 16);
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const LdmatrixArguments*>(arguments[lane]);
    const unsigned major = lane / 4, minor = 2 * (lane % 4);
    for (unsigned i = 0; i < 4; ++i) {
      const uint32_t low = own.transposed ? matrix[i][minor][major] : matrix[i][major][minor];
      const uint32_t high = own.transposed ? matrix[i][minor + 1][major] : matrix[i][major][minor + 1];
      own.r[i] = low | high << 16;
    }
  }
}

struct MmaArguments {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float low_half(uint32_t word) { return bits_to_float(word << 16); }
float high_half(uint32_t word) { return bits_to_float(word & 0xffff0000u); }

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type". Products of bf16 are exact in fp32; they are
// added to d one after another, k = 0 .. 15, rounding each time. (A tensor core adds several at once and truncates.)
void complete_mma(void* const (&arguments)[32]) {
  float a[16][16], b[16][8], d[16][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const MmaArguments*>(arguments[lane]);
    const unsigned group = lane / 4, pair = 2 * (lane % 4);
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = group + (i % 2) * 8, column = pair + (i / 2) * 8;
      a[row][column] = low_half(own.a[i]);
      a[row][column + 1] = high_half(own.a[i]);
    }
    for (unsigned i = 0; i < 2; ++i) {
      b[pair + 8 * i][group] = low_half(own.b[i]);
      b[pair + 8 * i + 1][group] = high_half(own.b[i]);
    }
    for (unsigned i = 0; i < 4; ++i) d[group + (i / 2) * 8][pair + i % 2] = own.d[i];
  }
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned row = 0; row < 16; ++row) {
      for (unsigned column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const MmaArguments*>(arguments[lane]);
    for (unsigned i = 0; i < 4; ++i) own.d[i] = d[lane / 4 + (i / 2) * 8][2 * (lane % 4) + i % 2];
  }
}

}  // namespace

uint64_t shuffle(const char* operation, unsigned mask, uint64_t bits, unsigned source, Site site) {
  ShuffleArguments arguments{bits, 0, source};
  running_scheduler(operation).rendezvous(operation, mask, &complete_shuffle, &arguments, site);
  return arguments.result;
}

bool any(unsigned mask, bool predicate, Site site) {
  running_scheduler("__any_sync").rendezvous("__any_sync", mask, &complete_any, &predicate, site);
  return predicate;
}

void check_aligned16(const void* address, const char* what, Site site) {
  if ((reinterpret_cast<uintptr_t>(address) & 15) != 0) kernel_error(what, site);
}

void check_shared(const void* address, bool expected, const char* what, Site site) {
  if (in_shared_memory(address, 16) != expected) kernel_error(what, site);
}

void start_async_copy(void* shared, const void* global, bool valid, Site site) {
  check_aligned16(shared, "misaligned shared address in cp_async16", site);
  if (valid) check_aligned16(global, "misaligned global address in cp_async16", site);
  if (!in_shared_memory(shared, 16)) kernel_error("the destination of cp_async16 is not in shared memory", site);
  async_copies().start(shared, valid ? global : nullptr);
}

void commit_async_copies() { async_copies().commit(); }

void wait_async_copies(int groups) { async_copies().wait(groups); }

void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed, Site site) {
  check_aligned16(row, "misaligned address in ldmatrix", site);
  if (!in_shared_memory(row, 16)) kernel_error("ldmatrix reads outside of shared memory", site);
  LdmatrixArguments arguments{r, static_cast<const unsigned char*>(row), transposed};
  const char* const operation = transposed ? "ldmatrix_x4_transposed" : "ldmatrix_x4";
  running_scheduler(operation).rendezvous(operation, kAllLanes, &complete_ldmatrix, &arguments, site);
}

void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MmaArguments arguments{d, a, b};
  running_scheduler("mma_m16n8k16").rendezvous("mma_m16n8k16", kAllLanes, &complete_mma, &arguments, site);
}

}  // namespace cuda_on_cpu
