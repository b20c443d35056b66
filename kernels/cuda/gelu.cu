// gelu.cu: GELU in its tanh form. Memory-bound: one read and one write (backward: two reads, one write, of which the
// bias's gradient is made on the way).
// 0.5 (1 + tanh u) is the logistic function of 2u, which keeps its relative precision where 1 + tanh u cancels.
// An SM of Hopper has time for about 26 instructions while the 4 bytes of an element move in bf16, and the forward
// kernel takes 14: the power of two and the reciprocal square root are one instruction of the special function unit
// each, and there is no division, whose rare cases would put a branch into every element.
#include "kernels/cuda/column_sums.cuh"
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
  __device__ float operator()(float x) const { return x * logistic(x, x * x).value; }
};

// d gelu'(x) with gelu'(x) = s + x s (1 - s) d(2u)/dx, stored in d's place; the numbers are what is stored, rounded.
template <typename T>
struct GeluGradient {
  struct Raw {
    Vector<T, kOctet> d, x;
  };

  VectorView<T, kOctet> d, x;

  __device__ Raw load(int64_t row, int64_t column) const { return {d.load(row, column), x.load(row, column)}; }
  __device__ void numbers(const Raw& raw, int64_t row, int64_t column, float (&values)[kOctet]) const {
    float in[kOctet];
    unpack(raw.d, values);
    unpack(raw.x, in);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      // s (1 - s) is 0 from there on; with an infinite square the product would be no number.
      const float square = fminf(in[i] * in[i], 1e30f);
      const Logistic s = logistic(in[i], square);
      values[i] *= fmaf(in[i] * s.value * s.complement, fmaf(kSlopeSquare, square, kSlope), s.value);
    }
    Vector<T, kOctet> rounded;
    pack(rounded, values);
    store_vector(d.data + row * d.pitch + column, rounded);
    unpack(rounded, values);
  }
};

}  // namespace

void CudaBackend::gelu_forward(Tensor out, Tensor in) {
  const Timed timed(*this, "gelu_forward", 0, static_cast<double>(in.bytes() + out.bytes()));
  require(out.dtype == in.dtype, "gelu_forward: one dtype");
  map("gelu_forward", stream_, Gelu{}, out, in);
}

void CudaBackend::gelu_backward(Tensor d, Tensor dbias, Tensor in, bool accumulate) {
  check_gelu_backward(d, dbias, in);
  const Timed timed(*this, "gelu_backward", 0, static_cast<double>(in.bytes() + 2 * d.bytes()));
  require_octet_rows(d, in);
  float* const partials = scratch<float>(static_cast<size_t>(kMaxBiasChunks * d.cols()) * sizeof(float));
  dispatch(d.dtype, [&]<typename T>() {
    sum_columns("gelu_backward", stream_, dbias, GeluGradient<T>{vector_view<T, kOctet>(d), vector_view<T, kOctet>(in)},
                d.rows(), partials, accumulate);
  });
}
