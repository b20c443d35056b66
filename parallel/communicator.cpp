// communicator.cpp: which communicator a device takes.
#include "parallel/communicator.h"

#include "kernels/backend.h"
#include "parallel/gloo_communicator.h"
#include "parallel/job.h"
#include "parallel/nccl_communicator.h"

std::unique_ptr<Communicator> make_communicator(Job& job, Backend& backend, std::chrono::milliseconds timeout) {
  if (job.size() == 1) return std::make_unique<AloneCommunicator>();
  if (backend.name() == "cpu") return make_gloo_communicator(job, job.address(), timeout);
  return make_nccl_communicator(job, backend, timeout);
}
