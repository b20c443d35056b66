// optimizer_moments.cu: moments of gradients, element by element; the factored ones are in factored_moment.cu.
// Memory-bound: every operation reads each tensor once and writes what it changes once.
#include "kernels/cuda/arrivals.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/moments.cuh"
#include "kernels/cuda/sum_order.cuh"
#include "kernels/operands.h"

namespace {

// A ScaledSum on the device; `added` may have no data. `vectors`: rows of octets, which the momenta of ranks that are
// no multiple of 8 do not have.
struct SumViews {
  AnyView out, in, added;
  const float *row_scale = nullptr, *col_scale = nullptr;
  float factor = 1.0f;
  int64_t rows = 0, cols = 0;
  bool vectors = false;

  int64_t groups(int width) const { return rows * divide_up(cols, width); }
};

SumViews sum_views(const ScaledSum& sum) {
  check_scaled_sum(sum);
  return {.out = any_view(sum.out),
          .in = any_view(sum.in),
          .added = sum.added.empty() ? AnyView{} : any_view(sum.added),
          .row_scale = sum.row_scale.as<const float>(),
          .col_scale = sum.col_scale.as<const float>(),
          .factor = sum.factor,
          .rows = sum.in.rows(),
          .cols = sum.in.cols(),
          .vectors = has_octet_rows(sum.out) && has_octet_rows(sum.in) && begins_aligned(sum.col_scale) &&
                     (sum.added.empty() || has_octet_rows(sum.added))};
}

// Group `index` of kWidth columns; load(row, column, x) and store(row, column, x) do so with all of a group.
template <int kWidth, typename Load, typename Store>
__device__ inline void scaled_sum(const SumViews& s, int64_t index, Load&& load, Store&& store) {
  const uint32_t groups = static_cast<uint32_t>((s.cols + kWidth - 1) / kWidth);
  const int64_t row = index <= 0xffffffffll ? static_cast<uint32_t>(index) / groups : index / groups;
  if (row >= s.rows) return;
  const int64_t column = (index - row * groups) * kWidth;
  const float row_factor = s.row_scale ? s.factor * s.row_scale[row] : s.factor;
  if (s.vectors) {
    float x[kWidth], scales[kWidth];
    load(row, column, x);
    if (s.col_scale) unpack(load_vector<kWidth>(s.col_scale + column), scales);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] *= s.col_scale ? row_factor * scales[i] : row_factor;
    if (s.added.data) {
      float more[kWidth];
      s.added.load_octet(row, column, more);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] += more[i];
    }
    store(row, column, x);
    return;
  }
  for (int64_t j = column; j < column + kWidth && j < s.cols; ++j) {
    float x = s.in.load_one(row, j) * (s.col_scale ? row_factor * s.col_scale[j] : row_factor);
    if (s.added.data) x += s.added.load_one(row, j);
    s.out.store_one(row, j, x);
  }
}

// The first sum's types are known, kWidth columns a thread; `beside` has the blocks after its, octets of any type.
template <typename Out, typename In, int kWidth>
__global__ void __launch_bounds__(kStateThreads)
    scale_rows_cols_kernel(SumViews sum, unsigned blocks, SumViews beside) {
  if (blockIdx.x >= blocks) {
    const int64_t index = static_cast<int64_t>(blockIdx.x - blocks) * kStateThreads + threadIdx.x;
    scaled_sum<kOctet>(
        beside, index, [&](int64_t row, int64_t column, auto& x) { beside.in.load_octet(row, column, x); },
        [&](int64_t row, int64_t column, const auto& x) { beside.out.store_octet(row, column, x); });
    return;
  }
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kStateThreads + threadIdx.x;
  const VectorView<Out, kWidth> out = {static_cast<Out*>(sum.out.data), sum.out.pitch};
  const VectorView<In, kWidth> in = {static_cast<In*>(sum.in.data), sum.in.pitch};
  scaled_sum<kWidth>(
      sum, index, [&](int64_t row, int64_t column, auto& x) { unpack(in.load_again(row, column), x); },
      [&](int64_t row, int64_t column, const auto& x) { out.store(row, column, x); });
}

__global__ void __launch_bounds__(kStateThreads, 4)  // 64 registers: with less it spills
    full_second_moment_kernel(BlockTensor grad, BlockTensor second_moment, int64_t elements, float eps1,
                              const StepScalars* scalars) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  const RawOctet raw_g = fetch(grad, octet), raw_v = fetch(second_moment, octet);
  if (scalars->gate == 0) return;
  const float beta2 = scalars->beta2;
  float g[kOctet], v[kOctet];
  decode(g, raw_g, grad.dtype);
  decode(v, raw_v, second_moment.dtype);
  full_second_moment(g, v, beta2, eps1);
  store(second_moment, octet, v);
  store(grad, octet, g);
}

// M <- beta1 M + (1 - beta1) update; update <- M before M is rounded.
__global__ void __launch_bounds__(kStateThreads)
    momentum_kernel(BlockTensor momentum, BlockTensor update, int64_t elements, float beta1,
                    const StepScalars* scalars) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  const RawOctet raw_m = fetch(momentum, octet), raw_u = fetch(update, octet);
  if (scalars->gate == 0) return;
  float m[kOctet], u[kOctet];
  decode(m, raw_m, momentum.dtype);
  decode(u, raw_u, update.dtype);
  average(m, u, beta1);
  store(momentum, octet, m);
  store(update, octet, m);
}

__global__ void __launch_bounds__(kStateThreads) ema_kernel(AveragedMomentum average, const StepScalars* scalars) {
  average_block(average, block_of_warp(), scalars);
}

// The update, scaled by rows and columns, through an uncompressed momentum (unless momentum.data is null), and its
// squares: all tensors are contiguous, of whole octets. T: of the update.
template <typename T>
__global__ void __launch_bounds__(OctetSquares<T>::kThreads, 3 * kSumThreads / OctetSquares<T>::kThreads)
    scaled_momentum_kernel(BlockTensor update, BlockTensor momentum, MatrixScales scales, SumPart part, float beta1,
                           const StepScalars* scalars, SquaresTarget result, double* partials, unsigned* arrived) {
  double* const shared = shared_memory<double>();
  const int64_t elements = part.extent.cols;
  const bool open = scalars->gate != 0;
  OctetSquares<T> squares;
  for (int64_t tile = blockIdx.x; tile < part.tiles; tile += gridDim.x) {
#pragma unroll 2
    for (int k = 0; k < kSumUnroll; ++k) {
      const int64_t first = squares.octet(tile, k) * kOctet;
      const Octet octet = octet_of_lane(first / kQuantBlock, elements);
      if (octet.block * kQuantBlock >= elements) continue;
      const RawOctet raw_u = fetch(update, octet);
      RawOctet raw_m = raw_u;
      if (momentum.data) raw_m = fetch(momentum, octet);
      float u[kOctet];
      decode(u, raw_u, update.dtype);
      if (scales.any()) {
        scales.apply(u, octet);
        round_octet<T>(u);
      }
      if (momentum.data) {
        float m[kOctet];
        decode(m, raw_m, momentum.dtype);
        average(m, u, beta1);
        if (open) store(momentum, octet, m);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) u[i] = m[i];
        round_octet<T>(u);
      }
      store(update, octet, u);
      if (octet.count > 0) squares.add(u);
    }
    squares.end_tile();
  }
  if (!result.out) return;
  const double total = squares.total(shared);
  if (gridDim.x == 1) {
    if (threadIdx.x == 0) store_sum(result.out, total, result.accumulate);
    return;
  }
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
  if (!last_to_arrive(arrived, reinterpret_cast<unsigned*>(shared + kSumThreads / kWarp))) return;
  const double sum = add_partial_sums<OctetSquares<T>::kThreads>(partials, static_cast<int>(gridDim.x), shared);
  if (threadIdx.x == 0) store_sum(result.out, sum, result.accumulate);
}

}  // namespace

void CudaBackend::full_second_moment(Tensor grad, Tensor second_moment, float eps1, const StepScalars* scalars) {
  check_state(second_moment, grad);
  const Timed timed(*this, "full_second_moment", 0, static_cast<double>(2 * grad.bytes() + 2 * second_moment.bytes()));
  launch("full_second_moment", full_second_moment_kernel,
         {.grid = state_grid(grad.elements()), .block = kStateThreads, .stream = stream_}, block_tensor(grad),
         block_tensor(second_moment), grad.elements(), eps1, scalars);
}

void CudaBackend::scale_rows_cols(const ScaledSum& sum, const ScaledSum* beside) {
  const SumViews views = sum_views(sum), beside_views = beside ? sum_views(*beside) : SumViews{};
  const auto bytes = [](const ScaledSum& s) { return s.in.bytes() + s.out.bytes() + s.added.bytes(); };
  const Timed timed(*this, "scale_rows_cols", 0, static_cast<double>(bytes(sum) + (beside ? bytes(*beside) : 0)));
  dispatch(sum.out.dtype, sum.in.dtype, [&]<typename Out, typename In>() {
    constexpr int kWidth = kVectorWidth<Out, In>;
    const auto blocks = static_cast<unsigned>(divide_up(views.groups(kWidth), kStateThreads));
    const auto more = static_cast<unsigned>(divide_up(beside_views.groups(kOctet), kStateThreads));
    if (blocks + more == 0) return;
    launch("scale_rows_cols", scale_rows_cols_kernel<Out, In, kWidth>,
           {.grid = dim3(blocks + more), .block = kStateThreads, .stream = stream_}, views, blocks, beside_views);
  });
}

void CudaBackend::momentum_update(Tensor update, Tensor momentum, float beta1, const StepScalars* scalars) {
  check_state(momentum, update);
  const Timed timed(*this, "momentum_update", 0, static_cast<double>(2 * update.bytes() + 2 * momentum.bytes()));
  launch("momentum_update", momentum_kernel,
         {.grid = state_grid(update.elements()), .block = kStateThreads, .stream = stream_}, block_tensor(momentum),
         block_tensor(update), update.elements(), beta1, scalars);
}

// What is not made of whole octets takes the three passes that this one stands for.
void CudaBackend::scaled_momentum_update(Tensor update, Tensor momentum, Tensor row_scale, Tensor col_scale,
                                         float beta1, const StepScalars* scalars, SquaresTarget squares) {
  const bool scaled = !row_scale.empty() || !col_scale.empty();
  if (!momentum.empty()) check_state(momentum, update);
  check_scaled_sum({update, update, row_scale, col_scale});
  if (update.cols() % kOctet != 0 || !update.contiguous() || !takes_scales(update)) {
    if (scaled) scale_rows_cols({update, update, row_scale, col_scale}, nullptr);
    if (!momentum.empty()) momentum_update(update, momentum, beta1, scalars);
    if (squares.out) sum_squares(Tensor::of(squares.out, DType::kF32, {1}), {&update, 1}, squares.accumulate);
    return;
  }
  const Timed timed(*this, "scaled_momentum_update", 0, static_cast<double>(2 * update.bytes() + 2 * momentum.bytes()));
  const SumPart part = sum_part(update);
  dispatch(update.dtype, [&]<typename T>() {
    launch("scaled_momentum_update", scaled_momentum_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(part.blocks)),
            .block = OctetSquares<T>::kThreads,
            .shared_bytes = kSumShared,
            .stream = stream_},
           block_tensor(update), block_tensor(momentum), matrix_scales(row_scale, col_scale, update), part, beta1,
           scalars, squares, scratch<double>(static_cast<size_t>(part.blocks) * sizeof(double)), arrivals_);
  });
}

void CudaBackend::ema(const MomentumAverage& average, const StepScalars* scalars) {
  check_average(average);
  const Timed timed(*this, "ema", 0, static_cast<double>(average.in.bytes() + 2 * average.momentum.bytes()));
  launch("ema", ema_kernel, {.grid = state_grid(average.in.elements()), .block = kStateThreads, .stream = stream_},
         averaged_momentum(average), scalars);
}
