// weight_codes.cpp: 8-bit weights, linear codes in blocks that share a scale, rounded stochastically when they are
// updated. Memory-bound: 5 bytes an element.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/philox_lanes.h"
#include "kernels/cpu/state_blocks.h"
#include "kernels/operands.h"

namespace {

// The largest magnitude; infinity when a number is not finite. Magnitudes are ordered as their bits are, NaNs last.
float largest_magnitude(const float* in, int64_t count) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, float_to_bits(in[i]) & 0x7FFFFFFFu);
  return bits_to_float(std::min(largest, 0x7F800000u));
}

float fresh_scale(float largest) {
  return std::isinf(largest) ? std::numeric_limits<float>::quiet_NaN() : kFreshWeightScale * largest;
}

// Four elements share a Philox block, 64 a call of philox_lanes(); a view may start inside of one.
constexpr int64_t kCallWords = 4 * kPhiloxLanes;
using Words = uint32_t[kQuantBlock + kCallWords];

// The words of elements key.offset + begin on, one each; they are somewhere in `words`.
const uint32_t* random_words(Words& words, int64_t begin, int64_t count, const RandomKey& key, uint32_t step) {
  const uint64_t first = key.offset + static_cast<uint64_t>(begin), k = philox_key(key);
  const int64_t skip = static_cast<int64_t>(first % 4);
  for (int64_t word = 0; word < skip + count; word += kCallWords)
    philox_lanes(words + word, k, key.tensor, step, first / 4 + static_cast<uint64_t>(word / 4));
  return words + skip;
}

// Of values: compilers do not vectorise std::clamp()'s choice between references.
int8_t to_code(float rounded) {
  const float above = rounded < -kMostWeightCode ? -kMostWeightCode : rounded;
  return static_cast<int8_t>(static_cast<int32_t>(above > kMostWeightCode ? kMostWeightCode : above));
}

void encode_nearest(int8_t* codes, const float* in, int64_t count, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) codes[i] = to_code(std::nearbyint(in[i] / scale));
}

// floor(x / scale + u) without rounding the sum: u >= 1 - fraction.
void encode_stochastic(int8_t* codes, const float* in, const uint32_t* words, int64_t count, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float x = in[i] / scale, whole = std::floor(x);
    codes[i] = to_code(whole + (uniform_from_word(words[i]) >= 1.0f - (x - whole) ? 1.0f : 0.0f));
  }
}

}  // namespace

void CpuBackend::quantize_weight(Tensor out, Tensor in, RandomKey key, const StepScalars* scalars) {
  check_quantize_weight(out, in);
  const Profiler::Scope scope(profiler, "quantize_weight", 0, static_cast<double>(out.bytes() + in.bytes()));
  if (scalars && scalars->gate == 0) return;
  for_each_block(threads_, out.elements(), [&](int64_t begin, int64_t count) {
    const float* const x = in.as<const float>() + begin;
    int8_t* const codes = out.as<int8_t>() + begin;
    float& scale = out.scales[begin / kQuantBlock];
    const float largest = largest_magnitude(x, count), bound = kMostWeightCode * scale;
    const bool stays = scalars && 0.5f * bound < largest && largest <= bound && !std::isinf(largest);
    if (!stays) scale = fresh_scale(largest);
    if (!(scale > 0.0f)) {  // NaN, or nothing but zeros: all codes say the same
      std::memset(codes, 0, static_cast<size_t>(count));
    } else if (scalars) {
      Words words;
      encode_stochastic(codes, x, random_words(words, begin, count, key, scalars->step), count, scale);
    } else {
      encode_nearest(codes, x, count, scale);
    }
  });
}

void CpuBackend::dequantize_weight(Tensor out, Tensor in) {
  check_dequantize_weight(out, in);
  const Profiler::Scope scope(profiler, "dequantize_weight", 0, static_cast<double>(out.bytes() + in.bytes()));
  for_each_block(threads_, out.elements(), [&](int64_t begin, int64_t count) {
    const int8_t* const codes = in.as<const int8_t>() + begin;
    const float scale = in.scales[begin / kQuantBlock];
    Block x;
    for (int64_t i = 0; i < count; ++i) x[i] = scale * static_cast<float>(codes[i]);
    store_block(out, begin, count, x);
  });
}
