// part.h: how a tensor is spread over ranks. Each keeps equally many elements, one after another in the order of the
// ranks, in whole blocks that share a scale; behind the tensor's end the last parts are padding.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/tensor.h"

// Elements that each of `ranks` ranks keeps, padding included.
inline int64_t part_elements(int64_t elements, int ranks) {
  return quant_blocks(divide_up(elements, int64_t{ranks})) * kQuantBlock;
}

// Elements [begin, begin + count) of a tensor.
struct Part {
  int64_t begin = 0, count = 0;
};

// Those of one rank, without padding; count may be 0.
inline Part part_of(int64_t elements, int rank, int ranks) {
  const int64_t most = part_elements(elements, ranks), begin = std::min(elements, rank * most);
  return {begin, std::min(most, elements - begin)};
}
