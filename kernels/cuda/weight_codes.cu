// weight_codes.cu: 8-bit weights, linear codes in blocks that share a scale, rounded stochastically when they are
// updated. Memory-bound: 5 bytes an element; a warp holds a block in registers between its largest magnitude and its
// codes. The same bits as the CPU's: every step is one correctly rounded operation.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/state_blocks.cuh"
#include "kernels/operands.h"

namespace {

constexpr uint32_t kInfinityBits = 0x7F800000u, kNotANumberBits = 0x7FC00000u;

// The largest magnitude of a block; infinity when a number is not finite. Magnitudes are ordered as their bits are,
// NaNs last. Elements that do not exist are zeros.
__device__ inline float largest_magnitude(const float (&x)[kOctet]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const uint32_t magnitude = float_to_bits(x[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, largest, offset);
    largest = other > largest ? other : largest;
  }
  return bits_to_float(largest < kInfinityBits ? largest : kInfinityBits);
}

// The words of elements first .. first + 7, four to a Philox block. A tensor that starts inside of one needs a third
// and a shift; indices stay known to the compiler, so that nothing spills.
__device__ inline void random_words(uint32_t (&words)[kOctet], const RandomStream& stream, uint32_t step,
                                    uint64_t first) {
  const PhiloxWords low = random_block(stream, step, first / 4), high = random_block(stream, step, first / 4 + 1);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = low.w[i], words[i + 4] = high.w[i];
  const uint32_t skip = static_cast<uint32_t>(first % 4);
  if (skip == 0) return;
  const PhiloxWords last = random_block(stream, step, first / 4 + 2);
  uint32_t all[kOctet + 4];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) all[i] = words[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) all[i + kOctet] = last.w[i];
#pragma unroll
  for (int i = 0; i < 10; ++i) all[i] = skip & 2 ? all[i + 2] : all[i];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) words[i] = skip & 1 ? all[i + 1] : all[i];
}

__device__ inline float clamp_code(float code) { return fminf(fmaxf(code, -kMostWeightCode), kMostWeightCode); }

__device__ inline void store_codes(const BlockTensor& t, const Octet& octet, const float (&codes)[kOctet]) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kOctet; ++i)
    words[i / 4] |= (static_cast<uint32_t>(static_cast<int>(codes[i])) & 0xffu) << (i % 4 * 8);
  store_codes(t, octet, words);
}

__global__ void __launch_bounds__(kStateThreads)
    quantize_weight_kernel(BlockTensor out, BlockTensor in, int64_t elements, RandomStream stream,
                           const StepScalars* scalars) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  const RawOctet raw = fetch(in, octet);
  const float old_scale = out.scales[octet.block];
  if (scalars && scalars->gate == 0) return;
  float x[kOctet];
  decode(x, raw, in.dtype);
  const float largest = largest_magnitude(x), bound = kMostWeightCode * old_scale;
  const bool is_finite = float_to_bits(largest) < kInfinityBits;
  const bool stays = scalars && 0.5f * bound < largest && largest <= bound && is_finite;
  const float fresh = is_finite ? kFreshWeightScale * largest : bits_to_float(kNotANumberBits),
              scale = stays ? old_scale : fresh;
  __syncwarp();  // every lane has read the old scale
  if (threadIdx.x % kWarp == 0 && !stays) out.scales[octet.block] = scale;

  float codes[kOctet] = {};
  if (!(scale > 0.0f)) {  // NaN, or nothing but zeros: all codes say the same
    store_codes(out, octet, codes);
    return;
  }
  if (!scalars) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) codes[i] = rintf(clamp_code(x[i] / scale));
  } else {
    // floor(x / scale + u) without rounding the sum: u >= 1 - fraction.
    uint32_t words[kOctet];
    random_words(words, stream, scalars->step, stream.offset + static_cast<uint64_t>(octet.first));
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float quotient = x[i] / scale, whole = floorf(quotient);
      const float up = uniform_from_word(words[i]) >= 1.0f - (quotient - whole) ? 1.0f : 0.0f;
      codes[i] = clamp_code(whole + up);
    }
  }
  store_codes(out, octet, codes);
}

__global__ void __launch_bounds__(kStateThreads)
    dequantize_weight_kernel(BlockTensor out, BlockTensor in, int64_t elements) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  const RawOctet raw = fetch(in, octet);
  float x[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i)
    x[i] = raw.scale * static_cast<float>(static_cast<int8_t>((raw.words[i / 4] >> (i % 4 * 8)) & 0xffu));
  store(out, octet, x);
}

}  // namespace

void CudaBackend::quantize_weight(Tensor out, Tensor in, RandomKey key, const StepScalars* scalars) {
  check_quantize_weight(out, in);
  const Timed timed(*this, "quantize_weight", 0, static_cast<double>(out.bytes() + in.bytes()));
  launch("quantize_weight", quantize_weight_kernel,
         {.grid = state_grid(out.elements()), .block = kStateThreads, .stream = stream_}, block_tensor(out),
         block_tensor(in), out.elements(), random_stream(key), scalars);
}

void CudaBackend::dequantize_weight(Tensor out, Tensor in) {
  check_dequantize_weight(out, in);
  const Timed timed(*this, "dequantize_weight", 0, static_cast<double>(out.bytes() + in.bytes()));
  launch("dequantize_weight", dequantize_weight_kernel,
         {.grid = state_grid(out.elements()), .block = kStateThreads, .stream = stream_}, block_tensor(out),
         block_tensor(in), out.elements());
}
