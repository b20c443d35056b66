// quantize.cpp: 8-bit block-wise quantization of optimizer states, after Dettmers et al., "8-bit Optimizers via
// Block-wise Quantization" (arXiv 2110.02861), with power-law code maps. Memory-bound: 5 bytes an element.
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/state_blocks.h"
#include "kernels/operands.h"

void CpuBackend::quantize(Tensor out, Tensor in) {
  check_quantize(out, in);
  const Profiler::Scope scope(profiler, "quantize", 0, static_cast<double>(out.bytes() + in.bytes()));
  for_each_block(threads_, out.elements(),
                 [&](int64_t begin, int64_t count) { store_block(out, begin, count, in.as<float>() + begin); });
}

void CpuBackend::dequantize(Tensor out, Tensor in) {
  check_dequantize(out, in);
  const Profiler::Scope scope(profiler, "dequantize", 0, static_cast<double>(out.bytes() + in.bytes()));
  for_each_block(threads_, out.elements(), [&](int64_t begin, int64_t count) {
    Block buffer;
    store_block(out, begin, count, load_block(in, begin, count, buffer));
  });
}
