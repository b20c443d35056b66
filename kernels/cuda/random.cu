// random.cu: tensors filled from the counter-based generator (philox.h). A lane makes eight numbers: two Philox blocks
// and four Box-Muller pairs, about 60 instructions a normal, so that an H100 makes some 4e11 normals a second; fp32
// ones take about as long to write. Cosines need two integer divisions a lane and one polynomial a number.
#include "kernels/cosine_projection.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/state_blocks.cuh"
#include "kernels/operands.h"

#include <cmath>

namespace {

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

__global__ void __launch_bounds__(kStateThreads)
    normals_kernel(BlockTensor out, int64_t elements, float mean, float stddev, RandomStream stream,
                   const uint32_t* index) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  float x[kOctet];
  normal_octet(x, stream, index ? *index : 0, stream.offset + static_cast<uint64_t>(octet.first));
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] = mean + stddev * x[i];
  store(out, octet, x);
}

__global__ void __launch_bounds__(kStateThreads)
    signs_kernel(BlockTensor out, int64_t elements, float magnitude, RandomStream stream, const uint32_t* index) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  const uint32_t plus = sign_bits(stream, *index, stream.offset + static_cast<uint64_t>(octet.first));
  float x[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] = (plus >> i) & 1u ? magnitude : -magnitude;
  store(out, octet, x);
}

__global__ void __launch_bounds__(kStateThreads)
    cosines_kernel(BlockTensor out, int64_t elements, CosineBasis basis, RandomStream stream, const uint32_t* index) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  const uint64_t first = stream.offset + static_cast<uint64_t>(octet.first);
  const PhiloxWords keys = random_block(stream, *index, kPermutationBlock);
  uint32_t row = static_cast<uint32_t>(first / basis.dimension),
           column = static_cast<uint32_t>(first % basis.dimension);
  uint32_t frequency = 0, angle = 0, signs = 0;
  float amplitude = 0;
  float x[kOctet];
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
      signs = sign_bits(stream, *index, column);
    }
    const float value = cosine_of(basis, angle);
    x[i] = (signs & 1u ? amplitude : -amplitude) * value;
    angle = cosine_next(basis, frequency, angle);
    signs >>= 1;
    ++column;
  }
  store(out, octet, x);
}

}  // namespace

void CudaBackend::fill_normal(Tensor x, float mean, float stddev, RandomKey key) {
  require_elements(x, x.elements(), "fill_normal: the tensor must be contiguous");
  const Timed timed(*this, "fill_normal", 0, static_cast<double>(x.bytes()));
  launch("fill_normal", normals_kernel, {.grid = state_grid(x.elements()), .block = kStateThreads, .stream = stream_},
         block_tensor(x), x.elements(), mean, stddev, random_stream(key), static_cast<const uint32_t*>(nullptr));
}

void CudaBackend::generate_projection(Tensor projection, ProjectionKind kind, RandomKey key, const uint32_t* index) {
  check_projection(projection, kind);
  const Timed timed(*this, "generate_projection", 0, static_cast<double>(projection.bytes()));
  const float inverse_root = static_cast<float>(1.0 / std::sqrt(static_cast<double>(projection.shape[0])));
  const int64_t elements = projection.elements();
  const LaunchShape shape = {.grid = state_grid(elements), .block = kStateThreads, .stream = stream_};
  if (kind == ProjectionKind::kRademacher) {
    launch("generate_projection", signs_kernel, shape, block_tensor(projection), elements, inverse_root,
           random_stream(key), index);
  } else if (kind == ProjectionKind::kCosine) {
    launch("generate_projection", cosines_kernel, shape, block_tensor(projection), elements,
           cosine_basis(projection.cols()), random_stream(key), index);
  } else {
    // Adding -0 changes no number, not even -0 itself.
    launch("generate_projection", normals_kernel, shape, block_tensor(projection), elements, -0.0f, inverse_root,
           random_stream(key), index);
  }
}
