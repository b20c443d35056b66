// gelu.cu: GELU in its tanh form. Memory-bound: one read and one write (backward: two reads, one write).
// 0.5 (1 + tanh u) is the logistic function of 2u, which keeps its relative precision where 1 + tanh u cancels.
// An SM of Hopper has time for about 26 instructions while the 4 bytes of an element move in bf16, and the forward
// kernel takes 14: the power of two and the reciprocal square root are one instruction of the special function unit
// each, and there is no division, whose rare cases would put a branch into every element.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/map.cuh"

namespace {

// e^-2u = 2^(x (kLinear + kCubic x^2)) with u = sqrt(2/pi) (x + 0.044715 x^3); the slope of 2u is kSlope +
// kSlopeSquare x^2.
constexpr float kSlope = 1.59576912f, kSlopeSquare = 3 * 0.044715f * kSlope;
constexpr float kLinear = -1.44269504f * kSlope, kCubic = 0.044715f * kLinear;

// s = 1 / (1 + e^-2u) and 1 - s, both with their full relative precision; 0 and 1 far out.
struct Logistic {
  float value, complement;
};

__device__ inline Logistic logistic(float x, float square) {
  const float e = exp2_approximate(x * fmaf(kCubic, square, kLinear));
  const float root = rsqrtf(1.0f + e);
  const float value = root * root;
  return {value, fminf(e * value, 1.0f)};  // the product of infinity and 0, far left, becomes 1
}

struct Gelu {
  __device__ bool start() { return true; }
  __device__ float operator()(float x, float) const { return x * logistic(x, x * x).value; }
};

// d gelu'(x) with gelu'(x) = s + x s (1 - s) d(2u)/dx.
struct GeluGradient {
  __device__ bool start() { return true; }
  __device__ float operator()(float d, float x) const {
    const float square = x * x;
    const Logistic s = logistic(x, square);
    return d * fmaf(x * s.value * s.complement, fmaf(kSlopeSquare, square, kSlope), s.value);
  }
};

}  // namespace

void CudaBackend::gelu_forward(Tensor out, Tensor in) {
  const Timed timed(*this, "gelu_forward", 0, static_cast<double>(in.bytes() + out.bytes()));
  map("gelu_forward", stream_, Gelu{}, out, in);
}

void CudaBackend::gelu_backward(Tensor d, Tensor in) {
  const Timed timed(*this, "gelu_backward", 0, static_cast<double>(in.bytes() + 2 * d.bytes()));
  const Extent extent = common_extent(d, in);
  if (extent.rows == 0) return;
  dispatch(d.dtype, in.dtype, [&]<typename D, typename In>() {
    constexpr int kWidth = kVectorWidth<D, In>;
    const auto gradient = vector_view<D, kWidth>(d);
    launch_map("gelu_backward", stream_, GeluGradient{}, gradient, gradient, vector_view<In, kWidth>(in), extent);
  });
}
