// integer_handlers.h: handlers of an operation on integers, by type; nullptr: not for this type.
#pragma once

#include "tests/ptx/operations.h"

namespace ptx {

template <typename F>
Handler int_unary(Type t) {
  switch (t) {
    case U16:
    case B16: return unary<uint16_t, uint16_t, F>;
    case S16: return unary<int16_t, int16_t, F>;
    case U32:
    case B32: return unary<uint32_t, uint32_t, F>;
    case S32: return unary<int32_t, int32_t, F>;
    case U64:
    case B64: return unary<uint64_t, uint64_t, F>;
    case S64: return unary<int64_t, int64_t, F>;
    default: return nullptr;
  }
}

template <typename F>
Handler int_binary(Type t) {
  switch (t) {
    case U16:
    case B16: return binary<uint16_t, uint16_t, F>;
    case S16: return binary<int16_t, int16_t, F>;
    case U32:
    case B32: return binary<uint32_t, uint32_t, F>;
    case S32: return binary<int32_t, int32_t, F>;
    case U64:
    case B64: return binary<uint64_t, uint64_t, F>;
    case S64: return binary<int64_t, int64_t, F>;
    default: return nullptr;
  }
}

template <typename F>
Handler int_ternary(Type t) {
  switch (t) {
    case U16: return ternary<uint16_t, uint16_t, uint16_t, F>;
    case S16: return ternary<int16_t, int16_t, int16_t, F>;
    case U32: return ternary<uint32_t, uint32_t, uint32_t, F>;
    case S32: return ternary<int32_t, int32_t, int32_t, F>;
    case U64: return ternary<uint64_t, uint64_t, uint64_t, F>;
    case S64: return ternary<int64_t, int64_t, int64_t, F>;
    default: return nullptr;
  }
}

}  // namespace ptx
