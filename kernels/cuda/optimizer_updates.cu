// optimizer_updates.cu: operations that change weights, and the accumulation of gradients. Memory-bound: one read of
// every tensor, one write of what changes (AdamW moves 28 bytes an fp32 parameter, 18 with bf16 weights, gradients and
// momentum), in blocks of 256 elements a warp (state_blocks.cuh). Where an element has few bytes a warp takes two
// blocks, which have their loads under way together and share what is computed once.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/state_blocks.cuh"
#include "kernels/operands.h"

namespace {

constexpr int kBlocksPerWarp = 2;
constexpr int kResidentBlocks = 3;  // thread blocks on a multiprocessor: 80 registers a thread, which is enough

// The new value of a weight: to the master copy where there is one (the weight is then its rounding), else to the
// weight itself, stochastically if it is bf16.
struct Destination {
  BlockTensor source;  // where the old value is: the master copy or the weight
  BlockTensor weight, master;
  RandomStream stream;

  __device__ void put(const Octet& octet, const float (&x)[kOctet], uint32_t step) const {
    if (!master.data) {
      store_stochastic(weight, octet, x, stream, step);
      return;
    }
    store(master, octet, x);
    store(weight, octet, x);
  }
};

Destination destination(const Tensor& weight, const Tensor& master, const RandomKey& key) {
  return {block_tensor(master.empty() ? weight : master), block_tensor(weight), block_tensor(master),
          random_stream(key)};
}

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

__global__ void __launch_bounds__(kStateThreads, kResidentBlocks)
    apply_update_kernel(Destination destination, BlockTensor update, int64_t elements, ApplyOptions options,
                        const float* update_squares, const float* weight_squares, float parameter_elements,
                        const StepScalars* scalars) {
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
  float lr = scalars->lr * options.lr_scale, shrink = 1.0f;
  if (options.clip > 0.0f) shrink = 1.0f / fmaxf(1.0f, sqrtf(*update_squares / parameter_elements) / options.clip);
  if (options.scale_parameter) lr *= fmaxf(options.eps2, sqrtf(*weight_squares / parameter_elements));
  const float decay = options.weight_decay;
  const uint32_t step = scalars->step;
#pragma unroll
  for (int k = 0; k < kBlocksPerWarp; ++k) {
    if (octet[k].block * kQuantBlock >= elements) return;
    float w[kOctet], d[kOctet];
    decode(w, weights[k], destination.source.dtype);
    decode(d, updates[k], update.dtype);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) w[i] = w[i] - lr * (decay * w[i] + shrink * d[i]);
    destination.put(octet[k], w, step);
  }
}

// Without a momentum beta1 is 0 and m.data null.
__global__ void __launch_bounds__(kStateThreads, kResidentBlocks)
    adamw_update_kernel(Destination destination, BlockTensor m, BlockTensor v, BlockTensor grad, int64_t elements,
                        AdamWOptions options, const StepScalars* scalars) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  const RawOctet raw_g = fetch(grad, octet), raw_v = fetch(v, octet), raw_w = fetch(destination.source, octet);
  RawOctet raw_m = raw_g;
  if (m.data) raw_m = fetch(m, octet);
  if (scalars->gate == 0) return;
  const float beta1 = options.beta1, rest1 = 1.0f - beta1;
  const float beta2 = options.beta2, rest2 = 1.0f - beta2;
  const float correct1 = 1.0f / scalars->bias_correction1, correct2 = 1.0f / scalars->bias_correction2;
  const float lr = scalars->lr * options.lr_scale, eps = options.eps, decay = options.weight_decay;

  float g[kOctet], mean[kOctet], square[kOctet], w[kOctet];
  decode(g, raw_g, grad.dtype);
  decode(mean, raw_m, m.data ? m.dtype : grad.dtype);
  decode(square, raw_v, v.dtype);
  decode(w, raw_w, destination.source.dtype);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    mean[i] = beta1 * mean[i] + rest1 * g[i];
    square[i] = beta2 * square[i] + rest2 * (g[i] * g[i]);
    const float step = correct1 * mean[i] / (sqrtf(correct2 * square[i]) + eps);
    w[i] = w[i] - lr * (step + decay * w[i]);
  }
  if (m.data) store(m, octet, mean);
  store(v, octet, square);
  destination.put(octet, w, scalars->step);
}

// Without a momentum m.data is null.
__global__ void __launch_bounds__(kStateThreads, kResidentBlocks)
    sgd_update_kernel(Destination destination, BlockTensor m, BlockTensor grad, int64_t elements, SgdOptions options,
                      const StepScalars* scalars) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  const RawOctet raw_g = fetch(grad, octet), raw_w = fetch(destination.source, octet);
  RawOctet raw_m = raw_g;
  if (m.data) raw_m = fetch(m, octet);
  if (scalars->gate == 0) return;
  const float lr = scalars->lr * options.lr_scale, beta1 = options.beta1, decay = options.weight_decay;
  float w[kOctet], u[kOctet];
  decode(u, raw_g, grad.dtype);
  if (m.data) {
    float old[kOctet];
    decode(old, raw_m, m.dtype);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) u[i] = beta1 * old[i] + u[i];
    store(m, octet, u);
  }
  decode(w, raw_w, destination.source.dtype);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) w[i] = w[i] - lr * (decay * w[i] + u[i]);
  destination.put(octet, w, scalars->step);
}

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
                               RandomKey key, const StepScalars* scalars) {
  check_apply_update(weight, master, update, options, weight_squares);
  const Timed timed(*this, "apply_update", 0, update_bytes(weight, master, update));
  launch("apply_update", apply_update_kernel,
         {.grid = state_grid(update.elements(), kBlocksPerWarp), .block = kStateThreads, .stream = stream_},
         destination(weight, master, key), block_tensor(update), update.elements(), options, update_squares,
         weight_squares, static_cast<float>(elements), scalars);
}

void CudaBackend::adamw_update(Tensor weight, Tensor master, Tensor m, Tensor v, Tensor grad,
                               const AdamWOptions& options, RandomKey key, const StepScalars* scalars) {
  check_update(weight, master, grad, m, v);
  const Timed timed(*this, "adamw_update", 0, update_bytes(weight, master, grad, m, v));
  AdamWOptions used = options;
  if (m.empty()) used.beta1 = 0;
  launch("adamw_update", adamw_update_kernel,
         {.grid = state_grid(grad.elements()), .block = kStateThreads, .stream = stream_},
         destination(weight, master, key), block_tensor(m), block_tensor(v), block_tensor(grad), grad.elements(), used,
         scalars);
}

void CudaBackend::sgd_update(Tensor weight, Tensor master, Tensor m, Tensor grad, const SgdOptions& options,
                             RandomKey key, const StepScalars* scalars) {
  check_update(weight, master, grad, m);
  const Timed timed(*this, "sgd_update", 0, update_bytes(weight, master, grad, m));
  launch("sgd_update", sgd_update_kernel,
         {.grid = state_grid(grad.elements()), .block = kStateThreads, .stream = stream_},
         destination(weight, master, key), block_tensor(m), block_tensor(grad), grad.elements(), options, scalars);
}
