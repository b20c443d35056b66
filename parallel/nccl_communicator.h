// nccl_communicator.h: the ranks of a run on GPUs, by NCCL 2.28 or newer, on a stream of its own.
#pragma once

#include <chrono>
#include <memory>

#include "kernels/backend.h"
#include "parallel/communicator.h"
#include "parallel/job.h"

// Connects this rank with every other one; all of them call it. The backend must be a CUDA backend, and lives longer.
// Sums go round a ring, so that their order is fixed, unless the environment variable NCCL_ALGO says otherwise. A
// thread asks NCCL for errors; when there is one, or an operation that has begun is not done within `timeout`,
// everything that is under way is broken off, and what is asked for next throws. Throws std::runtime_error in one line.
std::unique_ptr<Communicator> make_nccl_communicator(Job& job, Backend& backend, std::chrono::milliseconds timeout);
