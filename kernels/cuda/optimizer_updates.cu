// optimizer_updates.cu: operations that change weights, and the accumulation of gradients. Memory-bound: one read of
// every tensor, one write of what changes (AdamW moves 28 bytes an fp32 parameter, 18 with bf16 weights, gradients and
// momentum), in blocks of 256 elements a warp (state_blocks.cuh). Where an element has few bytes a warp takes two
// blocks, which have their loads under way together and share what is computed once.
#include <algorithm>

#include "kernels/cuda/arrivals.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/destination.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/moments.cuh"
#include "kernels/cuda/sum_order.cuh"
#include "kernels/operands.h"

namespace {

constexpr int kBlocksPerWarp = 2;
constexpr int kResidentBlocks = 3;  // thread blocks on a multiprocessor: 80 registers a thread, which is enough

__global__ void __launch_bounds__(kStateThreads, kResidentBlocks)
    accumulate_kernel(BlockTensor accumulator, BlockTensor in, int64_t elements, RandomStream stream,
                      const uint32_t* counter) {
  Octet octet[kBlocksPerWarp];
  RawOctet old[kBlocksPerWarp], added[kBlocksPerWarp];
#pragma unroll
  for (int k = 0; k < kBlocksPerWarp; ++k) {
    octet[k] = octet_of_lane(block_of_warp(kBlocksPerWarp, k), elements);
    if (octet[k].block * kQuantBlock >= elements) continue;
    old[k] = fetch(accumulator, octet[k]);
    added[k] = fetch(in, octet[k]);
  }
  const uint32_t step = *counter;
#pragma unroll
  for (int k = 0; k < kBlocksPerWarp; ++k) {
    if (octet[k].block * kQuantBlock >= elements) return;
    float sum[kOctet], x[kOctet];
    decode(sum, old[k], accumulator.dtype);
    decode(x, added[k], in.dtype);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) sum[i] = sum[i] + x[i];
    store_stochastic(accumulator, octet[k], sum, stream, step);
  }
}

// The first `update_blocks` thread blocks change the weight, the others the momentum beside it.
__global__ void __launch_bounds__(kStateThreads, kResidentBlocks)
    apply_update_kernel(Destination destination, BlockTensor update, int64_t elements, ApplyOptions options,
                        const float* update_squares, const float* weight_squares, float parameter_elements,
                        unsigned update_blocks, AveragedMomentum momentum, const StepScalars* scalars) {
  if (blockIdx.x >= update_blocks) {
    const int64_t block = static_cast<int64_t>(blockIdx.x - update_blocks) * kStateWarps + threadIdx.x / kWarp;
    average_block(momentum, block, scalars);
    return;
  }
  Octet octet[kBlocksPerWarp];
  RawOctet weights[kBlocksPerWarp], updates[kBlocksPerWarp];
#pragma unroll
  for (int k = 0; k < kBlocksPerWarp; ++k) {
    octet[k] = octet_of_lane(block_of_warp(kBlocksPerWarp, k), elements);
    if (octet[k].block * kQuantBlock >= elements) continue;
    weights[k] = fetch(destination.source, octet[k]);
    updates[k] = fetch(update, octet[k]);
  }
  if (scalars->gate == 0) return;
  const AppliedUpdate applied =
      AppliedUpdate::of(options, update_squares, weight_squares, parameter_elements, scalars->lr);
  const uint32_t step = scalars->step;
#pragma unroll
  for (int k = 0; k < kBlocksPerWarp; ++k) {
    if (octet[k].block * kQuantBlock >= elements) return;
    float w[kOctet], d[kOctet];
    decode(w, weights[k], destination.source.dtype);
    decode(d, updates[k], update.dtype);
    applied.apply(w, d);
    destination.put(octet[k], w, step);
  }
}

// ---- AdamW and SGD: one or several parameters in a launch

static_assert(kUpdateElements == kQuantBlock * kStateWarps, "a block of 256 elements a warp");

struct UpdatePart {
  Destination destination;
  BlockTensor momentum, second_moment, grad;  // momentum.data may be null
  int64_t elements = 0, first_block = 0;      // of the thread blocks of all parts
  float lr_scale = 1, weight_decay = 0;
};

template <int kCount>
struct UpdateParts {
  UpdatePart parts[kCount];
  int count = 0;

  // The part of this thread block.
  __device__ const UpdatePart& mine() const {
    int at = 0;
    if constexpr (kCount > 1)
      while (at + 1 < count && static_cast<int64_t>(blockIdx.x) >= parts[at + 1].first_block) ++at;
    return parts[at];
  }
};

// Where the squares of the gradients go: the blocks leave sums, which the last one adds.
struct GradientSquares {
  SquaresTarget target;
  double* sums = nullptr;
  unsigned* arrived = nullptr;

  // By all threads of all blocks, with eight elements each, of which those that do not exist are 0.
  __device__ void add(const float (&g)[kOctet]) const {
    double* const shared = shared_memory<double>();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) sum = fmaf(g[i], g[i], sum);
    const double of_block = block_sum(static_cast<double>(sum), shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = of_block;
    if (!last_to_arrive(arrived, reinterpret_cast<unsigned*>(shared + kStateWarps))) return;
    double total = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += kStateThreads) total += sums[i];
    total = block_sum(total, shared);
    if (threadIdx.x == 0) store_sum(target.out, total, target.accumulate);
  }
};

// AdamW's new mean, square and weight of a lane, whose loads are under way.
__device__ inline void adamw_octet(const UpdatePart& part, const Octet& octet, const float (&g)[kOctet],
                                   const RawOctet& raw_m, const RawOctet& raw_v, const RawOctet& raw_w,
                                   const AdamWOptions& options, const StepScalars* scalars) {
  const BlockTensor &m = part.momentum, &v = part.second_moment;
  const float beta1 = m.data ? options.beta1 : 0.0f, rest1 = 1.0f - beta1;
  const float beta2 = options.beta2, rest2 = 1.0f - beta2;
  const float correct1 = 1.0f / scalars->bias_correction1, correct2 = 1.0f / scalars->bias_correction2;
  const float lr = scalars->lr * part.lr_scale, eps = options.eps, decay = part.weight_decay;
  float mean[kOctet], square[kOctet], w[kOctet];
  decode(mean, raw_m, m.data ? m.dtype : part.grad.dtype);
  decode(square, raw_v, v.dtype);
  decode(w, raw_w, part.destination.source.dtype);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    mean[i] = beta1 * mean[i] + rest1 * g[i];
    square[i] = beta2 * square[i] + rest2 * (g[i] * g[i]);
    const float step = correct1 * mean[i] / (sqrtf(correct2 * square[i]) + eps);
    w[i] = w[i] - lr * (step + decay * w[i]);
  }
  if (m.data) store(m, octet, mean);
  store(v, octet, square);
  part.destination.put(octet, w, scalars->step);
}

template <int kCount>
__global__ void __launch_bounds__(kStateThreads, kResidentBlocks)
    adamw_update_kernel(UpdateParts<kCount> all, AdamWOptions options, GradientSquares squares,
                        const StepScalars* scalars) {
  const UpdatePart& part = all.mine();
  const Octet octet = octet_of_lane(block_of_warp() - part.first_block * kStateWarps, part.elements);
  const bool exists = octet.block * kQuantBlock < part.elements;
  float g[kOctet] = {};
  if (exists) {
    const RawOctet raw_g = fetch(part.grad, octet), raw_v = fetch(part.second_moment, octet),
                   raw_w = fetch(part.destination.source, octet);
    RawOctet raw_m = raw_g;
    if (part.momentum.data) raw_m = fetch(part.momentum, octet);
    decode(g, raw_g, part.grad.dtype);
    if (scalars->gate != 0) adamw_octet(part, octet, g, raw_m, raw_v, raw_w, options, scalars);
  }
  if (squares.target.out) squares.add(g);
}

template <int kCount>
__global__ void __launch_bounds__(kStateThreads, kResidentBlocks)
    sgd_update_kernel(UpdateParts<kCount> all, float beta1, GradientSquares squares, const StepScalars* scalars) {
  const UpdatePart& part = all.mine();
  const BlockTensor& m = part.momentum;
  const Octet octet = octet_of_lane(block_of_warp() - part.first_block * kStateWarps, part.elements);
  const bool exists = octet.block * kQuantBlock < part.elements;
  float g[kOctet] = {};
  if (exists) {
    const RawOctet raw_g = fetch(part.grad, octet), raw_w = fetch(part.destination.source, octet);
    RawOctet raw_m = raw_g;
    if (m.data) raw_m = fetch(m, octet);
    decode(g, raw_g, part.grad.dtype);
    if (scalars->gate != 0) {
      const float lr = scalars->lr * part.lr_scale, decay = part.weight_decay;
      float w[kOctet], u[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) u[i] = g[i];
      if (m.data) {
        float old[kOctet];
        decode(old, raw_m, m.dtype);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) u[i] = beta1 * old[i] + u[i];
        store(m, octet, u);
      }
      decode(w, raw_w, part.destination.source.dtype);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) w[i] = w[i] - lr * (decay * w[i] + u[i]);
      part.destination.put(octet, w, scalars->step);
    }
  }
  if (squares.target.out) squares.add(g);
}

// Parts of a launch, and its thread blocks.
template <int kCount>
UpdateParts<kCount> update_parts(std::span<const ParameterUpdate> parameters, unsigned& blocks) {
  UpdateParts<kCount> all;
  int64_t next = 0;
  for (const ParameterUpdate& p : parameters) {
    all.parts[all.count++] = {.destination = destination(p.weight, p.master, p.key),
                              .momentum = block_tensor(p.momentum),
                              .second_moment = block_tensor(p.second_moment),
                              .grad = block_tensor(p.grad),
                              .elements = p.grad.elements(),
                              .first_block = next,
                              .lr_scale = p.lr_scale,
                              .weight_decay = p.weight_decay};
    next += divide_up(p.grad.elements(), kUpdateElements);
  }
  blocks = static_cast<unsigned>(std::max<int64_t>(next, 1));
  return all;
}

constexpr size_t kUpdateShared = (kStateWarps + 1) * sizeof(double);

}  // namespace

void CudaBackend::accumulate(Tensor accumulator, Tensor in, RandomKey key, const uint32_t* counter) {
  check_state(accumulator, in);
  const Timed timed(*this, "accumulate", 0, static_cast<double>(in.bytes() + 2 * accumulator.bytes()));
  launch("accumulate", accumulate_kernel,
         {.grid = state_grid(in.elements(), kBlocksPerWarp), .block = kStateThreads, .stream = stream_},
         block_tensor(accumulator), block_tensor(in), in.elements(), random_stream(key), counter);
}

void CudaBackend::apply_update(Tensor weight, Tensor master, Tensor update, const ApplyOptions& options,
                               const float* update_squares, const float* weight_squares, int64_t elements,
                               RandomKey key, const StepScalars* scalars, const MomentumAverage* average) {
  check_apply_update(weight, master, update, options, weight_squares);
  if (average) check_average(*average);
  const Timed timed(*this, "apply_update", 0, update_bytes(weight, master, update));
  const AveragedMomentum momentum = average ? averaged_momentum(*average) : AveragedMomentum{};
  const unsigned update_blocks = state_grid(update.elements(), kBlocksPerWarp).x;
  const unsigned momentum_blocks = average ? state_grid(momentum.elements).x : 0;
  launch("apply_update", apply_update_kernel,
         {.grid = dim3(update_blocks + momentum_blocks), .block = kStateThreads, .stream = stream_},
         destination(weight, master, key), block_tensor(update), update.elements(), options, update_squares,
         weight_squares, static_cast<float>(elements), update_blocks, momentum, scalars);
}

// Calls launch_parts(parts, blocks, squares) with all parameters, as many at a time as a launch takes.
template <typename Launch>
void CudaBackend::for_parts(std::span<const ParameterUpdate> parameters, SquaresTarget squares, Launch&& launch_parts) {
  for (const ParameterUpdate& p : parameters) check_parameter(p);
  while (!parameters.empty()) {
    const std::span<const ParameterUpdate> now = parameters.first(std::min(parameters.size(), kMostTogether));
    parameters = parameters.subspan(now.size());
    const auto with = [&]<int kCount>() {
      unsigned blocks = 0;
      const UpdateParts<kCount> parts = update_parts<kCount>(now, blocks);
      GradientSquares sums{squares};
      if (squares.out) {
        sums.sums = scratch<double>(blocks * sizeof(double));
        sums.arrived = arrivals_;
      }
      launch_parts.template operator()<kCount>(
          parts,
          LaunchShape{.grid = dim3(blocks), .block = kStateThreads, .shared_bytes = kUpdateShared, .stream = stream_},
          sums);
    };
    if (now.size() == 1) {
      with.template operator()<1>();
    } else {
      with.template operator()<static_cast<int>(kMostTogether)>();
    }
    squares.accumulate = true;
  }
}

void CudaBackend::adamw_update(std::span<const ParameterUpdate> parameters, const AdamWOptions& options,
                               const StepScalars* scalars, SquaresTarget squares) {
  const Timed timed(*this, "adamw_update", 0, update_bytes(parameters));
  for_parts(parameters, squares,
            [&]<int kCount>(const UpdateParts<kCount>& parts, const LaunchShape& shape, const GradientSquares& sums) {
              launch("adamw_update", adamw_update_kernel<kCount>, shape, parts, options, sums, scalars);
            });
}

void CudaBackend::sgd_update(std::span<const ParameterUpdate> parameters, float beta1, const StepScalars* scalars,
                             SquaresTarget squares) {
  const Timed timed(*this, "sgd_update", 0, update_bytes(parameters));
  for_parts(parameters, squares,
            [&]<int kCount>(const UpdateParts<kCount>& parts, const LaunchShape& shape, const GradientSquares& sums) {
              launch("sgd_update", sgd_update_kernel<kCount>, shape, parts, beta1, sums, scalars);
            });
}
