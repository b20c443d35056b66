// moments.cuh: what the moments of a gradient do to eight of its elements, for the kernels of an update.
#pragma once

#include "kernels/cuda/state_blocks.cuh"

// V <- beta2 V + (1 - beta2) (g^2 + eps1), g <- g / sqrt(V)
__device__ inline void full_second_moment(float (&g)[kOctet], float (&v)[kOctet], float beta2, float eps1) {
  const float one_minus_beta2 = 1.0f - beta2;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    v[i] = beta2 * v[i] + one_minus_beta2 * (g[i] * g[i] + eps1);
    g[i] = g[i] / sqrtf(v[i]);
  }
}

// M <- beta1 M + (1 - beta1) x
__device__ inline void average(float (&m)[kOctet], const float (&x)[kOctet], float beta1) {
  const float one_minus_beta1 = 1.0f - beta1;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) m[i] = beta1 * m[i] + one_minus_beta1 * x[i];
}

// What x is after it has been stored as a T.
template <typename T>
__device__ inline void round_octet(float (&x)[kOctet]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = to_float(from_float<T>(x[i]));
  }
}

// Factors of the rows and columns of a contiguous matrix of fewer than 2^32 elements; none where the pointers are null.
struct MatrixScales {
  const float *rows = nullptr, *columns = nullptr;
  uint32_t cols = 1;

  __device__ bool any() const { return rows || columns; }
  __device__ void apply(float (&x)[kOctet], const Octet& octet) const {
    const uint32_t first = static_cast<uint32_t>(octet.first);
    uint32_t row = first / cols, column = first - row * cols;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i >= octet.count) continue;
      const float row_factor = rows ? rows[row] : 1.0f;
      x[i] *= columns ? row_factor * columns[column] : row_factor;
      if (++column == cols) {
        column = 0;
        ++row;
      }
    }
  }
};

inline bool takes_scales(const Tensor& matrix) { return matrix.elements() <= int64_t{0xffffffff}; }

inline MatrixScales matrix_scales(const Tensor& row_scale, const Tensor& col_scale, const Tensor& matrix) {
  require(takes_scales(matrix), "scales: the matrix is too large");
  return {row_scale.as<const float>(), col_scale.as<const float>(), static_cast<uint32_t>(matrix.cols())};
}

// MomentumAverage for a kernel.
struct AveragedMomentum {
  BlockTensor momentum, in;
  MatrixScales scales;
  int64_t elements = 0;
  float beta1 = 0;
};

inline AveragedMomentum averaged_momentum(const MomentumAverage& average) {
  return {block_tensor(average.momentum), block_tensor(average.in),
          matrix_scales(average.row_scale, average.col_scale, average.in), average.in.elements(), average.beta1};
}

// One block of 256 elements, by a warp.
__device__ inline void average_block(const AveragedMomentum& a, int64_t block, const StepScalars* scalars) {
  const Octet octet = octet_of_lane(block, a.elements);
  if (octet.block * kQuantBlock >= a.elements) return;
  const RawOctet raw_m = fetch(a.momentum, octet), raw_in = fetch(a.in, octet);
  if (scalars->gate == 0) return;
  float m[kOctet], x[kOctet];
  decode(m, raw_m, a.momentum.dtype);
  decode(x, raw_in, a.in.dtype);
  if (a.scales.any()) a.scales.apply(x, octet);
  average(m, x, a.beta1);
  store(a.momentum, octet, m);
}
