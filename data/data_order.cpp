// data_order.cpp: see data_order.h.
#include "data/data_order.h"

#include <bit>
#include <stdexcept>

Permutation::Permutation(uint64_t size, uint64_t seed, const std::string& stream, uint32_t epoch)
    : size_(size),
      key_{.seed = seed, .purpose = RandomPurpose::kDataOrder, .tensor = hash_name(stream.c_str())},
      epoch_(epoch),
      half_bits_(size < 2 ? 1 : (std::bit_width(size - 1) + 1) / 2) {
  if (size == 0) throw std::logic_error("Permutation: no elements");
}

uint64_t Permutation::encrypt(uint64_t value) const {
  constexpr uint64_t kRounds = 8;
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  uint64_t left = value >> half_bits_, right = value & mask;
  for (uint64_t round = 0; round < kRounds; ++round) {
    const uint64_t block = round << 32 | right;
    const uint32_t word = philox_block(key_, epoch_, block).w[0];
    const uint64_t next = left ^ (word & mask);
    left = right;
    right = next;
  }
  return left << half_bits_ | right;
}

uint64_t Permutation::operator()(uint64_t index) const {
  if (index >= size_) throw std::out_of_range("Permutation: index past the end");
  do index = encrypt(index);
  while (index >= size_);
  return index;
}
