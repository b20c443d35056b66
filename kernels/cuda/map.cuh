// map.cuh: out = op(a, b), element by element: the one kernel behind the elementwise operations.
// Memory-bound: one read of each operand, one write. A thread has kUnroll vectors of each operand on their way before
// it computes anything, at most 16 loads of 16 bytes, so that a quarter of an SM's threads keep the memory busy.
#pragma once

#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/views.cuh"

inline constexpr int kMapThreads = 256, kMapUnroll = 4, kMapTile = kMapThreads * kMapUnroll;

struct Constant {
  float value;
  __device__ bool start() { return true; }
  __device__ float operator()(float, float) const { return value; }
};

// op.start(): once per thread, reads what the operation takes from device memory; false when there is nothing to do.
// op(x, y): the new element from those of a and b (0 for an operand that is missing).
template <typename Op, typename Out, typename A, typename B>
__device__ inline void map_tile(Op op, Out out, A a, B b, const Extent& extent, int64_t index) {
  constexpr int kWidth = Out::kWidth;
  const int64_t row_groups = extent.cols / kWidth;
  const Tile tile = tile_of<kWidth, kMapTile>(extent, index);
  const int64_t first = tile.first + threadIdx.x;
  typename A::Raw as[kMapUnroll];
  typename B::Raw bs[kMapUnroll];
#pragma unroll
  for (int u = 0; u < kMapUnroll; ++u) {
    const int64_t group = first + u * kMapThreads;
    if (group >= row_groups) continue;
    as[u] = a.load(tile.row, group * kWidth);
    bs[u] = b.load(tile.row, group * kWidth);
  }
#pragma unroll
  for (int u = 0; u < kMapUnroll; ++u) {
    const int64_t group = first + u * kMapThreads;
    if (group >= row_groups) continue;
    float x[kWidth], y[kWidth];
    A::unpack(as[u], x);
    B::unpack(bs[u], y);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = op(x[i], y[i]);
    out.store(tile.row, group * kWidth, x);
  }
  const int64_t tail = row_groups * kWidth + threadIdx.x;  // past the last whole vector
  if (index == 0 && extent.rows == 1 && tail < extent.cols) {
    out.store_one(0, tail, op(a.load_one(0, tail), b.load_one(0, tail)));
  }
}

template <typename Op, typename Out, typename A, typename B>
__global__ void __launch_bounds__(kMapThreads) map_kernel(Op op, Out out, A a, B b, Extent extent) {
  if (op.start()) map_tile(op, out, a, b, extent, blockIdx.x);
}

template <typename Op, typename Out, typename A, typename B>
void launch_map(const char* name, cudaStream_t stream, Op op, Out out, A a, B b, const Extent& extent) {
  const int64_t blocks = std::max<int64_t>(1, extent.tiles(Out::kWidth, kMapTile));
  launch(name, map_kernel<Op, Out, A, B>,
         {.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(kMapThreads), .stream = stream}, op, out, a, b,
         extent);
}

// out = op(a, b), all of one dtype
template <typename Op>
void map(const char* name, cudaStream_t stream, Op op, const Tensor& out, const Tensor& a, const Tensor& b) {
  const Extent extent = common_extent(out, a, b);
  if (extent.rows == 0) return;
  dispatch(out.dtype, [&]<typename T>() {
    constexpr int kWidth = kVectorWidth<T>;
    launch_map(name, stream, op, vector_view<T, kWidth>(out), vector_view<T, kWidth>(a), vector_view<T, kWidth>(b),
               extent);
  });
}

// out = op(a), of one dtype; out may be a
template <typename Op>
void map(const char* name, cudaStream_t stream, Op op, const Tensor& out, const Tensor& a) {
  const Extent extent = common_extent(out, a);
  if (extent.rows == 0) return;
  dispatch(out.dtype, [&]<typename T>() {
    constexpr int kWidth = kVectorWidth<T>;
    launch_map(name, stream, op, vector_view<T, kWidth>(out), vector_view<T, kWidth>(a), NoView{}, extent);
  });
}

// x = op(), without reading x
template <typename Op>
void map_constant(const char* name, cudaStream_t stream, Op op, const Tensor& x) {
  const Extent extent = common_extent(x);
  if (extent.rows == 0) return;
  dispatch(x.dtype, [&]<typename T>() {
    launch_map(name, stream, op, vector_view<T, kVectorWidth<T>>(x), NoView{}, NoView{}, extent);
  });
}
