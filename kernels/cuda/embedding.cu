// embedding.cu: token plus position embedding, forward and backward.
// Memory-bound. Forward: a row of wte for each token (a whole row of it is contiguous, so the gather costs nothing),
// the rows of wpe from the cache, one write; a thread owns an octet of columns of two tokens. Backward has no atomics:
// the positions of a batch come grouped by token id, and who adds what in which order depends on the lengths of the
// groups alone. dout is read twice, once along the groups and once along the batch; of dwte only the rows of tokens
// that occur are read and written (without `accumulate` all are written).
#include <algorithm>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/map.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/operands.h"

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostElements = int64_t{1} << 31;  // threads count theirs in 32 bits: divisions are cheap
constexpr int kTokensAtOnce = 2;                     // forward
constexpr int kWarps = 16;                           // backward of wte
constexpr int kPositionsAtOnce = 4;
constexpr int kTile = kWarp * kOctet;  // columns of a block
constexpr int kLongGroup = 32;         // positions that one warp adds up alone, at most

// ---- forward

// A thread: an octet of columns of tokens i and i + `half`.
template <typename Out, typename Weight>
__global__ void __launch_bounds__(kThreads)
    embedding_forward_kernel(VectorView<Out, kOctet> out, const int32_t* tokens, VectorView<Weight, kOctet> wte,
                             VectorView<Weight, kOctet> wpe, uint32_t count, uint32_t half, uint32_t sequence,
                             uint32_t channels) {
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x, octets = channels / kOctet;
  const uint32_t first = at / octets;
  if (first >= half) return;
  const int64_t column = static_cast<int64_t>(at % octets) * kOctet;
  int32_t ids[kTokensAtOnce];
#pragma unroll
  for (int u = 0; u < kTokensAtOnce; ++u) ids[u] = first + u * half < count ? tokens[first + u * half] : 0;
  Vector<Weight, kOctet> token[kTokensAtOnce], position[kTokensAtOnce];
#pragma unroll
  for (int u = 0; u < kTokensAtOnce; ++u) {
    token[u] = wte.load_again(ids[u], column);
    position[u] = wpe.load_again((first + u * half) % sequence, column);
  }
#pragma unroll
  for (int u = 0; u < kTokensAtOnce; ++u) {
    if (first + u * half >= count) continue;
    float x[kOctet], y[kOctet];
    unpack(token[u], x);
    unpack(position[u], y);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] += y[i];
    out.store(first + u * half, column, x);
  }
}

// ---- backward

// sums += the rows first, first + step, ... before `end`: of dout, or of the list of its rows that is given.
template <typename T>
__device__ inline void add_rows(float (&sums)[kOctet], VectorView<T, kOctet> dout, const int32_t* list, int64_t first,
                                int64_t end, int64_t step, int64_t column) {
  for (; first < end; first += step * kPositionsAtOnce) {
    int64_t rows[kPositionsAtOnce];
    Vector<T, kOctet> raw[kPositionsAtOnce];
#pragma unroll
    for (int u = 0; u < kPositionsAtOnce; ++u) {
      const int64_t at = first + u * step;
      rows[u] = list == nullptr || at >= end ? at : list[at];
    }
#pragma unroll
    for (int u = 0; u < kPositionsAtOnce; ++u) {
      if (first + u * step < end) raw[u] = dout.load_again(rows[u], column);
    }
#pragma unroll
    for (int u = 0; u < kPositionsAtOnce; ++u) {
      if (first + u * step >= end) continue;
      float values[kOctet];
      unpack(raw[u], values);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) sums[i] += values[i];
    }
  }
}

// row[column ..] = or += sums
__device__ inline void finish_row(const AnyView& out, int64_t row, int64_t column, float (&sums)[kOctet],
                                  bool accumulate) {
  if (accumulate) {
    float old[kOctet];
    out.load_octet(row, column, old);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) sums[i] += old[i];
  }
  out.store_octet(row, column, sums);
}

struct Groups {
  const int32_t *ids, *starts, *positions;
  int64_t count;
  int64_t first_row, rows;  // of the table that dwte is

  __device__ int64_t row_of(int64_t group) const { return ids[group] - first_row; }
  __device__ bool has_row(int64_t group) const { return row_of(group) >= 0 && row_of(group) < rows; }
};

// Block (x, y): groups x, x + gridDim.x, ... one to a warp, columns from y * kTile on. A warp adds up a short
// group alone; then the block takes the long ones one after another, every warp each 16th position, and adds the warps'
// sums in order. Neighbouring ids, which tend to be frequent together, are in different blocks.
template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp)
    token_gradient_kernel(AnyView dwte, VectorView<T, kOctet> dout, Groups groups, int64_t channels, bool accumulate) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kTile + lane * kOctet;
  const auto group_of = [&](int w) { return static_cast<int64_t>(blockIdx.x) + w * static_cast<int64_t>(gridDim.x); };
  const auto exists = [&](int64_t group) { return group < groups.count && groups.ids[group] >= 0; };

  if (const int64_t group = group_of(warp); exists(group) && groups.has_row(group) && column < channels) {
    const int32_t begin = groups.starts[group], end = groups.starts[group + 1];
    if (end - begin <= kLongGroup) {
      float sums[kOctet] = {};
      add_rows(sums, dout, groups.positions, begin, end, 1, column);
      finish_row(dwte, groups.row_of(group), column, sums, accumulate);
    }
  }
  float* const shared = shared_memory<float>();  // [kWarps, kTile]
  for (int w = 0; w < kWarps; ++w) {
    const int64_t group = group_of(w);
    if (!exists(group)) return;  // the same for all threads; ids past the last group are all -1
    const int32_t begin = groups.starts[group], end = groups.starts[group + 1];
    if (end - begin <= kLongGroup || !groups.has_row(group)) continue;
    float sums[kOctet] = {};
    if (column < channels) add_rows(sums, dout, groups.positions, begin + warp, end, kWarps, column);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) shared[warp * kTile + i * kWarp + lane] = sums[i];
    __syncthreads();
    if (warp == 0 && column < channels) {
      for (int other = 1; other < kWarps; ++other) {
#pragma unroll
        for (int i = 0; i < kOctet; ++i) sums[i] += shared[other * kTile + i * kWarp + lane];
      }
      finish_row(dwte, groups.row_of(group), column, sums, accumulate);
    }
    __syncthreads();
  }
}

// A thread: an octet of columns of one position. dwpe[t] (+)= sum over b of dout[b, t].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    position_gradient_kernel(AnyView dwpe, VectorView<T, kOctet> dout, uint32_t batch, uint32_t sequence,
                             uint32_t positions, uint32_t channels, bool accumulate) {
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x, octets = channels / kOctet;
  const uint32_t t = at / octets;
  const int64_t column = static_cast<int64_t>(at % octets) * kOctet;
  if (t >= positions) return;
  float sums[kOctet] = {};
  if (t < sequence) add_rows(sums, dout, nullptr, t, static_cast<int64_t>(batch) * sequence, sequence, column);
  finish_row(dwpe, t, column, sums, accumulate);
}

unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace

void CudaBackend::embedding_forward(Tensor out, Tensor tokens, Tensor wte, Tensor wpe) {
  check_embedding_forward(out, tokens, wte, wpe);
  const int64_t sequence = tokens.shape[1], channels = wte.cols(), count = tokens.elements();
  require(out.elements() < kMostElements, "embedding: too many elements");
  const Timed timed(*this, "embedding_forward", 0, 2.0 * static_cast<double>(out.bytes()));
  if (count == 0) return;
  const int64_t half = (count + kTokensAtOnce - 1) / kTokensAtOnce;
  require_octet_rows(out, wte, wpe);
  dispatch(out.dtype, wte.dtype, [&]<typename Out, typename Weight>() {
    launch("embedding_forward", embedding_forward_kernel<Out, Weight>,
           {.grid = dim3(blocks_for(half * (channels / kOctet), kThreads)), .block = dim3(kThreads), .stream = stream_},
           vector_view<Out, kOctet>(out), tokens.as<const int32_t>(), vector_view<Weight, kOctet>(wte),
           vector_view<Weight, kOctet>(wpe), static_cast<uint32_t>(count), static_cast<uint32_t>(half),
           static_cast<uint32_t>(sequence), static_cast<uint32_t>(channels));
  });
}

void CudaBackend::embedding_backward(Tensor dwte, bool accumulate_wte, Tensor dwpe, bool accumulate_wpe, Tensor dout,
                                     const TokenGroups& groups, int64_t first_row) {
  check_embedding_backward(dwte, dwpe, dout, groups, first_row);
  const int64_t batch = dout.shape[0], sequence = dout.shape[1], channels = dout.cols(), count = batch * sequence;
  require(std::max(dout.elements(), dwpe.elements()) < kMostElements, "embedding: too many elements");
  const Timed timed(*this, "embedding_backward", 0, embedding_backward_bytes(dwte, accumulate_wte, dwpe, dout));
  if (dwte) {
    if (!accumulate_wte) map_constant("embedding_backward: zero", stream_, Constant{0.0f}, dwte);
    const Groups lists = {groups.ids.as<const int32_t>(),
                          groups.starts.as<const int32_t>(),
                          groups.positions.as<const int32_t>(),
                          count,
                          first_row,
                          dwte.rows()};
    require_octet_rows(dout, dwte);
    dispatch(dout.dtype, [&]<typename T>() {
      launch("embedding_backward: tokens", token_gradient_kernel<T>,
             {.grid = dim3(blocks_for(count, kWarps), blocks_for(channels, kTile)),
              .block = dim3(kWarps * kWarp),
              .shared_bytes = kWarps * kTile * sizeof(float),
              .stream = stream_},
             any_view(dwte), vector_view<T, kOctet>(dout), lists, channels, accumulate_wte);
    });
  }
  if (!dwpe) return;
  const int64_t positions = accumulate_wpe ? sequence : dwpe.rows();
  require_octet_rows(dout, dwpe);
  dispatch(dout.dtype, [&]<typename T>() {
    launch("embedding_backward: positions", position_gradient_kernel<T>,
           {.grid = dim3(blocks_for(positions * (channels / kOctet), kThreads)),
            .block = dim3(kThreads),
            .stream = stream_},
           any_view(dwpe), vector_view<T, kOctet>(dout), static_cast<uint32_t>(batch), static_cast<uint32_t>(sequence),
           static_cast<uint32_t>(positions), static_cast<uint32_t>(channels), accumulate_wpe);
  });
}
