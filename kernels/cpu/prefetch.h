// prefetch.h: asking for memory that will be read, in loops that read each number once. The hardware looks ahead by
// itself, but only within a page of 4 KiB, and starts anew in the next one: bf16 is then read at half the speed.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

// So many numbers it is worth looking ahead: 8 KiB.
template <typename T>
inline constexpr int64_t kPrefetchAhead = 8192 / sizeof(T);

// In rows of `row_elements`.
template <typename T>
int64_t rows_ahead(int64_t row_elements) {
  return divide_up(kPrefetchAhead<T>, row_elements);
}

// Where there is no memory nothing happens.
template <typename T>
void prefetch(const T* numbers, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(numbers + i, 0, 2);
}
