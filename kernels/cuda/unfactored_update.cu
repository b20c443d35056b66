// unfactored_update.cu: the whole update of parameters whose second moment is not factored, under Flora and Adafactor:
// the vectors of a layer. A thread block makes all of one parameter's, so that its passes follow each other without a
// launch between them: some thousand elements, which stay in the cache. Each leaves the bits that the operations do it
// stands for (optimizer_moments.cu, reductions.cu, optimizer_updates.cu).
#include <algorithm>

#include "kernels/cuda/arrivals.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/destination.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/moments.cuh"
#include "kernels/cuda/sum_order.cuh"
#include "kernels/operands.h"

namespace {

struct UnfactoredPart {
  Destination destination;
  BlockTensor momentum, second_moment, grad;  // momentum.data may be null
  int64_t elements = 0;
  float lr_scale = 1, weight_decay = 0;
};

struct UnfactoredParts {
  UnfactoredPart parts[kMostTogether];
};

// The sum of a tensor's squares, in all threads. `shared`: room for its partial sums behind those of block_sum().
__device__ inline double sum_of_squares(const BlockTensor& t, int64_t elements, double* shared) {
  const SumPart part = sum_part(t.data, t.dtype, elements);
  double* const partials = shared + kSumThreads / kWarp + 1;
  for (int block = 0; block < part.blocks; ++block) {
    const double sum = t.dtype == DType::kBF16 ? partial_sum<true, bf16>(part, block, shared)
                                               : partial_sum<true, float>(part, block, shared);
    if (part.blocks == 1) return sum;
    if (threadIdx.x == 0) partials[block] = sum;
  }
  __syncthreads();
  return add_partial_sums(partials, part.blocks, shared);
}

// g <- the update, V and M move on.
__device__ inline void moments(const UnfactoredPart& part, const UnfactoredOptions& options, float beta2) {
  for (int64_t block = threadIdx.x / kWarp; block * kQuantBlock < part.elements; block += kStateWarps) {
    const Octet octet = octet_of_lane(block, part.elements);
    const RawOctet raw_g = fetch(part.grad, octet), raw_v = fetch(part.second_moment, octet);
    RawOctet raw_m = raw_g;
    if (part.momentum.data) raw_m = fetch(part.momentum, octet);
    float g[kOctet], v[kOctet];
    decode(g, raw_g, part.grad.dtype);
    decode(v, raw_v, part.second_moment.dtype);
    full_second_moment(g, v, beta2, options.eps1);
    store(part.second_moment, octet, v);
    if (part.momentum.data) {
      float m[kOctet];
      decode(m, raw_m, part.momentum.dtype);
      if (part.grad.dtype == DType::kBF16) round_octet<bf16>(g);
      average(m, g, options.beta1);
      store(part.momentum, octet, m);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) g[i] = m[i];
    }
    store(part.grad, octet, g);
  }
}

__global__ void __launch_bounds__(kStateThreads)
    unfactored_update_kernel(UnfactoredParts all, UnfactoredOptions options, SquaresTarget squares, double* sums,
                             unsigned* arrived, const StepScalars* scalars) {
  static_assert(kStateThreads == kSumThreads);
  double* const shared = shared_memory<double>();
  const UnfactoredPart& part = all.parts[blockIdx.x];
  if (squares.out) {
    const double sum = sum_of_squares(part.grad, part.elements, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
    if (last_to_arrive(arrived, reinterpret_cast<unsigned*>(shared + kSumThreads / kWarp)) && threadIdx.x == 0) {
#pragma unroll 1  // sixteen numbers at most, which one thread adds one after another
      for (unsigned i = 0; i < gridDim.x; ++i) store_sum(squares.out, sums[i], squares.accumulate || i > 0);
    }
  }
  if (scalars->gate == 0) return;
  moments(part, options, scalars->beta2);
  __syncthreads();
  float update_squares = 0, weight_squares = 0;
  if (options.clip > 0.0f) update_squares = static_cast<float>(sum_of_squares(part.grad, part.elements, shared));
  if (options.scale_parameter)
    weight_squares = static_cast<float>(sum_of_squares(part.destination.source, part.elements, shared));
  const ApplyOptions apply = {.weight_decay = part.weight_decay,
                              .lr_scale = part.lr_scale,
                              .clip = options.clip,
                              .scale_parameter = options.scale_parameter,
                              .eps2 = options.eps2};
  const AppliedUpdate applied =
      AppliedUpdate::of(apply, &update_squares, &weight_squares, static_cast<float>(part.elements), scalars->lr);
  for (int64_t block = threadIdx.x / kWarp; block * kQuantBlock < part.elements; block += kStateWarps) {
    const Octet octet = octet_of_lane(block, part.elements);
    const RawOctet raw_w = fetch(part.destination.source, octet), raw_d = fetch(part.grad, octet);
    float w[kOctet], d[kOctet];
    decode(w, raw_w, part.destination.source.dtype);
    decode(d, raw_d, part.grad.dtype);
    applied.apply(w, d);
    part.destination.put(octet, w, scalars->step);
  }
}

}  // namespace

void CudaBackend::unfactored_update(std::span<const ParameterUpdate> parameters, const UnfactoredOptions& options,
                                    const StepScalars* scalars, SquaresTarget squares) {
  const Timed timed(*this, "unfactored_update", 0, update_bytes(parameters));
  while (!parameters.empty()) {
    const std::span<const ParameterUpdate> now = parameters.first(std::min(parameters.size(), kMostTogether));
    parameters = parameters.subspan(now.size());
    UnfactoredParts all;
    int most_sums = 0;
    size_t count = 0;
    for (const ParameterUpdate& p : now) {
      check_parameter(p);
      most_sums = std::max(most_sums, sum_part(p.grad.data, DType::kF32, p.grad.elements()).blocks);
      all.parts[count++] = {.destination = destination(p.weight, p.master, p.key),
                            .momentum = block_tensor(p.momentum),
                            .second_moment = block_tensor(p.second_moment),
                            .grad = block_tensor(p.grad),
                            .elements = p.grad.elements(),
                            .lr_scale = p.lr_scale,
                            .weight_decay = p.weight_decay};
    }
    launch("unfactored_update", unfactored_update_kernel,
           {.grid = dim3(static_cast<unsigned>(count)),
            .block = kStateThreads,
            .shared_bytes = kSumShared + static_cast<size_t>(most_sums) * sizeof(double),
            .stream = stream_},
           all, options, squares, scratch<double>(kMostTogether * sizeof(double)), arrivals_, scalars);
    squares.accumulate = true;
  }
}
