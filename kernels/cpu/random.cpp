// random.cpp: tensors filled from the counter-based generator (philox.h). Compute-bound: about 1.2 ns per normal on an
// AVX-512 core, a quarter of that per sign.
#include <cmath>

#include "kernels/cosine_projection.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/state_blocks.h"
#include "kernels/operands.h"

// 128 per block, 32 per word, a set bit is +.
void fill_signs(float* out, uint64_t first, int64_t count, float magnitude, const RandomKey& key, uint32_t step) {
  constexpr int64_t kPerBlock = 128;
  const uint32_t magnitude_bits = float_to_bits(magnitude);
  for (int64_t i = 0; i < count;) {
    const PhiloxWords words = philox_block(key, step, (first + i) / kPerBlock);
    const int64_t skip = static_cast<int64_t>((first + i) % kPerBlock);
    const int64_t used = std::min(count - i, kPerBlock - skip);
    for (int64_t j = 0; j < used; ++j) {
      const uint32_t word = words.w[(skip + j) / 32];
      const uint32_t minus = ~(word >> ((skip + j) % 32)) & 1u;
      out[i + j] = bits_to_float(magnitude_bits | (minus << 31));
    }
    i += used;
  }
}

namespace {

// Elements first .. first + count - 1 of a cosine projection.
void fill_cosines(float* out, uint64_t first, int64_t count, const CosineBasis& basis, const RandomKey& key,
                  uint32_t step) {
  const PhiloxWords words = philox_block(key, step, kPermutationBlock);
  uint32_t row = static_cast<uint32_t>(first / basis.dimension),
           column = static_cast<uint32_t>(first % basis.dimension);
  for (int64_t i = 0; i < count; ++row, column = 0) {
    const int64_t used = std::min<int64_t>(count - i, basis.dimension - column);
    const uint32_t frequency = cosine_frequency(basis, words, row);
    fill_signs(out + i, column, used, cosine_amplitude(basis, frequency), key, step);
    uint32_t angles[kQuantBlock];
    angles[0] = cosine_angle(basis, frequency, column);
    for (int64_t j = 1; j < used; ++j) angles[j] = cosine_next(basis, frequency, angles[j - 1]);
#pragma omp simd
    for (int64_t j = 0; j < used; ++j) out[i + j] *= cosine_of(basis, angles[j]);
    i += used;
  }
}

}  // namespace

void CpuBackend::fill_normal(Tensor x, float mean, float stddev, RandomKey key) {
  require_elements(x, x.elements(), "fill_normal: the tensor must be contiguous");
  const Profiler::Scope scope(profiler, "fill_normal", 0, static_cast<double>(x.bytes()));
  for_each_block(threads_, x.elements(), [&](int64_t begin, int64_t count) {
    Block values;
    fill_normals(values, key.offset + static_cast<uint64_t>(begin), count, key, 0);
    for (int64_t i = 0; i < count; ++i) values[i] = mean + stddev * values[i];
    store_block(x, begin, count, values);
  });
}

void CpuBackend::generate_projection(Tensor projection, ProjectionKind kind, RandomKey key, const uint32_t* index) {
  check_projection(projection, kind);
  const Profiler::Scope scope(profiler, "generate_projection", 0, static_cast<double>(projection.bytes()));
  const uint32_t step = *index;
  const float inverse_root = static_cast<float>(1.0 / std::sqrt(static_cast<double>(projection.shape[0])));
  const CosineBasis basis = cosine_basis(projection.cols());
  for_each_block(threads_, projection.elements(), [&](int64_t begin, int64_t count) {
    Block values;
    const uint64_t first = key.offset + static_cast<uint64_t>(begin);
    if (kind == ProjectionKind::kRademacher) {
      fill_signs(values, first, count, inverse_root, key, step);
    } else if (kind == ProjectionKind::kCosine) {
      fill_cosines(values, first, count, basis, key, step);
    } else {
      fill_normals(values, first, count, key, step);
      for (int64_t i = 0; i < count; ++i) values[i] *= inverse_root;
    }
    store_block(projection, begin, count, values);
  });
}
