// projection_numbers.cuh: numbers of the counter-based generator (philox.h), eight neighbours a lane: two Philox blocks
// and four Box-Muller pairs, about 60 instructions a normal, so that an H100 makes some 4e11 normals a second; fp32
// ones take about as long to write. Cosines need two integer divisions a lane and one polynomial a number.
#pragma once

#include <cmath>

#include "kernels/cosine_projection.h"
#include "kernels/cuda/state_blocks.cuh"

// Normal numbers first .. first + 7 of the stream. Where `first` lies inside a Philox block a third block is needed;
// all lanes of a warp agree on that.
__device__ inline void normal_octet(float (&x)[kOctet], const RandomStream& stream, uint32_t step, uint64_t first) {
  float all[kOctet + 4] = {};
  const uint32_t skip = static_cast<uint32_t>(first % 4);
#pragma unroll
  for (int block = 0; block < 3; ++block) {
    if (block == 2 && skip == 0) continue;
    const PhiloxWords words = random_block(stream, step, first / 4 + static_cast<uint64_t>(block));
    normal_pair(words.w[0], words.w[1], all[4 * block], all[4 * block + 1]);
    normal_pair(words.w[2], words.w[3], all[4 * block + 2], all[4 * block + 3]);
  }
  if (skip != 0) {
#pragma unroll
    for (int i = 0; i < kOctet + 2; ++i) all[i] = skip & 2 ? all[i + 2] : all[i];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) all[i] = skip & 1 ? all[i + 1] : all[i];
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] = all[i];
}

// Signs first .. first + 7 of the stream as bits 0 .. 7: 128 per Philox block.
__device__ inline uint32_t sign_bits(const RandomStream& stream, uint32_t step, uint64_t first) {
  const PhiloxWords own = random_block(stream, step, first / 128);
  const uint32_t bit = static_cast<uint32_t>(first % 128), word = bit / 32, skip = bit % 32;
  uint32_t low = 0, high = 0;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    if (i == word) low = own.w[i];
    if (i == word + 1) high = own.w[i];
  }
  if (word == 3 && skip > 32 - kOctet) high = random_block(stream, step, first / 128 + 1).w[0];
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> skip) & 0xffu;
}

// What the numbers of a projection are made of; see Backend::generate_projection().
struct ProjectionNumbers {
  RandomStream stream;
  const uint32_t* index;
  float inverse_root;  // of the rank
  CosineBasis basis;
};

inline ProjectionNumbers projection_numbers(const Tensor& projection, const RandomKey& key, const uint32_t* index) {
  return {random_stream(key), index, static_cast<float>(1.0 / std::sqrt(static_cast<double>(projection.shape[0]))),
          cosine_basis(projection.cols())};
}

// f.template operator()<kKind>()
template <typename F>
void dispatch(ProjectionKind kind, F&& f) {
  switch (kind) {
    case ProjectionKind::kGaussian: f.template operator()<ProjectionKind::kGaussian>(); return;
    case ProjectionKind::kRademacher: f.template operator()<ProjectionKind::kRademacher>(); return;
    case ProjectionKind::kCosine: f.template operator()<ProjectionKind::kCosine>(); return;
  }
}

__device__ inline void cosine_octet(float (&x)[kOctet], const RandomStream& stream, uint32_t index,
                                    const CosineBasis& basis, uint64_t first) {
  const PhiloxWords keys = random_block(stream, index, kPermutationBlock);
  uint32_t row = static_cast<uint32_t>(first / basis.dimension),
           column = static_cast<uint32_t>(first % basis.dimension);
  uint32_t frequency = 0, angle = 0, signs = 0;
  float amplitude = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (column == basis.dimension) {
      column = 0;
      ++row;
    }
    if (i == 0 || column == 0) {
      frequency = row < basis.dimension ? cosine_frequency(basis, keys, row) : 0;  // rows past the end are not stored
      amplitude = cosine_amplitude(basis, frequency);
      angle = cosine_angle(basis, frequency, column);
      signs = sign_bits(stream, index, column);
    }
    const float value = cosine_of(basis, angle);
    x[i] = (signs & 1u ? amplitude : -amplitude) * value;
    angle = cosine_next(basis, frequency, angle);
    signs >>= 1;
    ++column;
  }
}

// Elements first .. first + 7.
template <ProjectionKind kKind>
__device__ inline void projection_octet(float (&x)[kOctet], const ProjectionNumbers& numbers, int64_t first) {
  const uint64_t at = numbers.stream.offset + static_cast<uint64_t>(first);
  const uint32_t index = *numbers.index;
  if constexpr (kKind == ProjectionKind::kCosine) {
    cosine_octet(x, numbers.stream, index, numbers.basis, at);
  } else if constexpr (kKind == ProjectionKind::kGaussian) {
    normal_octet(x, numbers.stream, index, at);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] *= numbers.inverse_root;
  } else {
    const uint32_t plus = sign_bits(numbers.stream, index, at);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = (plus >> i) & 1u ? numbers.inverse_root : -numbers.inverse_root;
  }
}
