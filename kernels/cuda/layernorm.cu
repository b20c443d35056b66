// layernorm.cu: LayerNorm over the channels of each token, forward and backward, of at most 16,384 channels.
// Memory-bound. Forward: one warp owns a row (a few warps one of more than 4,096 channels) and keeps it in registers
// between the statistics and the output, so each element is read once and written once (with a residual: two reads, two
// writes). Thread l of a row owns the octets (eight neighbouring channels) l, l + threads, ... and adds them in that
// order, then the threads are added: every forward kernel here sums in this one order, so that adding first or inside,
// and recomputing, give the same bits. Backward: reads dout, in and din and writes din. A block owns a chunk of rows
// and a thread an octet of columns (two or four above 8,192 channels), whose sums for dweight and dbias stay in its
// registers from the first row to the last; the two sums a row needs meet in shared memory, several rows at once, so
// that one barrier serves them all and their loads overlap.
#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda_workspace.h"
#include "kernels/operands.h"

namespace {

constexpr float kEpsilon = 1e-5f;
constexpr int kForwardWarps = 4;    // of a block: as many rows, or one wide row
constexpr int kMostOctets = 16;     // forward: of a thread
constexpr int kMostThreads = 1024;  // backward, with one octet each
// With more octets each, as many as there are registers for.
constexpr int kThreadsOfTwoOctets = 768, kThreadsOfFourOctets = 512;
constexpr int64_t kSmallestChunk = 16;

static_assert(kMostNormChannels == kForwardWarps * kWarp * kMostOctets * kOctet);
static_assert(kMostNormChannels == 4 * kThreadsOfFourOctets * kOctet);
static_assert(kChannelMultiple == kOctet);

// ---- forward

struct Forward {
  AnyView out, in, a, b;  // `in` is the residual when a is not empty: in = a + b
  float *mean, *rstd;
  AnyView weight, bias;
  int64_t rows, channels;
};

struct Statistics {
  float mean, rstd;
};

__device__ inline float reciprocal_deviation(float squares, int64_t channels) {
  return 1.0f / sqrtf(squares / static_cast<float>(channels) + kEpsilon);
}

__device__ inline float normalized(float value, const Statistics& s) { return (value - s.mean) * s.rstd; }

// in, a and b have type T. Of a row a thread has at most kOctets octets; kWide: a block owns one row, not a warp.
template <typename T, int kOctets, bool kResidual, bool kWide>
__global__ void __launch_bounds__(kForwardWarps* kWarp) layernorm_forward_kernel(Forward f) {
  const int threads = kWide ? kForwardWarps * kWarp : kWarp, lane = static_cast<int>(threadIdx.x) % threads;
  const int64_t row = kWide ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp;
  if (row >= f.rows) return;
  const auto column_of = [=](int i) { return (i * threads + lane) * kOctet; };
  const auto row_sum = [](float value) { return kWide ? block_sum(value, shared_memory<float>()) : warp_sum(value); };
  const int channels = static_cast<int>(f.channels);

  Vector<T, kOctet> x[kOctets];
  if constexpr (kResidual) {
    const T* const a = static_cast<const T*>(f.a.data) + row * f.a.pitch;
    const T* const b = static_cast<const T*>(f.b.data) + row * f.b.pitch;
    T* const residual = static_cast<T*>(f.in.data) + row * f.in.pitch;
    constexpr int kBatch = (kOctets > 12 ? 8 : 16) / sizeof(T);  // y is not kept as long as x
#pragma unroll
    for (int start = 0; start < kOctets; start += kBatch) {
      Vector<T, kOctet> y[kBatch];
#pragma unroll
      for (int i = start; i < start + kBatch && i < kOctets; ++i) {
        if (column_of(i) >= channels) continue;
        x[i] = load_vector_streaming<kOctet>(a + column_of(i));
        y[i - start] = load_vector_streaming<kOctet>(b + column_of(i));
      }
#pragma unroll
      for (int i = start; i < start + kBatch && i < kOctets; ++i) {
        if (column_of(i) >= channels) continue;
        float sums[kOctet], summands[kOctet];
        unpack(x[i], sums);
        unpack(y[i - start], summands);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) sums[j] += summands[j];
        pack(x[i], sums);  // rounded: the statistics are those of what is stored
        store_vector(residual + column_of(i), x[i]);
      }
    }
  } else {
    const T* const in = static_cast<const T*>(f.in.data) + row * f.in.pitch;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (column_of(i) < channels) x[i] = load_vector<kOctet>(in + column_of(i));
    }
  }

  const auto for_each_value = [&](auto&& visit) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (column_of(i) >= channels) continue;
      float values[kOctet];
      unpack(x[i], values);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) visit(values[j]);
    }
  };
  Statistics s;
  float sum = 0;
  for_each_value([&](float value) { sum += value; });
  s.mean = row_sum(sum) / static_cast<float>(channels);
  float squares = 0;
  for_each_value([&](float value) { squares = fmaf(value - s.mean, value - s.mean, squares); });
  s.rstd = reciprocal_deviation(row_sum(squares), f.channels);
  if (lane == 0) {
    f.mean[row] = s.mean;
    f.rstd[row] = s.rstd;
  }

#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    if (column_of(i) >= channels) continue;
    float values[kOctet], weight[kOctet], bias[kOctet];
    f.weight.load_octet(0, column_of(i), weight);
    f.bias.load_octet(0, column_of(i), bias);
    unpack(x[i], values);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) values[j] = fmaf(normalized(values[j], s), weight[j], bias[j]);
    f.out.store_octet(row, column_of(i), values);
  }
}

template <bool kResidual>
void launch_forward(const char* name, cudaStream_t stream, const Forward& f) {
  if (f.rows == 0) return;
  require(f.channels <= kMostNormChannels, "layernorm: too many channels");
  const int64_t octets = (f.channels + kWarp * kOctet - 1) / (kWarp * kOctet);  // of a lane, if a warp has the row
  const bool wide = octets > kMostOctets;
  const LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(wide ? f.rows : (f.rows + kForwardWarps - 1) / kForwardWarps)),
      .block = dim3(kForwardWarps * kWarp),
      .shared_bytes = wide ? kForwardWarps * sizeof(float) : 0,
      .stream = stream};
  dispatch(f.in.dtype, [&]<typename T>() {
    const auto run = [&]<int kOctets, bool kWide = false>() {
      launch(name, layernorm_forward_kernel<T, kOctets, kResidual, kWide>, shape, f);
    };
    if (wide) return run.template operator()<kMostOctets, true>();
    switch (octets) {
      case 1: return run.template operator()<1>();
      case 2: return run.template operator()<2>();
      case 3: return run.template operator()<3>();
      case 4: return run.template operator()<4>();
      case 5: return run.template operator()<5>();
      case 6: return run.template operator()<6>();
      case 7:
      case 8: return run.template operator()<8>();
      case 9:
      case 10: return run.template operator()<10>();
      case 11:
      case 12: return run.template operator()<12>();
      default: return run.template operator()<kMostOctets>();
    }
  });
}

// ---- backward

struct Backward {
  AnyView din, dout, in, weight;
  const float *mean, *rstd;
  float* partials;  // [chunks, 2, C]: dweight, dbias
  int64_t rows, channels, chunk;
};

// With n = (in - mean) rstd and g = dout weight:
// din += rstd (g - mean(g) - n mean(g n)), dweight += dout n, dbias += dout.
__device__ inline float add_input_gradient(float din, float n, float g, float rstd, float mean_g, float mean_gn) {
  return fmaf(rstd, fmaf(-n, mean_gn, g - mean_g), din);
}

// din, dout and in have type T. kOctets to a thread, kRows at once, kBlocks on a multiprocessor. Several octets a
// thread are too many to keep between the two passes over a row; they are read again, from a cache. So is the weight
// without kKeepWeight.
template <typename T, int kRows, int kThreads, int kBlocks, bool kKeepWeight, int kOctets>
__global__ void __launch_bounds__(kThreads, kBlocks) layernorm_backward_kernel(Backward p) {
  constexpr bool kKeep = kOctets == 1;
  constexpr int kSums = 2 * kRows;  // of a block's rows: of g, of g n, row by row
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int channels = static_cast<int>(p.channels);
  const auto column_of = [](int o) { return static_cast<int>(threadIdx.x + o * blockDim.x) * kOctet; };
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * p.chunk;
  const int rows = static_cast<int>(begin + p.chunk < p.rows ? p.chunk : p.rows - begin);
  const float per_channel = 1.0f / static_cast<float>(channels);
  // Where this thread's octet o of row r of those at hand is: from a position that moves on, or, where that takes too
  // many registers, from the beginning.
  constexpr bool kMoves = kKeepWeight;
  const T* dout_at = static_cast<const T*>(p.dout.data) + (kMoves ? begin * p.dout.pitch : 0) + column_of(0);
  const T* in_at = static_cast<const T*>(p.in.data) + (kMoves ? begin * p.in.pitch : 0) + column_of(0);
  T* din_at = static_cast<T*>(p.din.data) + (kMoves ? begin * p.din.pitch : 0) + column_of(0);
  int64_t row_at = kMoves ? 0 : begin;
  const auto place = [&](auto* at, int64_t pitch, int r, int o) {
    return at + (row_at + r) * pitch + o * static_cast<int>(blockDim.x) * kOctet;
  };
  const float *mean_at = p.mean + begin, *rstd_at = p.rstd + begin;
  const auto load = [&](int r, int o, auto& dout, auto& in, auto& din) {
    dout = load_vector_streaming<kOctet>(place(dout_at, p.dout.pitch, r, o));
    in = load_vector_streaming<kOctet>(place(in_at, p.in.pitch, r, o));
    din = load_vector<kOctet>(place(din_at, p.din.pitch, r, o));
  };

  float weight[kOctet] = {}, dweight[kOctets][kOctet] = {}, dbias[kOctets][kOctet] = {};
  if (kKeepWeight && column_of(0) < channels) p.weight.load_octet(0, column_of(0), weight);
  float* shared = shared_memory<float>();  // two halves, used in turn: [warps, kSums]
  float* other = shared + warps * kSums;

  for (int first = 0; first < rows; first += kRows) {
    Vector<T, kOctet> dout[kRows][kOctets], in[kRows][kOctets], din[kRows][kOctets];
    Statistics s[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= rows) continue;
      s[r] = {mean_at[r], rstd_at[r]};
      if (kKeep && column_of(0) < channels) load(r, 0, dout[r][0], in[r][0], din[r][0]);
    }
    float sums[kSums] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        if (!kKeep) __syncwarp();  // one octet after the other: for two at a time there are too few registers
        if (column_of(o) >= channels || first + r >= rows) continue;
        if (!kKeep) load(r, o, dout[r][o], in[r][o], din[r][o]);
        if (!kKeepWeight) p.weight.load_octet(0, column_of(o), weight);
        float d[kOctet], x[kOctet];
        unpack(dout[r][o], d);
        unpack(in[r][o], x);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          const float n = normalized(x[j], s[r]), g = d[j] * weight[j];
          sums[2 * r] += g;
          sums[2 * r + 1] = fmaf(g, n, sums[2 * r + 1]);
          dweight[o][j] = fmaf(d[j], n, dweight[o][j]);
          dbias[o][j] += d[j];
        }
      }
    }
    // A few lanes have one sum each, of this warp and then, warp after warp, of the block.
    const float of_warp = warp_sums(sums);
    if (lane % (kWarp / kSums) == 0) shared[warp * kSums + lane / (kWarp / kSums)] = of_warp;
    __syncthreads();  // the half written before is read now; the other one is written next
    float of_block = 0;
    for (int w = 0; w < warps; ++w) of_block += shared[w * kSums + lane % kSums];
    of_block *= per_channel;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float mean_g = __shfl_sync(kAllLanes, of_block, 2 * r);
      const float mean_gn = __shfl_sync(kAllLanes, of_block, 2 * r + 1);
      if (first + r >= rows) continue;
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        if (!kKeep) __syncwarp();
        if (column_of(o) >= channels) continue;
        if (!kKeep) load(r, o, dout[r][o], in[r][o], din[r][o]);
        if (!kKeepWeight) p.weight.load_octet(0, column_of(o), weight);
        float d[kOctet], x[kOctet], dx[kOctet];
        unpack(dout[r][o], d);
        unpack(in[r][o], x);
        unpack(din[r][o], dx);
#pragma unroll
        for (int j = 0; j < kOctet; ++j)
          dx[j] = add_input_gradient(dx[j], normalized(x[j], s[r]), d[j] * weight[j], s[r].rstd, mean_g, mean_gn);
        store_floats(place(din_at, p.din.pitch, r, o), dx);
      }
    }
    if constexpr (kMoves) {
      dout_at += kRows * p.dout.pitch;
      in_at += kRows * p.in.pitch;
      din_at += kRows * p.din.pitch;
    } else {
      row_at += kRows;
    }
    mean_at += kRows;
    rstd_at += kRows;
    float* const used = shared;
    shared = other;
    other = used;
  }
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
    if (column_of(o) >= channels) continue;
    float* const partial = p.partials + static_cast<int64_t>(blockIdx.x) * 2 * channels + column_of(o);
    store_floats(partial, dweight[o]);
    store_floats(partial + channels, dbias[o]);
  }
}

void launch_backward(cudaStream_t stream, const Backward& p, unsigned blocks) {
  require(p.channels <= kMostNormChannels, "layernorm: too many channels");
  const int64_t octets = p.channels / kOctet;
  const int64_t per_thread = octets <= kMostThreads ? 1 : octets <= 2 * kThreadsOfTwoOctets ? 2 : 4;
  const int64_t warps = divide_up(octets, per_thread * kWarp);
  const unsigned threads = static_cast<unsigned>(warps * kWarp);
  dispatch(p.in.dtype, [&]<typename T>() {
    const auto run = [&]<int kRows, int kThreads, int kBlocks, bool kKeepWeight = true, int kOctets = 1>() {
      launch("layernorm_backward", layernorm_backward_kernel<T, kRows, kThreads, kBlocks, kKeepWeight, kOctets>,
             {.grid = dim3(blocks),
              .block = dim3(threads),
              .shared_bytes = size_t{2} * (threads / kWarp) * kRows * 2 * sizeof(float),
              .stream = stream},
             p);
    };
    // Small blocks have many rows under way; of larger ones several on a multiprocessor, which keep its memory busy
    // while one waits at its barrier. Rows of four-byte numbers take twice the registers.
    constexpr bool kHalf = sizeof(T) == 2;
    constexpr int kBlocks = kHalf ? 2 : 1;
    if (per_thread == 4) return run.template operator()<1, kThreadsOfFourOctets, 1, false, 4>();
    if (per_thread == 2) return run.template operator()<1, kThreadsOfTwoOctets, 1, false, 2>();
    if (threads <= 128) return run.template operator() < kHalf ? 4 : 2, 128, 4 > ();
    if (threads <= 256) return run.template operator()<2, 256, kBlocks + 1>();
    if (threads <= 512) return run.template operator() < kHalf ? 1 : 2, 512, kBlocks > ();
    run.template operator()<1, kMostThreads, 1, kHalf>();
  });
}

}  // namespace

void CudaBackend::layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor in, Tensor weight, Tensor bias) {
  check_layernorm_forward(out, mean, rstd, in, weight, bias);
  const Timed timed(*this, "layernorm_forward", 0, static_cast<double>(in.bytes() + out.bytes()));
  const Forward f = {any_view(out),    any_view(in),   {},        {},       mean.as<float>(), rstd.as<float>(),
                     any_view(weight), any_view(bias), in.rows(), in.cols()};
  require_octet_rows(in, out, weight, bias);
  launch_forward<false>("layernorm_forward", stream_, f);
}

void CudaBackend::residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                             Tensor weight, Tensor bias) {
  check_layernorm_forward(out, mean, rstd, residual, weight, bias);
  check_layernorm_summands(residual, a, b);
  const Timed timed(*this, "residual_layernorm_forward", 0,
                    static_cast<double>(a.bytes() + b.bytes() + residual.bytes() + out.bytes()));
  const Forward f = {any_view(out),    any_view(residual), any_view(a),    any_view(b),     mean.as<float>(),
                     rstd.as<float>(), any_view(weight),   any_view(bias), residual.rows(), residual.cols()};
  require_octet_rows(residual, out, a, b, weight, bias);
  launch_forward<true>("residual_layernorm_forward", stream_, f);
}

void CudaBackend::layernorm_backward(Tensor din, Tensor dweight, Tensor dbias, bool accumulate_parameters, Tensor dout,
                                     Tensor in, Tensor mean, Tensor rstd, Tensor weight) {
  check_layernorm_backward(din, dweight, dbias, dout, in, mean, rstd, weight);
  const Timed timed(*this, "layernorm_backward", 0, static_cast<double>(2 * din.bytes() + dout.bytes() + in.bytes()));
  const RowChunks chunks = row_chunks(in.rows(), kMaxLayerNormChunks, kSmallestChunk);
  float* const partials = scratch<float>(static_cast<size_t>(chunks.count * 2 * in.cols()) * sizeof(float));
  const Backward p = {any_view(din),          any_view(dout), any_view(in), any_view(weight), mean.as<const float>(),
                      rstd.as<const float>(), partials,       in.rows(),    in.cols(),        chunks.rows};
  require_octet_rows(din, dout, in, weight);
  if (in.rows() > 0) launch_backward(stream_, p, static_cast<unsigned>(chunks.count));
  add_column_partials("layernorm_backward: parameters", stream_, {dweight, chunks.count}, {dbias, chunks.count},
                      partials, accumulate_parameters);
}
