// planning_backend.cpp: stands for a CUDA device that this machine does not have, so that a run on one can be planned
// here. It computes nothing: what it says of itself is the CUDA backend's, what it is asked to allocate it refuses.
#include <stdexcept>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda_workspace.h"

namespace {

class PlanningBackend final : public CpuBackend {
 public:
  PlanningBackend() : CpuBackend({.threads = 1}) {}

  std::string name() const override { return "cuda"; }
  std::string description() const override { return "a CUDA device that is not here"; }
  size_t memory_available() const override { return 0; }
  size_t runtime_bytes() const override { return kCudaContextBytes + kCudaRuntimeReserve; }
  double measure_peak_flops() override { throw std::runtime_error("a device that is not here cannot be measured"); }
  void* allocate(size_t) override { return refuse(); }
  void* allocate_host(size_t) override { return refuse(); }
  bool has_update_stream() const override { return true; }
  size_t workspace_bytes(const KernelShapes& shapes) const override { return cuda_workspace_bytes(shapes); }
  bool transforms_cosines(int64_t, int64_t) const override { return false; }

 private:
  [[noreturn]] static void* refuse() {
    throw std::runtime_error("there is no CUDA device here to allocate memory on: the run can only be planned");
  }
};

}  // namespace

std::unique_ptr<Backend> make_planning_backend() { return std::make_unique<PlanningBackend>(); }
