// optimizer_moments.cu: moments of gradients, element by element; the factored ones are in factored_moment.cu.
// Memory-bound: every operation reads each tensor once and writes what it changes once.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/state_blocks.cuh"
#include "kernels/operands.h"

namespace {

// out = in * (factor * row_scale) * col_scale, kWidth columns a thread; `vectors`: rows of octets, which the momenta of
// ranks that are no multiple of 8 do not have.
template <typename Out, typename In, int kWidth>
__global__ void __launch_bounds__(kStateThreads)
    scale_rows_cols_kernel(VectorView<Out, kWidth> out, VectorView<In, kWidth> in, const float* row_scale,
                           const float* col_scale, float factor, int64_t rows, int64_t cols, bool vectors) {
  const uint32_t groups = static_cast<uint32_t>((cols + kWidth - 1) / kWidth);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kStateThreads + threadIdx.x;
  const int64_t row = index <= 0xffffffffll ? static_cast<uint32_t>(index) / groups : index / groups;
  if (row >= rows) return;
  const int64_t column = (index - row * groups) * kWidth;
  const float row_factor = row_scale ? factor * row_scale[row] : factor;
  if (vectors) {
    float x[kWidth], scales[kWidth];
    unpack(in.load_again(row, column), x);
    if (col_scale) unpack(load_vector<kWidth>(col_scale + column), scales);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] *= col_scale ? row_factor * scales[i] : row_factor;
    out.store(row, column, x);
    return;
  }
  for (int64_t j = column; j < column + kWidth && j < cols; ++j)
    out.store_one(row, j, in.load_one(row, j) * (col_scale ? row_factor * col_scale[j] : row_factor));
}

__global__ void __launch_bounds__(kStateThreads)
    full_second_moment_kernel(BlockTensor grad, BlockTensor second_moment, int64_t elements, float eps1,
                              const StepScalars* scalars) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  const RawOctet raw_g = fetch(grad, octet), raw_v = fetch(second_moment, octet);
  if (scalars->gate == 0) return;
  const float beta2 = scalars->beta2, one_minus_beta2 = 1.0f - beta2;
  float g[kOctet], v[kOctet];
  decode(g, raw_g, grad.dtype);
  decode(v, raw_v, second_moment.dtype);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    v[i] = beta2 * v[i] + one_minus_beta2 * (g[i] * g[i] + eps1);
    g[i] = g[i] / sqrtf(v[i]);
  }
  store(second_moment, octet, v);
  store(grad, octet, g);
}

// M <- beta1 M + (1 - beta1) in, and with `write_back` in <- M before M is rounded.
__global__ void __launch_bounds__(kStateThreads)
    momentum_kernel(BlockTensor momentum, BlockTensor in, bool write_back, int64_t elements, float beta1,
                    const StepScalars* scalars) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  const RawOctet raw_m = fetch(momentum, octet), raw_in = fetch(in, octet);
  if (scalars->gate == 0) return;
  const float one_minus_beta1 = 1.0f - beta1;
  float m[kOctet], x[kOctet];
  decode(m, raw_m, momentum.dtype);
  decode(x, raw_in, in.dtype);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) m[i] = beta1 * m[i] + one_minus_beta1 * x[i];
  store(momentum, octet, m);
  if (write_back) store(in, octet, m);
}

}  // namespace

void CudaBackend::full_second_moment(Tensor grad, Tensor second_moment, float eps1, const StepScalars* scalars) {
  check_state(second_moment, grad);
  const Timed timed(*this, "full_second_moment", 0, static_cast<double>(2 * grad.bytes() + 2 * second_moment.bytes()));
  launch("full_second_moment", full_second_moment_kernel,
         {.grid = state_grid(grad.elements()), .block = kStateThreads, .stream = stream_}, block_tensor(grad),
         block_tensor(second_moment), grad.elements(), eps1, scalars);
}

void CudaBackend::scale_rows_cols(Tensor out, Tensor in, Tensor row_scale, Tensor col_scale, float factor) {
  check_scale_rows_cols(out, in, row_scale, col_scale);
  const int64_t rows = in.rows(), cols = in.cols();
  const Timed timed(*this, "scale_rows_cols", 0, static_cast<double>(in.bytes() + out.bytes()));
  if (in.elements() == 0) return;
  const bool vectors = has_octet_rows(out) && has_octet_rows(in) && begins_aligned(col_scale);
  dispatch(out.dtype, in.dtype, [&]<typename Out, typename In>() {
    constexpr int kWidth = kVectorWidth<Out, In>;
    launch("scale_rows_cols", scale_rows_cols_kernel<Out, In, kWidth>,
           {.grid = dim3(static_cast<unsigned>(divide_up(rows * divide_up(cols, kWidth), kStateThreads))),
            .block = kStateThreads,
            .stream = stream_},
           vector_view<Out, kWidth>(out), vector_view<In, kWidth>(in), row_scale.as<const float>(),
           col_scale.as<const float>(), factor, rows, cols, vectors);
  });
}

void CudaBackend::momentum_update(Tensor update, Tensor momentum, float beta1, const StepScalars* scalars) {
  check_state(momentum, update);
  const Timed timed(*this, "momentum_update", 0, static_cast<double>(2 * update.bytes() + 2 * momentum.bytes()));
  launch("momentum_update", momentum_kernel,
         {.grid = state_grid(update.elements()), .block = kStateThreads, .stream = stream_}, block_tensor(momentum),
         block_tensor(update), true, update.elements(), beta1, scalars);
}

void CudaBackend::ema(Tensor momentum, Tensor in, float beta1, const StepScalars* scalars) {
  check_state(momentum, in);
  const Timed timed(*this, "ema", 0, static_cast<double>(in.bytes() + 2 * momentum.bytes()));
  launch("ema", momentum_kernel, {.grid = state_grid(in.elements()), .block = kStateThreads, .stream = stream_},
         block_tensor(momentum), block_tensor(in), false, in.elements(), beta1, scalars);
}
