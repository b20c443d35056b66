// block.h: runs the threads of one block, each on a fiber of the calling OS thread, in an order that a seed decides.
//
// A thread runs until it waits for others or ends. A fiber whose thread ended takes the next thread that has not
// started, so a kernel without barriers costs no switch at all. The scheduler mostly stays with one warp as long as
// that can run, which lets warps get far ahead of each other: what a missing __syncthreads needs to be seen. Within a
// warp the next lane is any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda_runtime.h"

namespace cuda_on_cpu {

struct Launch {
  const void* function;
  Kernel kernel;
  dim3 grid, block;
  size_t shared_bytes;
  uint64_t number;  // of this launch in the program
};

// The scheduler of the calling OS thread runs this block from beginning to end.
void run_block(const Launch& launch, uint3 block_index);

// The dynamic shared memory of the block that runs on this OS thread, 1024-byte aligned.
extern constinit thread_local unsigned char* block_shared_memory;

// "kernel f<float>, block (0, 1, 0), thread (5, 0, 0)" or, outside a kernel, "".
std::string running_thread();

// Did a thread of the block that runs on this OS thread use up its stack?
bool is_stack_overflow(const void* address);

// Where an address is in or near the shared memory of the block that runs on this OS thread; "" for others.
std::string describe_shared_address(const void* address);

}  // namespace cuda_on_cpu
