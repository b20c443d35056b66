// communicator.cpp: which communicator a device takes, and what all of them have in common.
#include "parallel/communicator.h"

#include "kernels/backend.h"
#include "parallel/job.h"
#include "parallel/nccl_communicator.h"
#include "parallel/ring_communicator.h"

int64_t all_reduce_bytes(std::span<const Tensor> tensors, int ranks) {
  int64_t bytes = 0;
  for (const Tensor& t : tensors) {
    if (!t.contiguous() || (t.dtype != DType::kF32 && t.dtype != DType::kBF16))
      throw std::logic_error("all_reduce: takes contiguous tensors of fp32 or bf16");
    bytes += static_cast<int64_t>(t.bytes());
  }
  return 2 * (ranks - 1) * bytes / ranks;
}

std::unique_ptr<Communicator> make_communicator(Job& job, Backend& backend, std::chrono::milliseconds timeout) {
  if (job.size() == 1) return std::make_unique<AloneCommunicator>();
  if (backend.name() == "cpu") return make_ring_communicator(job, job.address(), timeout);
  return make_nccl_communicator(job, backend, timeout);
}
