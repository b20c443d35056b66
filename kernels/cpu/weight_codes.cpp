// weight_codes.cpp: 8-bit weights, linear codes in blocks that share a scale, rounded stochastically when they are
// updated. Memory-bound: 5 bytes an element.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/state_blocks.h"
#include "kernels/operands.h"

namespace {

constexpr float kMostCode = 127.0f;
constexpr float kRoom = 1.125f / kMostCode;  // what a fresh scale leaves for weights to grow into

// The largest magnitude; infinity when a number is not finite. Magnitudes are ordered as their bits are, NaNs last.
float largest_magnitude(const float* in, int64_t count) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, float_to_bits(in[i]) & 0x7FFFFFFFu);
  return bits_to_float(std::min(largest, 0x7F800000u));
}

float fresh_scale(float largest) {
  return std::isinf(largest) ? std::numeric_limits<float>::quiet_NaN() : kRoom * largest;
}

void encode_nearest(int8_t* codes, const float* in, int64_t count, float scale) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = std::clamp(in[i] / scale, -kMostCode, kMostCode);
    codes[i] = static_cast<int8_t>(std::nearbyint(x));
  }
}

// floor(x / scale + u) without rounding the sum: u >= 1 - fraction.
void encode_stochastic(int8_t* codes, const float* in, const uint32_t* random, int64_t count, float scale) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = in[i] / scale, whole = std::floor(x);
    const float u = (static_cast<float>(random[i]) + 0.5f) * 0x1p-16f;
    const float code = whole + (u >= 1.0f - (x - whole) ? 1.0f : 0.0f);
    codes[i] = static_cast<int8_t>(std::clamp(code, -kMostCode, kMostCode));
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
    const float largest = largest_magnitude(x, count), bound = kMostCode * scale;
    const bool stays = scalars && 0.5f * bound < largest && largest <= bound && !std::isinf(largest);
    if (!stays) scale = fresh_scale(largest);
    if (!(scale > 0.0f)) {  // NaN, or nothing but zeros: all codes say the same
      std::memset(codes, 0, static_cast<size_t>(count));
    } else if (scalars) {
      uint32_t random[kQuantBlock];
      rounding_numbers(random, begin, count, key, scalars->step);
      encode_stochastic(codes, x, random, count, scale);
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
