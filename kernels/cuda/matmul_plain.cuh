// matmul_plain.cuh: the matrix product for what cuBLASLt does not compute: operands of different dtypes, a bf16 result
// of fp32 operands, a bias of another dtype, sizes beyond int. Slower than cuBLASLt by far. A model whose weights and
// activations have one dtype comes here only where fp32 meets a bf16 projection: a compressed sum of gradients once a
// step, a transfer of the momentum once in kappa steps, an fp32 momentum of bf16 gradients every step.
#pragma once

#include <cuda_runtime.h>

#include "kernels/backend.h"

// out (+)= alpha op(a) op(b) + bias, rounded once; the shapes fit (CudaBackend::matmul checks them). gelu_input is not
// looked at.
void matmul_plain(Tensor out, Tensor a, Tensor b, const MatmulOptions& options, cudaStream_t stream);
