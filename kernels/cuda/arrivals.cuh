// arrivals.cuh: what thread blocks leave for the last of them, so that adding it up needs no launch of its own. Nobody
// waits: every block counts itself when it is done, and the one that finds all others counted goes on. Which one that
// is changes nothing, because it takes what is there in a fixed order.
#pragma once

#include "kernels/cuda/ptx.cuh"

// True in all threads of the last block of a launch to come here; it sees what every other block has written before.
// `arrived` is 0 before and after the launch. `shared`: room for one number.
__device__ inline bool last_to_arrive(unsigned* arrived, unsigned* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned blocks = gridDim.x * gridDim.y;
    const bool last = atomicAdd(arrived, 1u) + 1u == blocks;
    if (last) *arrived = 0;
    *shared = last ? 1u : 0u;
  }
  __syncthreads();
  const bool last = *shared != 0;
  __threadfence();
  return last;
}
