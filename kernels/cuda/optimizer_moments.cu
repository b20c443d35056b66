// optimizer_moments.cu: moments of gradients, element by element; the factored ones are in factored_moment.cu.
// Memory-bound: every operation reads each tensor once and writes what it changes once.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/state_blocks.cuh"
#include "kernels/cuda/views.cuh"
#include "kernels/operands.h"

namespace {

// out = in * (factor * row_scale) * col_scale, kElements columns a thread; with 16-byte accesses where `aligned`.
template <typename Out, typename In>
struct ScaleRun {
  static constexpr int kElements = sizeof(Out) == 4 && sizeof(In) == 4 ? 4 : 8;
};

template <typename T, int kCount>
__device__ inline void load_run(float (&x)[kCount], const T* in) {
  constexpr int kPack = Pack<T>::kSize;
#pragma unroll
  for (int part = 0; part < kCount / kPack; ++part) {
    const Pack<T> pack = load128(in + part * kPack);
#pragma unroll
    for (int i = 0; i < kPack; ++i) x[part * kPack + i] = to_float(pack.v[i]);
  }
}

template <typename T, int kCount>
__device__ inline void store_run(T* out, const float (&x)[kCount]) {
  constexpr int kPack = Pack<T>::kSize;
#pragma unroll
  for (int part = 0; part < kCount / kPack; ++part) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.v[i] = from_float<T>(x[part * kPack + i]);
    store128(out + part * kPack, pack);
  }
}

template <typename Out, typename In>
__global__ void __launch_bounds__(kStateThreads)
    scale_rows_cols_kernel(Out* out, int64_t out_stride, const In* in, int64_t in_stride, const float* row_scale,
                           const float* col_scale, float factor, int64_t rows, int64_t cols, bool aligned) {
  constexpr int kElements = ScaleRun<Out, In>::kElements;
  const uint32_t runs = static_cast<uint32_t>((cols + kElements - 1) / kElements);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kStateThreads + threadIdx.x;
  const int64_t row = index <= 0xffffffffll ? static_cast<uint32_t>(index) / runs : index / runs;
  if (row >= rows) return;
  const int64_t column = (index - row * runs) * kElements;
  const float row_factor = row_scale ? factor * row_scale[row] : factor;
  const In* const from = in + row * in_stride + column;
  Out* const to = out + row * out_stride + column;
  if (aligned && column + kElements <= cols) {
    float x[kElements], scales[kElements];
    load_run(x, from);
    if (col_scale) load_run(scales, col_scale + column);
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] *= col_scale ? row_factor * scales[i] : row_factor;
    store_run(to, x);
    return;
  }
  for (int i = 0; i < kElements && column + i < cols; ++i)
    to[i] = from_float<Out>(to_float(from[i]) * (col_scale ? row_factor * col_scale[column + i] : row_factor));
}

__global__ void __launch_bounds__(kStateThreads)
    full_second_moment_kernel(BlockTensor grad, BlockTensor second_moment, int64_t elements, float eps1,
                              const StepScalars* scalars) {
  const Run run = run_of_lane(block_of_warp(), elements);
  if (run.block * kQuantBlock >= elements) return;
  const RawRun raw_g = fetch(grad, run), raw_v = fetch(second_moment, run);
  if (scalars->gate == 0) return;
  const float beta2 = scalars->beta2, one_minus_beta2 = 1.0f - beta2;
  float g[kRun], v[kRun];
  decode(g, raw_g, grad.dtype);
  decode(v, raw_v, second_moment.dtype);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    v[i] = beta2 * v[i] + one_minus_beta2 * (g[i] * g[i] + eps1);
    g[i] = g[i] / sqrtf(v[i]);
  }
  store(second_moment, run, v);
  store(grad, run, g);
}

// M <- beta1 M + (1 - beta1) in, and with `write_back` in <- M before M is rounded.
__global__ void __launch_bounds__(kStateThreads)
    momentum_kernel(BlockTensor momentum, BlockTensor in, bool write_back, int64_t elements, float beta1,
                    const StepScalars* scalars) {
  const Run run = run_of_lane(block_of_warp(), elements);
  if (run.block * kQuantBlock >= elements) return;
  const RawRun raw_m = fetch(momentum, run), raw_in = fetch(in, run);
  if (scalars->gate == 0) return;
  const float one_minus_beta1 = 1.0f - beta1;
  float m[kRun], x[kRun];
  decode(m, raw_m, momentum.dtype);
  decode(x, raw_in, in.dtype);
#pragma unroll
  for (int i = 0; i < kRun; ++i) m[i] = beta1 * m[i] + one_minus_beta1 * x[i];
  store(momentum, run, m);
  if (write_back) store(in, run, m);
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
  const bool aligned =
      rows_are_aligned(out) && rows_are_aligned(in) && reinterpret_cast<uintptr_t>(col_scale.data) % 16 == 0;
  dispatch(out.dtype, in.dtype, [&]<typename Out, typename In>() {
    const int64_t runs = rows * divide_up(cols, ScaleRun<Out, In>::kElements);
    launch("scale_rows_cols", scale_rows_cols_kernel<Out, In>,
           {.grid = dim3(static_cast<unsigned>(divide_up(runs, kStateThreads))),
            .block = kStateThreads,
            .stream = stream_},
           out.as<Out>(), out.leading_dimension(), in.as<In>(), in.leading_dimension(), row_scale.as<float>(),
           col_scale.as<float>(), factor, rows, cols, aligned);
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
