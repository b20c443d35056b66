// map.cuh: out = op(in), element by element: the one kernel behind the elementwise operations.
// Memory-bound: one read, one write. A thread has kMapUnroll vectors on their way before it computes anything.
#pragma once

#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/views.cuh"

inline constexpr int kMapThreads = 256, kMapUnroll = 4, kMapTile = kMapThreads * kMapUnroll;

struct Constant {
  float value;
  __device__ bool start() { return true; }
  __device__ float operator()(float) const { return value; }
};

// op.start(): once per thread, reads what the operation takes from device memory; false when there is nothing to do.
// op(x): the new element from the one that is read (0 where there is none).
template <typename Op, typename Out, typename In>
__device__ inline void map_tile(Op op, Out out, In in, const Extent& extent, int64_t index) {
  constexpr int kWidth = Out::kWidth;
  const int64_t row_groups = extent.cols / kWidth;
  const Tile tile = tile_of<kWidth, kMapTile>(extent, index);
  const int64_t first = tile.first + threadIdx.x;
  typename In::Raw raw[kMapUnroll];
#pragma unroll
  for (int u = 0; u < kMapUnroll; ++u) {
    const int64_t group = first + u * kMapThreads;
    if (group >= row_groups) continue;
    raw[u] = in.load(tile.row, group * kWidth);
  }
#pragma unroll
  for (int u = 0; u < kMapUnroll; ++u) {
    const int64_t group = first + u * kMapThreads;
    if (group >= row_groups) continue;
    float x[kWidth];
    In::unpack(raw[u], x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = op(x[i]);
    out.store(tile.row, group * kWidth, x);
  }
  const int64_t tail = row_groups * kWidth + threadIdx.x;  // past the last whole vector
  if (index == 0 && extent.rows == 1 && tail < extent.cols) {
    out.store_one(0, tail, op(in.load_one(0, tail)));
  }
}

template <typename Op, typename Out, typename In>
__global__ void __launch_bounds__(kMapThreads) map_kernel(Op op, Out out, In in, Extent extent) {
  if (op.start()) map_tile(op, out, in, extent, blockIdx.x);
}

template <typename Op, typename Out, typename In>
void launch_map(const char* name, cudaStream_t stream, Op op, Out out, In in, const Extent& extent) {
  const int64_t blocks = std::max<int64_t>(1, extent.tiles(Out::kWidth, kMapTile));
  launch(name, map_kernel<Op, Out, In>,
         {.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(kMapThreads), .stream = stream}, op, out, in,
         extent);
}

// out = op(in), of one dtype; out may be in
template <typename Op>
void map(const char* name, cudaStream_t stream, Op op, const Tensor& out, const Tensor& in) {
  const Extent extent = common_extent(out, in);
  if (extent.rows == 0) return;
  dispatch(out.dtype, [&]<typename T>() {
    constexpr int kWidth = kVectorWidth<T>;
    launch_map(name, stream, op, vector_view<T, kWidth>(out), vector_view<T, kWidth>(in), extent);
  });
}

// x = op(), without reading x
template <typename Op>
void map_constant(const char* name, cudaStream_t stream, Op op, const Tensor& x) {
  const Extent extent = common_extent(x);
  if (extent.rows == 0) return;
  dispatch(x.dtype,
           [&]<typename T>() { launch_map(name, stream, op, vector_view<T, kVectorWidth<T>>(x), NoView{}, extent); });
}
