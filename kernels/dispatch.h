// dispatch.h: from a run-time dtype to a template parameter, and the check of what an operation demands.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels/tensor.h"

// Calls f.template operator()<T>() with T = float or bf16.
template <typename F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32: f.template operator()<float>(); return;
    case DType::kBF16: f.template operator()<bf16>(); return;
    default: throw std::logic_error(std::string("no kernel for ") + dtype_name(dtype));
  }
}

// The same for two dtypes: f.template operator()<A, B>().
template <typename F>
void dispatch(DType a, DType b, F&& f) {
  dispatch(a, [&]<typename A>() { dispatch(b, [&]<typename B>() { f.template operator()<A, B>(); }); });
}

inline void require(bool condition, const char* what) {
  if (!condition) throw std::logic_error(what);
}
