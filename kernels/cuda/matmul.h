// matmul.h: matrix products through cuBLASLt. For each shape (sizes, leading dimensions, dtypes, transposition,
// alignment, epilogue) the descriptors are made and an algorithm is chosen once, then reused for the whole run.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <string>

#include "kernels/backend.h"

class CudaMatmul {
 public:
  using GeluBackward = std::function<void(Tensor d, Tensor in)>;

  // Nothing is loaded before the first product.
  CudaMatmul(const CudaOptions& options, int architecture);
  ~CudaMatmul();

  // out[M,N] (+)= alpha op(a) op(b) + bias on `stream`, as Backend::matmul() says, which has checked the shapes; also
  // what cuBLASLt does not do (mixed operands), by a plain kernel. True when the result was also multiplied by
  // gelu'(options.gelu_input), which some shapes are faster with; if not, that is left to the caller, who says by
  // `gelu_backward` what it would run: tuning compares the two. Throws std::runtime_error naming the shape when no
  // algorithm exists.
  bool run(Tensor out, Tensor a, Tensor b, const MatmulOptions& options, void* workspace, size_t workspace_bytes,
           cudaStream_t stream, const GeluBackward& gelu_backward = {});

  // The algorithms chosen so far, as text for a checkpoint, and back. What was made by another cuBLASLt or for another
  // GPU is ignored.
  std::string tuning() const;
  void set_tuning(const std::string& tuning);
  void end_tuning();  // from now on the library's first choice, where nothing else is remembered

 private:
  struct State;
  std::unique_ptr<State> state_;
};
