// elementwise.cu: additions, conversions and scalings, and the operations on single numbers.
// Memory-bound: each element is read once and written once, by the kernel in map.cuh. What is in device memory (a
// factor, a gate) is read by the kernel, so that the host never waits for it.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/map.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/operands.h"

namespace {

struct Convert {
  __device__ bool start() { return true; }
  __device__ float operator()(float x) const { return x; }
};

struct Scale {
  float factor;
  __device__ float operator()(float x) const { return x * factor; }
};

// Of several tensors of one dtype: the thread blocks of part i are first_block[i] .. first_block[i + 1] - 1.
struct ScaleParts {
  void* data[kMostTogether];
  int64_t pitch[kMostTogether];
  Extent extent[kMostTogether];
  int64_t first_block[kMostTogether + 1];
};

template <typename T>
__global__ void __launch_bounds__(kMapThreads) scale_kernel(ScaleParts parts, const float* source) {
  const float factor = *source;
  if (factor == 1.0f) return;
  constexpr int kWidth = Pack<T>::kSize;
  int at = 0;
  while (static_cast<int64_t>(blockIdx.x) >= parts.first_block[at + 1]) ++at;
  const VectorView<T, kWidth> x{static_cast<T*>(parts.data[at]), parts.pitch[at]};
  map_tile(Scale{factor}, x, x, parts.extent[at], static_cast<int64_t>(blockIdx.x) - parts.first_block[at]);
}

void scale_together(cudaStream_t stream, std::span<const Tensor> tensors, const float* factor) {
  dispatch(tensors.front().dtype, [&]<typename T>() {
    ScaleParts parts = {};
    size_t at = 0;
    for (const Tensor& x : tensors) {
      parts.data[at] = x.data;
      parts.pitch[at] = x.leading_dimension();
      parts.extent[at] = common_extent(x);
      const bool empty = parts.extent[at].rows == 0;
      const int64_t blocks = empty ? 0 : std::max<int64_t>(1, parts.extent[at].tiles(Pack<T>::kSize, kMapTile));
      parts.first_block[at + 1] = parts.first_block[at] + blocks;
      ++at;
    }
    if (parts.first_block[at] == 0) return;
    launch("scale", scale_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(parts.first_block[at])), .block = dim3(kMapThreads), .stream = stream},
           parts, factor);
  });
}

struct RestoreNorm {
  const float *target_squares, *current_squares;
  float factor = 1.0f;
  __device__ bool start() {
    const float current = *current_squares;
    factor = current == 0.0f ? 1.0f : sqrtf(*target_squares / current);
    return factor != 1.0f;
  }
  __device__ float operator()(float x) const { return x * factor; }
};

__global__ void gate_on_finite_kernel(StepScalars* scalars, const float* value) {
  if (!isfinite(*value)) scalars->gate = 0;
}

__global__ void clip_scale_kernel(StepScalars* scalars, const float* squares, float clip_norm) {
  scalars->gradient_scale = fminf(1.0f, clip_norm / (sqrtf(*squares) + 1e-6f));
}

}  // namespace

void convert_elements(const Tensor& out, const Tensor& in, cudaStream_t stream) {
  const Extent extent = common_extent(out, in);
  if (extent.rows == 0) return;
  dispatch(out.dtype, in.dtype, [&]<typename Out, typename In>() {
    constexpr int kWidth = kVectorWidth<Out, In>;
    launch_map("convert", stream, Convert{}, vector_view<Out, kWidth>(out), vector_view<In, kWidth>(in), extent);
  });
}

void CudaBackend::convert(Tensor out, Tensor in) {
  const Timed timed(*this, "convert", 0, static_cast<double>(out.bytes() + in.bytes()));
  convert_elements(out, in, stream_);
}

// The bytes are those of a factor other than 1: the host does not know it.
void CudaBackend::scale(std::span<const Tensor> tensors, const float* factor) {
  const Timed timed(*this, "scale", 0, 2.0 * total_bytes(tensors));
  while (!tensors.empty()) {
    size_t count = 1;
    while (count < std::min(tensors.size(), kMostTogether) && tensors[count].dtype == tensors[0].dtype) ++count;
    scale_together(stream_, tensors.first(count), factor);
    tensors = tensors.subspan(count);
  }
}

void CudaBackend::restore_norm(Tensor x, const float* target_squares, const float* current_squares) {
  const Timed timed(*this, "restore_norm", 0, 2.0 * static_cast<double>(x.bytes()));
  map("restore_norm", stream_, RestoreNorm{target_squares, current_squares}, x, x);
}

void CudaBackend::fill_constant(Tensor x, float value) {
  const Timed timed(*this, "fill_constant", 0, static_cast<double>(x.bytes()));
  map_constant("fill_constant", stream_, Constant{value}, x);
}

void CudaBackend::gate_on_finite(StepScalars* scalars, Tensor value) {
  require(value.dtype == DType::kF32, "gate_on_finite: fp32");
  launch("gate_on_finite", gate_on_finite_kernel, {.stream = stream_}, scalars, value.as<const float>());
}

void CudaBackend::clip_scale(StepScalars* scalars, const float* squares, float clip_norm) {
  launch("clip_scale", clip_scale_kernel, {.stream = stream_}, scalars, squares, clip_norm);
}
