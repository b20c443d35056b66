// matmul_plain.cuh: the matrix product for what cuBLASLt does not compute: operands of different dtypes, a bf16 result
// of fp32 operands, a bias of another dtype, sizes beyond int. Slower than cuBLASLt by far; a model whose weights and
// activations have one dtype never comes here.
#pragma once

#include <cuda_runtime.h>

#include "kernels/backend.h"

// out (+)= alpha op(a) op(b) + bias, rounded once; the shapes fit (CudaBackend::matmul checks them). gelu_input is not
// looked at.
void matmul_plain(Tensor out, Tensor a, Tensor b, const MatmulOptions& options, cudaStream_t stream);
