// embedding.cu: token plus position embedding, forward and backward.
// Memory-bound. Forward: a row of wte for each token (a whole row of it is contiguous, so the gather costs nothing),
// the rows of wpe from the cache, one write; a thread owns eight columns of two tokens. Backward has no atomics: the
// positions of a batch come grouped by token id, and who adds what in which order depends on the lengths of the groups
// alone. dout is read twice, once along the groups and once along the batch; of dwte only the rows of tokens that occur
// are read and written (without `accumulate` all are written).
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
constexpr int kLongGroup = 32;  // positions that one warp adds up alone, at most

// ---- forward

// A thread: kWidth columns of tokens i and i + `half`.
template <typename Out, typename Wte, typename Wpe>
__global__ void __launch_bounds__(kThreads)
    embedding_forward_kernel(Out out, const int32_t* tokens, Wte wte, Wpe wpe, uint32_t count, uint32_t half,
                             uint32_t sequence, uint32_t channels) {
  constexpr int kWidth = Out::kWidth;
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x, groups = channels / kWidth;
  const uint32_t first = at / groups;
  if (first >= half) return;
  const int64_t column = static_cast<int64_t>(at % groups) * kWidth;
  int32_t ids[kTokensAtOnce];
#pragma unroll
  for (int u = 0; u < kTokensAtOnce; ++u) ids[u] = first + u * half < count ? tokens[first + u * half] : 0;
  typename Wte::Raw token[kTokensAtOnce];
  typename Wpe::Raw position[kTokensAtOnce];
#pragma unroll
  for (int u = 0; u < kTokensAtOnce; ++u) {
    token[u] = wte.load_again(ids[u], column);
    position[u] = wpe.load_again((first + u * half) % sequence, column);
  }
#pragma unroll
  for (int u = 0; u < kTokensAtOnce; ++u) {
    if (first + u * half >= count) continue;
    float x[kWidth], y[kWidth];
    Wte::unpack(token[u], x);
    Wpe::unpack(position[u], y);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] += y[i];
    out.store(first + u * half, column, x);
  }
}

// ---- backward

// sums += the rows first, first + step, ... before `end`: of dout, or of the list of its rows that is given.
template <typename View>
__device__ inline void add_rows(float (&sums)[View::kWidth], View dout, const int32_t* list, int64_t first, int64_t end,
                                int64_t step, int64_t column) {
  for (; first < end; first += step * kPositionsAtOnce) {
    int64_t rows[kPositionsAtOnce];
    typename View::Raw raw[kPositionsAtOnce];
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
      float values[View::kWidth];
      View::unpack(raw[u], values);
#pragma unroll
      for (int i = 0; i < View::kWidth; ++i) sums[i] += values[i];
    }
  }
}

// row[column ..] = or += sums
template <int kWidth>
__device__ inline void finish_row(const AnyView& out, int64_t row, int64_t column, float (&sums)[kWidth],
                                  bool accumulate) {
  if constexpr (kWidth == kOctet) {
    if (accumulate) {
      float old[kOctet];
      load_octet(out, row, column, old);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) sums[i] += old[i];
    }
    store_octet(out, row, column, sums);
  } else {
    for (int i = 0; i < kWidth; ++i) {
      const float old = accumulate ? out.load_one(row, column + i) : 0.0f;
      out.store_one(row, column + i, sums[i] + old);
    }
  }
}

struct Groups {
  const int32_t *ids, *starts, *positions;
  int64_t count;
  int64_t first_row, rows;  // of the table that dwte is

  __device__ int64_t row_of(int64_t group) const { return ids[group] - first_row; }
  __device__ bool has_row(int64_t group) const { return row_of(group) >= 0 && row_of(group) < rows; }
};

// Block (x, y): groups x, x + gridDim.x, ... one to a warp, columns from y * 32 * kWidth on. A warp adds up a short
// group alone; then the block takes the long ones one after another, every warp each 16th position, and adds the warps'
// sums in order. Neighbouring ids, which tend to be frequent together, are in different blocks.
template <typename View>
__global__ void __launch_bounds__(kWarps* kWarp)
    token_gradient_kernel(AnyView dwte, View dout, Groups groups, int64_t channels, bool accumulate) {
  constexpr int kWidth = View::kWidth, kTile = kWarp * kWidth;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kTile + lane * kWidth;
  const auto group_of = [&](int w) { return static_cast<int64_t>(blockIdx.x) + w * static_cast<int64_t>(gridDim.x); };
  const auto exists = [&](int64_t group) { return group < groups.count && groups.ids[group] >= 0; };

  if (const int64_t group = group_of(warp); exists(group) && groups.has_row(group) && column < channels) {
    const int32_t begin = groups.starts[group], end = groups.starts[group + 1];
    if (end - begin <= kLongGroup) {
      float sums[kWidth] = {};
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
    float sums[kWidth] = {};
    if (column < channels) add_rows(sums, dout, groups.positions, begin + warp, end, kWarps, column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) shared[warp * kTile + i * kWarp + lane] = sums[i];
    __syncthreads();
    if (warp == 0 && column < channels) {
      for (int other = 1; other < kWarps; ++other) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sums[i] += shared[other * kTile + i * kWarp + lane];
      }
      finish_row(dwte, groups.row_of(group), column, sums, accumulate);
    }
    __syncthreads();
  }
}

// A thread: kWidth columns of one position. dwpe[t] (+)= sum over b of dout[b, t].
template <typename View>
__global__ void __launch_bounds__(kThreads)
    position_gradient_kernel(AnyView dwpe, View dout, uint32_t batch, uint32_t sequence, uint32_t positions,
                             uint32_t channels, bool accumulate) {
  constexpr int kWidth = View::kWidth;
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x, groups = channels / kWidth;
  const uint32_t t = at / groups;
  const int64_t column = static_cast<int64_t>(at % groups) * kWidth;
  if (t >= positions) return;
  float sums[kWidth] = {};
  if (t < sequence) add_rows(sums, dout, nullptr, t, static_cast<int64_t>(batch) * sequence, sequence, column);
  finish_row(dwpe, t, column, sums, accumulate);
}

struct Zero {
  __device__ bool start() { return true; }
  __device__ float operator()(float, float) const { return 0.0f; }
};

unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// f(view of t): as vectors of eight when `vectors`, else as numbers.
template <typename F>
void with_view(const Tensor& t, bool vectors, F&& f) {
  if (!vectors) {
    f(any_view(t));
    return;
  }
  dispatch(t.dtype, [&]<typename T>() { f(vector_view<T, kOctet>(t)); });
}

}  // namespace

void CudaBackend::embedding_forward(Tensor out, Tensor tokens, Tensor wte, Tensor wpe) {
  check_embedding_forward(out, tokens, wte, wpe);
  const int64_t sequence = tokens.shape[1], channels = wte.cols(), count = tokens.elements();
  require(out.elements() < kMostElements, "embedding: too many elements");
  const Timed timed(*this, "embedding_forward", 0, 2.0 * static_cast<double>(out.bytes()));
  if (count == 0) return;
  const int64_t half = (count + kTokensAtOnce - 1) / kTokensAtOnce;
  const auto launch_forward = [&]<typename Out, typename Wte>(Out out_view, Wte wte_view, Wte wpe_view) {
    launch("embedding_forward", embedding_forward_kernel<Out, Wte, Wte>,
           {.grid = dim3(blocks_for(half * (channels / Out::kWidth), kThreads)),
            .block = dim3(kThreads),
            .stream = stream_},
           out_view, tokens.as<const int32_t>(), wte_view, wpe_view, static_cast<uint32_t>(count),
           static_cast<uint32_t>(half), static_cast<uint32_t>(sequence), static_cast<uint32_t>(channels));
  };
  if (wte.dtype != wpe.dtype || !has_octet_rows(out) || !has_octet_rows(wte) || !has_octet_rows(wpe)) {
    launch_forward(any_view(out), any_view(wte), any_view(wpe));
    return;
  }
  dispatch(out.dtype, wte.dtype, [&]<typename Out, typename Weight>() {
    launch_forward(vector_view<Out, kOctet>(out), vector_view<Weight, kOctet>(wte), vector_view<Weight, kOctet>(wpe));
  });
}

void CudaBackend::embedding_backward(Tensor dwte, bool accumulate_wte, Tensor dwpe, bool accumulate_wpe, Tensor dout,
                                     const TokenGroups& groups, int64_t first_row) {
  check_embedding_backward(dwte, dwpe, dout, groups, first_row);
  const int64_t batch = dout.shape[0], sequence = dout.shape[1], channels = dout.cols(), count = batch * sequence;
  require(std::max(dout.elements(), dwpe.elements()) < kMostElements, "embedding: too many elements");
  const Timed timed(*this, "embedding_backward", 0, embedding_backward_bytes(dwte, accumulate_wte, dwpe, dout));
  if (dwte) {
    if (!accumulate_wte) map_constant("embedding_backward: zero", stream_, Zero{}, dwte);
    const Groups lists = {groups.ids.as<const int32_t>(),
                          groups.starts.as<const int32_t>(),
                          groups.positions.as<const int32_t>(),
                          count,
                          first_row,
                          dwte.rows()};
    with_view(dout, has_octet_rows(dout) && has_octet_rows(dwte), [&]<typename View>(View view) {
      constexpr int kTile = kWarp * View::kWidth;
      launch("embedding_backward: tokens", token_gradient_kernel<View>,
             {.grid = dim3(blocks_for(count, kWarps), blocks_for(channels, kTile)),
              .block = dim3(kWarps * kWarp),
              .shared_bytes = kWarps * kTile * sizeof(float),
              .stream = stream_},
             any_view(dwte), view, lists, channels, accumulate_wte);
    });
  }
  if (!dwpe) return;
  const int64_t positions = accumulate_wpe ? sequence : dwpe.rows();
  with_view(dout, has_octet_rows(dout) && has_octet_rows(dwpe), [&]<typename View>(View view) {
    launch("embedding_backward: positions", position_gradient_kernel<View>,
           {.grid = dim3(blocks_for(positions * (channels / View::kWidth), kThreads)),
            .block = dim3(kThreads),
            .stream = stream_},
           any_view(dwpe), view, static_cast<uint32_t>(batch), static_cast<uint32_t>(sequence),
           static_cast<uint32_t>(positions), static_cast<uint32_t>(channels), accumulate_wpe);
  });
}
