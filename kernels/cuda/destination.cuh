// destination.cuh: where an update puts the new value of a weight, and the update of Flora and Adafactor itself.
#pragma once

#include "kernels/cuda/state_blocks.cuh"

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

inline Destination destination(const Tensor& weight, const Tensor& master, const RandomKey& key) {
  return {block_tensor(master.empty() ? weight : master), block_tensor(weight), block_tensor(master),
          random_stream(key)};
}

// W <- W - lr (decay W + shrink D)
struct AppliedUpdate {
  float lr = 0, decay = 0, shrink = 1.0f;

  // From the sums of squares of a parameter of so many elements.
  __device__ static AppliedUpdate of(const ApplyOptions& options, const float* update_squares,
                                     const float* weight_squares, float elements, float step_lr) {
    AppliedUpdate u{step_lr * options.lr_scale, options.weight_decay};
    if (options.clip > 0.0f) u.shrink = 1.0f / fmaxf(1.0f, sqrtf(*update_squares / elements) / options.clip);
    if (options.scale_parameter) u.lr *= fmaxf(options.eps2, sqrtf(*weight_squares / elements));
    return u;
  }

  __device__ void apply(float (&w)[kOctet], const float (&d)[kOctet]) const {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) w[i] = w[i] - lr * (decay * w[i] + shrink * d[i]);
  }
};
