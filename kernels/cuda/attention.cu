// attention.cu: causal self-attention, forward and backward: which kernels, with which tiles. Compute-bound:
// 4 HD operations forward and 10 HD backward for each visible pair of a query and a key.
//
// Two families of kernels, chosen by dtype, head dimension and architecture: the tensor-core ones for bf16
// (attention_forward.cuh, attention_backward.cuh) and the plain ones for everything else (attention_plain.cuh). All
// store only the output and the log-sum-exp of each row, and compute probabilities again in the backward pass. That is
// three kernels: delta = dO . out of each row; dQ, by blocks that own queries; dK and dV, by blocks that own keys. No
// number has two writers, so there are no atomics and no order that depends on scheduling; the price is that scores and
// dP are computed twice, 7 matrix products instead of 5. On the tensor cores each block leaves the sums of its columns,
// and a fourth kernel adds them in order: the gradient of the projection's bias, for which nothing is read again. The
// plain kernels have no registers left for that, and take so long that a pass over their result is nothing.
#include <algorithm>
#include <bit>
#include <cmath>
#include <initializer_list>

#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/attention_decode.cuh"
#include "kernels/cuda/attention_forward.cuh"
#include "kernels/cuda/attention_plain.cuh"
#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda_workspace.h"
#include "kernels/dispatch.h"
#include "kernels/operands.h"

namespace {

constexpr int kDeltaThreads = 256, kDeltaLanes = 8;

// delta[b,h,t] = dout[b,t,h,:] . out[b,t,h,:]. Memory-bound: two reads. Eight lanes have one head of one token; with
// kOctets (both bf16, heads of whole octets) they read 16 bytes each at a time.
template <bool kOctets>
__global__ void attention_delta_kernel(float* delta, AnyView dout, AnyView out, AttentionSizes sizes,
                                       int64_t token_heads) {
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kDeltaThreads / kDeltaLanes) + threadIdx.x / kDeltaLanes;
  float sum = 0;
  if (i < token_heads) {
    const int64_t first = i * sizes.head_dim;  // [B,T,NH,HD]
    if constexpr (kOctets) {
      for (int j = lane * kOctet; j < sizes.head_dim; j += kDeltaLanes * kOctet) {
        float a[kOctet], b[kOctet];
        unpack(load_vector<kOctet>(static_cast<const bf16*>(dout.data) + first + j), a);
        unpack(load_vector<kOctet>(static_cast<const bf16*>(out.data) + first + j), b);
#pragma unroll
        for (int k = 0; k < kOctet; ++k) sum = fmaf(a[k], b[k], sum);
      }
    } else {
      for (int j = lane; j < sizes.head_dim; j += kDeltaLanes) {
        sum = fmaf(dout.load_one(0, first + j), out.load_one(0, first + j), sum);
      }
    }
  }
#pragma unroll
  for (int offset = kDeltaLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (lane == 0 && i < token_heads) {
    const int64_t token = i / sizes.heads, head = i % sizes.heads, batch = token / sizes.sequence;
    delta[(batch * sizes.heads + head) * sizes.sequence + token % sizes.sequence] = sum;
  }
}

// What 32-bit positions inside the kernels, and the tiles of the plain ones, allow.
void check_limits(const AttentionShape& s) {
  require(s.head_dim <= kMostHeadChannels, "attention: heads are too wide");
  require(s.batch * s.sequence < (1 << 30) && s.channels < (1 << 29), "attention: too many tokens or channels");
}

AttentionSizes sizes_of(const AttentionShape& s, size_t element_bytes) {
  constexpr int64_t kCacheBytes = 16 << 20;  // a third of an H100's L2, half of an A100's partition
  const int64_t head_bytes = 2 * s.sequence * s.head_dim * static_cast<int64_t>(element_bytes);
  const int64_t total = s.batch * s.heads;
  return {.channels = static_cast<int>(s.channels),
          .sequence = static_cast<int>(s.sequence),
          .heads = static_cast<int>(s.heads),
          .head_dim = static_cast<int>(s.head_dim),
          .total_heads = static_cast<int>(total),
          .heads_together = static_cast<int>(std::clamp<int64_t>(kCacheBytes / head_bytes, 1, total)),
          .scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim))};
}

dim3 one_block_per_tile(const AttentionSizes& sizes, int tile_rows) {
  const int64_t blocks =
      static_cast<int64_t>(attention_tiles(sizes.sequence, tile_rows)) * static_cast<int64_t>(sizes.total_heads);
  require(blocks < (int64_t{1} << 31), "attention: batch * heads * sequence is too large");
  return {static_cast<unsigned>(blocks), 1, 1};
}

// How a tensor-core kernel is launched whose blocks own `rows` rows of a head each.
template <typename Tiles>
LaunchShape mma_shape(const AttentionSizes& sizes, int rows, cudaStream_t stream) {
  return {.grid = one_block_per_tile(sizes, rows),
          .block = Tiles::kWarps * kWarp,
          .shared_bytes = Tiles::kSharedBytes,
          .stream = stream};
}

bool all_bf16(std::initializer_list<Tensor> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.dtype == DType::kBF16; });
}

// Whether the tensor-core kernels have tiles for a head. Kernels for a newer architecture (wgmma and TMA on sm_90)
// would be another family beside them.
bool has_mma_tiles(int head_dim) { return head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128; }

// Calls f.template operator()<N>() with the head dimension, one of those that the tensor-core kernels have tiles for.
template <typename F>
void dispatch_mma(int head_dim, F&& f) {
  switch (head_dim) {
    case 64: f.template operator()<64>(); return;
    case 80: f.template operator()<80>(); return;
    case 96: f.template operator()<96>(); return;
    case 128: f.template operator()<128>(); return;
    default: throw std::logic_error("attention: no tiles for this head dimension");
  }
}

// Calls run.template operator()<Tiles>() with the usual tiles of a head dimension, or with small ones where there are
// any and a multiprocessor has no room for two blocks of the usual ones: alone a block leaves one warp to each of its
// four schedulers, which has nothing to do while that one waits.
template <int kHeadDim, typename Usual, typename Small, typename Run>
void run_with_tiles(size_t multiprocessor_bytes, Run&& run) {
  constexpr size_t kReserved = 1 << 10;  // of a block, by the system
  if constexpr (kHeadDim == Small::kHeadDim) {
    if (2 * (Usual::kSharedBytes + kReserved) > multiprocessor_bytes) return run.template operator()<Small>();
  }
  run.template operator()<Usual>();
}

// The same with the head dimension rounded up to what the plain kernels are compiled for.
template <typename F>
void dispatch_plain(int head_dim, F&& f) {
  if (head_dim <= 64) return f.template operator()<64>();
  if (head_dim <= 128) return f.template operator()<128>();
  return f.template operator()<kMostHeadChannels>();
}

}  // namespace

void CudaBackend::attention_forward(Tensor out, Tensor lse, Tensor qkv, int heads) {
  const AttentionShape s = check_attention_forward(out, lse, qkv, heads);
  check_limits(s);
  const Timed timed(*this, "attention_forward", 2 * s.score_flops(), static_cast<double>(qkv.bytes() + out.bytes()));
  if (s.token_heads() == 0) return;
  require_octet_rows(out, qkv);
  const AttentionSizes sizes = sizes_of(s, dtype_size(qkv.dtype));
  if (!plain_attention_forward_ && has_mma_tiles(sizes.head_dim) && all_bf16({out, qkv})) {
    const auto run = [&]<typename Tiles>() {
      launch("attention_forward", attention_forward_mma_kernel<Tiles>,
             mma_shape<Tiles>(sizes, Tiles::kQueries, stream_), out.as<bf16>(), lse.as<float>(), qkv.as<const bf16>(),
             sizes);
    };
    dispatch_mma(sizes.head_dim, [&]<int kHeadDim>() {
      run_with_tiles<kHeadDim, ForwardTiles<kHeadDim>, SmallForwardTiles>(multiprocessor_shared_bytes_, run);
    });
    return;
  }
  dispatch_plain(sizes.head_dim, [&]<int kDim>() {
    launch("attention_forward", attention_forward_plain_kernel<kDim>,
           {.grid = one_block_per_tile(sizes, PlainTiles<kDim>::kForward),
            .block = kPlainThreads,
            .shared_bytes = PlainTiles<kDim>::kForwardBytes,
            .stream = stream_},
           any_view(out), lse.as<float>(), any_view(qkv), sizes);
  });
}

void CudaBackend::attention_decode(Tensor out, Tensor qkv, int heads) {
  const AttentionShape s = check_attention_decode(out, qkv, heads);
  check_limits(s);
  static_assert(kMostHeadChannels <= kMostDecodeChannels);
  const Timed timed(*this, "attention_decode", 2 * s.last_query_flops(), last_query_bytes(out, qkv));
  require_octet_rows(out, qkv);
  const AttentionSizes sizes = sizes_of(s, dtype_size(qkv.dtype));
  const int lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(sizes.head_dim)));
  dispatch(qkv.dtype, [&]<typename T>() {
    const bool octets = sizes.head_dim % kOctet == 0;
    launch("attention_decode", octets ? attention_decode_kernel<T, true> : attention_decode_kernel<T, false>,
           {.grid = static_cast<unsigned>(sizes.heads),
            .block = kDecodeThreads,
            .shared_bytes = kDecodeBytes,
            .stream = stream_},
           any_view(out), qkv.as<const T>(), sizes, lanes);
  });
}

void CudaBackend::attention_backward(Tensor dqkv, Tensor dbias, Tensor dout, Tensor out, Tensor lse, Tensor qkv,
                                     int heads, bool accumulate) {
  const AttentionShape s = check_attention_backward(dqkv, dbias, dout, out, lse, qkv, heads);
  check_limits(s);
  if (s.token_heads() > 0) {
    const Timed timed(*this, "attention_backward", 5 * s.score_flops(),
                      static_cast<double>(qkv.bytes() + dqkv.bytes() + out.bytes() + dout.bytes()));
    require_octet_rows(dqkv, dout, out, qkv);
    const AttentionSizes sizes = sizes_of(s, dtype_size(qkv.dtype));
    const int64_t sum_floats = tile_sum_floats(s.batch, s.sequence, s.channels);
    float* const tile_sums = scratch<float>(static_cast<size_t>(sum_floats + s.token_heads()) * sizeof(float));
    float* const delta = tile_sums + sum_floats;

    const int64_t delta_blocks = (s.token_heads() * kDeltaLanes + kDeltaThreads - 1) / kDeltaThreads;
    const bool octets = sizes.head_dim % kOctet == 0 && all_bf16({dout, out});
    launch("attention_delta", octets ? attention_delta_kernel<true> : attention_delta_kernel<false>,
           {.grid = static_cast<unsigned>(delta_blocks), .block = kDeltaThreads, .stream = stream_}, delta,
           any_view(dout), any_view(out), sizes, s.token_heads());

    if (!plain_attention_backward_ && has_mma_tiles(sizes.head_dim) && all_bf16({dqkv, dout, qkv})) {
      int64_t query_tiles = 0, key_tiles = 0;  // of all sequences
      const auto run_queries = [&]<typename Tiles>() {
        static_assert(Tiles::kQueries >= kGradientTileRows);
        query_tiles = s.batch * attention_tiles(sizes.sequence, Tiles::kQueries);
        launch("attention_backward_queries", attention_backward_queries_mma_kernel<Tiles>,
               mma_shape<Tiles>(sizes, Tiles::kQueries, stream_), dqkv.as<bf16>(), tile_sums, dout.as<const bf16>(),
               lse.as<const float>(), delta, qkv.as<const bf16>(), sizes);
      };
      const auto run_keys = [&]<typename Tiles>() {
        static_assert(Tiles::kKeys >= kGradientTileRows);
        key_tiles = s.batch * attention_tiles(sizes.sequence, Tiles::kKeys);
        launch("attention_backward_keys", attention_backward_keys_mma_kernel<Tiles>,
               mma_shape<Tiles>(sizes, Tiles::kKeys, stream_), dqkv.as<bf16>(), tile_sums, dout.as<const bf16>(),
               lse.as<const float>(), delta, qkv.as<const bf16>(), sizes);
      };
      dispatch_mma(sizes.head_dim, [&]<int kHeadDim>() {
        const size_t room = multiprocessor_shared_bytes_;
        run_with_tiles<kHeadDim, QueryGradientTiles<kHeadDim>, SmallQueryGradientTiles>(room, run_queries);
        run_with_tiles<kHeadDim, KeyGradientTiles<kHeadDim>, SmallKeyGradientTiles>(room, run_keys);
      });
      const Tensor bias = dbias.view({3 * s.channels});
      add_column_partials("column_partials", stream_, {bias.slice(0, s.channels), query_tiles},
                          {bias.slice(s.channels, 2 * s.channels), key_tiles}, tile_sums, accumulate);
      return;
    }
    dispatch_plain(sizes.head_dim, [&]<int kDim>() {
      const LaunchShape shape = {.grid = one_block_per_tile(sizes, PlainTiles<kDim>::kBackward),
                                 .block = kPlainThreads,
                                 .shared_bytes = PlainTiles<kDim>::kBackwardBytes,
                                 .stream = stream_};
      launch("attention_backward_queries", attention_backward_plain_kernel<kDim, false>, shape, any_view(dqkv),
             any_view(dout), lse.as<const float>(), delta, any_view(qkv), sizes);
      launch("attention_backward_keys", attention_backward_plain_kernel<kDim, true>, shape, any_view(dqkv),
             any_view(dout), lse.as<const float>(), delta, any_view(qkv), sizes);
    });
  }
  bias_backward(dbias, dqkv.view({s.batch * s.sequence, 3 * s.channels}), accumulate);
}
