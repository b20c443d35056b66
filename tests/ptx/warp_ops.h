// warp_ops.h: handlers that are not arithmetic: memory, asynchronous copies, shuffles and votes, tensor cores.
#pragma once

#include <algorithm>
#include <type_traits>

#include "tests/ptx/machine.h"

namespace ptx {

Handler load_handler(Space space, int element, int vector);
Handler store_handler(Space space, int element, int vector);
Handler atomic_handler(Space space);
void cp_async(Warp& w, Instruction& i, uint32_t m);
void cp_async_commit(Warp& w, Instruction& i, uint32_t m);
void cp_async_wait(Warp& w, Instruction& i, uint32_t m);
void shuffle(Warp& w, Instruction& i, uint32_t m);
void vote(Warp& w, Instruction& i, uint32_t m);
void redux(Warp& w, Instruction& i, uint32_t m);
void match_any(Warp& w, Instruction& i, uint32_t m);
void active_mask(Warp& w, Instruction& i, uint32_t m);
void memory_fence(Warp& w, Instruction& i, uint32_t m);  // of the whole device
void warp_barrier(Warp& w, Instruction& i, uint32_t m);
void ldmatrix(Warp& w, Instruction& i, uint32_t m);
void mma_m16n8k16_bf16(Warp& w, Instruction& i, uint32_t m);
void convert(Warp& w, Instruction& i, uint32_t m);         // cvt in all forms, lane by lane
void convert_bf16x2(Warp& w, Instruction& i, uint32_t m);  // cvt.rn.bf16x2.f32

enum Atomic : uint8_t { A_ADD, A_MIN, A_MAX, A_AND, A_OR, A_XOR, A_EXCH, A_CAS, A_INC, A_DEC };
enum Rounding : uint8_t { RN, RZ, RM, RP };

uint16_t bf16_of(float x);

template <typename T>
T atomic_result(int op, T old, T value, T third) {
  switch (op) {
    case A_ADD: return static_cast<T>(old + value);
    case A_MIN: return std::min(old, value);
    case A_MAX: return std::max(old, value);
    case A_EXCH: return value;
    case A_CAS: return old == value ? third : old;
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (op) {
      case A_AND: return old & value;
      case A_OR: return old | value;
      case A_XOR: return old ^ value;
      case A_INC: return old >= value ? 0 : old + 1;
      case A_DEC: return old == 0 || old > value ? value : old - 1;
      default: break;
    }
  }
  fail("atomic operation on this type");
}

}  // namespace ptx
