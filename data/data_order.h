// data_order.h: the order of training data: pseudo-random permutations that are computed, not stored, so that an epoch
// over billions of tokens needs no list of its sequences and any position of it can be found at once.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/philox.h"

// A permutation of 0 .. size-1 chosen by (run seed, name of the stream, epoch): a Feistel network of eight rounds on
// the smallest even number of bits that holds size-1, its round function Philox4x32-10 with purpose kDataOrder, walked
// until the result is below size (four turns at most on average). About a microsecond per element. Spec: docs/data.md.
class Permutation {
 public:
  Permutation(uint64_t size, uint64_t seed, const std::string& stream, uint32_t epoch);

  // The element at place `index` < size; a bijection of [0, size).
  uint64_t operator()(uint64_t index) const;

 private:
  uint64_t encrypt(uint64_t value) const;

  uint64_t size_;
  RandomKey key_;
  uint32_t epoch_;
  int half_bits_;
};
