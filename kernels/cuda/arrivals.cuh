// arrivals.cuh: what thread blocks leave for the last of them, so that adding it up needs no launch of its own. Nobody
// waits: every block counts itself when it is done, and the one that finds all others counted goes on. Which one that
// is changes nothing, because it takes what is there in a fixed order.
#pragma once

#include "kernels/cuda/ptx.cuh"

// Blocks of a launch, and how many of them have come: 0 before and after it.
struct BlockGroup {
  unsigned* arrived;
  unsigned blocks;
};

struct LastOfTwo {
  bool first, second;
};

// Whether this block is the last one to come here of each of the groups it belongs to; true in all its threads, which
// then see what every other block of the group has written before. `shared`: room for a number for each group.
__device__ inline LastOfTwo last_of_two_to_arrive(BlockGroup first, BlockGroup second, unsigned* shared) {
  const int groups = second.arrived ? 2 : 1;
  __threadfence();
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < groups) {  // a thread for each, so that both counts are under way together
    const BlockGroup group = threadIdx.x == 0 ? first : second;
    const bool last = atomicAdd(group.arrived, 1u) + 1u == group.blocks;
    if (last) *group.arrived = 0;
    shared[threadIdx.x] = last ? 1u : 0u;
  }
  __syncthreads();
  const LastOfTwo last = {shared[0] != 0, groups == 2 && shared[1] != 0};
  __threadfence();
  return last;
}

// The same of all blocks of a launch.
__device__ inline bool last_to_arrive(unsigned* arrived, unsigned* shared) {
  return last_of_two_to_arrive({arrived, gridDim.x * gridDim.y}, {nullptr, 0}, shared).first;
}
