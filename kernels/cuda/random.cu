// random.cu: tensors filled from the counter-based generator; what a lane makes is in projection_numbers.cuh.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/projection_numbers.cuh"
#include "kernels/operands.h"

namespace {

__global__ void __launch_bounds__(kStateThreads)
    normals_kernel(BlockTensor out, int64_t elements, float mean, float stddev, RandomStream stream,
                   const uint32_t* index) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  float x[kOctet];
  normal_octet(x, stream, index ? *index : 0, stream.offset + static_cast<uint64_t>(octet.first));
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] = mean + stddev * x[i];
  store(out, octet, x);
}

template <ProjectionKind kKind>
__global__ void __launch_bounds__(kStateThreads)
    projection_kernel(BlockTensor out, int64_t elements, ProjectionNumbers numbers) {
  const Octet octet = octet_of_lane(block_of_warp(), elements);
  if (octet.block * kQuantBlock >= elements) return;
  float x[kOctet];
  projection_octet<kKind>(x, numbers, octet.first);
  store(out, octet, x);
}

}  // namespace

void CudaBackend::fill_normal(Tensor x, float mean, float stddev, RandomKey key) {
  require_elements(x, x.elements(), "fill_normal: the tensor must be contiguous");
  const Timed timed(*this, "fill_normal", 0, static_cast<double>(x.bytes()));
  launch("fill_normal", normals_kernel, {.grid = state_grid(x.elements()), .block = kStateThreads, .stream = stream_},
         block_tensor(x), x.elements(), mean, stddev, random_stream(key), static_cast<const uint32_t*>(nullptr));
}

void CudaBackend::generate_projection(Tensor projection, ProjectionKind kind, RandomKey key, const uint32_t* index) {
  check_projection(projection, kind);
  const Timed timed(*this, "generate_projection", 0, static_cast<double>(projection.bytes()));
  dispatch(kind, [&]<ProjectionKind kKind>() {
    launch("generate_projection", projection_kernel<kKind>,
           {.grid = state_grid(projection.elements()), .block = kStateThreads, .stream = stream_},
           block_tensor(projection), projection.elements(), projection_numbers(projection, key, index));
  });
}
