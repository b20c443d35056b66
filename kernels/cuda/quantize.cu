// quantize.cu: 8-bit block-wise quantization of optimizer states, after Dettmers et al., "8-bit Optimizers via
// Block-wise Quantization" (arXiv 2110.02861), with power-law code maps. Memory-bound: 5 bytes an element; a warp holds
// a block in registers between its largest magnitude and its codes.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/state_blocks.cuh"
#include "kernels/operands.h"

namespace {

__global__ void __launch_bounds__(kStateThreads) copy_blocks_kernel(BlockTensor out, BlockTensor in, int64_t elements) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  float x[kOctet];
  decode(x, fetch(in, octet), in.dtype);
  store(out, octet, x);
}

void copy_blocks(const char* name, const Tensor& out, const Tensor& in, cudaStream_t stream) {
  launch(name, copy_blocks_kernel, {.grid = state_grid(out.elements()), .block = kStateThreads, .stream = stream},
         block_tensor(out), block_tensor(in), out.elements());
}

}  // namespace

void CudaBackend::quantize(Tensor out, Tensor in) {
  check_quantize(out, in);
  const Timed timed(*this, "quantize", 0, static_cast<double>(out.bytes() + in.bytes()));
  copy_blocks("quantize", out, in, stream_);
}

void CudaBackend::dequantize(Tensor out, Tensor in) {
  check_dequantize(out, in);
  const Timed timed(*this, "dequantize", 0, static_cast<double>(out.bytes() + in.bytes()));
  copy_blocks("dequantize", out, in, stream_);
}
