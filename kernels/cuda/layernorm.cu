// layernorm.cu: LayerNorm over the channels of each token, forward and backward.
// Memory-bound. Forward: one warp owns a row and keeps it in registers between the statistics and the output, so each
// element is read once and written once (with a residual: two reads, two writes). Lane l owns the octets (eight
// neighbouring channels) l, l + 32, ... and adds them in that order, then the lanes are added: every forward kernel
// here sums in this one order, so that adding first or inside, and recomputing, give the same bits. Backward: reads
// dout, in and din and writes din. A block owns a chunk of rows and a thread an octet of columns, whose sums for
// dweight and dbias stay in its registers from the first row to the last; the two sums a row needs meet in shared
// memory, several rows at once, so that one barrier serves them all and their loads overlap.
#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda_workspace.h"
#include "kernels/operands.h"

namespace {

constexpr float kEpsilon = 1e-5f;
constexpr int kForwardWarps = 4;
constexpr int kRowsAtOnce = 4;     // backward: rows a block has under way
constexpr int kSlowThreads = 256;  // of the backward pass for any layout
constexpr int64_t kSmallestChunk = 16;

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

// Rows of whole, aligned octets, at most 32 * kOctets of them; in, a and b have type T.
template <typename T, int kOctets, bool kResidual>
__global__ void __launch_bounds__(kForwardWarps* kWarp) layernorm_forward_kernel(Forward f) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp;
  if (row >= f.rows) return;
  const auto column_of = [lane](int i) { return (i * kWarp + lane) * kOctet; };
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
  s.mean = warp_sum(sum) / static_cast<float>(channels);
  float squares = 0;
  for_each_value([&](float value) { squares = fmaf(value - s.mean, value - s.mean, squares); });
  s.rstd = reciprocal_deviation(warp_sum(squares), f.channels);
  if (lane == 0) {
    f.mean[row] = s.mean;
    f.rstd[row] = s.rstd;
  }

#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    if (column_of(i) >= channels) continue;
    float values[kOctet], weight[kOctet], bias[kOctet];
    load_octet(f.weight, 0, column_of(i), weight);
    load_octet(f.bias, 0, column_of(i), bias);
    unpack(x[i], values);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) values[j] = fmaf(normalized(values[j], s), weight[j], bias[j]);
    store_octet(f.out, row, column_of(i), values);
  }
}

// The same for any layout, length and types: the row is read three times, from a cache after the first time.
__global__ void __launch_bounds__(kForwardWarps* kWarp) layernorm_forward_any_kernel(Forward f) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp;
  if (row >= f.rows) return;
  const auto for_each_channel = [&](auto&& visit) {
    for (int64_t octet = lane; octet * kOctet < f.channels; octet += kWarp) {
      for (int64_t j = octet * kOctet; j < (octet + 1) * kOctet && j < f.channels; ++j) visit(j);
    }
  };
  if (f.a.data != nullptr) {
    for_each_channel([&](int64_t j) { f.in.store_one(row, j, f.a.load_one(row, j) + f.b.load_one(row, j)); });
  }
  Statistics s;
  float sum = 0;
  for_each_channel([&](int64_t j) { sum += f.in.load_one(row, j); });
  s.mean = warp_sum(sum) / static_cast<float>(f.channels);
  float squares = 0;
  for_each_channel([&](int64_t j) {
    const float deviation = f.in.load_one(row, j) - s.mean;
    squares = fmaf(deviation, deviation, squares);
  });
  s.rstd = reciprocal_deviation(warp_sum(squares), f.channels);
  if (lane == 0) {
    f.mean[row] = s.mean;
    f.rstd[row] = s.rstd;
  }
  for_each_channel([&](int64_t j) {
    const float value = normalized(f.in.load_one(row, j), s);
    f.out.store_one(row, j, fmaf(value, f.weight.load_one(0, j), f.bias.load_one(0, j)));
  });
}

template <bool kResidual>
void launch_forward(const char* name, cudaStream_t stream, const Forward& f, bool vectors) {
  if (f.rows == 0) return;
  const LaunchShape shape = {.grid = dim3(static_cast<unsigned>((f.rows + kForwardWarps - 1) / kForwardWarps)),
                             .block = dim3(kForwardWarps * kWarp),
                             .stream = stream};
  const int64_t octets = (f.channels + kWarp * kOctet - 1) / (kWarp * kOctet);  // per lane
  if (!vectors || octets > 16) {
    launch(name, layernorm_forward_any_kernel, shape, f);
    return;
  }
  dispatch(f.in.dtype, [&]<typename T>() {
    switch (octets) {
      case 1: launch(name, layernorm_forward_kernel<T, 1, kResidual>, shape, f); return;
      case 2: launch(name, layernorm_forward_kernel<T, 2, kResidual>, shape, f); return;
      case 3: launch(name, layernorm_forward_kernel<T, 3, kResidual>, shape, f); return;
      case 4: launch(name, layernorm_forward_kernel<T, 4, kResidual>, shape, f); return;
      case 5: launch(name, layernorm_forward_kernel<T, 5, kResidual>, shape, f); return;
      case 6: launch(name, layernorm_forward_kernel<T, 6, kResidual>, shape, f); return;
      case 7: launch(name, layernorm_forward_kernel<T, 7, kResidual>, shape, f); return;
      case 8: launch(name, layernorm_forward_kernel<T, 8, kResidual>, shape, f); return;
      case 9:
      case 10: launch(name, layernorm_forward_kernel<T, 10, kResidual>, shape, f); return;
      case 11:
      case 12: launch(name, layernorm_forward_kernel<T, 12, kResidual>, shape, f); return;
      default: launch(name, layernorm_forward_kernel<T, 16, kResidual>, shape, f); return;
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

// Rows of whole, aligned octets, one octet to a thread. kThreads bounds the block and so the registers of a thread.
template <typename DIn, typename DOut, typename In, int kRows, int kThreads>
__global__ void __launch_bounds__(kThreads) layernorm_backward_kernel(Backward p) {
  const int column = static_cast<int>(threadIdx.x) * kOctet;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const bool active = column < p.channels;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * p.chunk;
  const int64_t end = begin + p.chunk < p.rows ? begin + p.chunk : p.rows;
  const float per_channel = 1.0f / static_cast<float>(p.channels);

  constexpr bool kReloadWeight = kThreads > 512;  // too few registers to keep it
  float weight[kOctet] = {}, dweight[kOctet] = {}, dbias[kOctet] = {};
  if (active && !kReloadWeight) load_octet(p.weight, 0, column, weight);
  float* shared = shared_memory<float>();  // two halves, used in turn: [warps, kRows, 2]
  float* other = shared + warps * kRows * 2;

  for (int64_t first = begin; first < end; first += kRows) {
    Vector<DOut, kOctet> dout[kRows];
    Vector<In, kOctet> in[kRows];
    Vector<DIn, kOctet> din[kRows];
    Statistics s[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r;
      if (!active || row >= end) continue;
      dout[r] = load_vector_streaming<kOctet>(static_cast<const DOut*>(p.dout.data) + row * p.dout.pitch + column);
      in[r] = load_vector_streaming<kOctet>(static_cast<const In*>(p.in.data) + row * p.in.pitch + column);
      din[r] = load_vector<kOctet>(static_cast<const DIn*>(p.din.data) + row * p.din.pitch + column);
      s[r] = {p.mean[row], p.rstd[row]};
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum_g = 0, sum_gn = 0;
      if (active && first + r < end) {
        if (kReloadWeight) load_octet(p.weight, 0, column, weight);
        float d[kOctet], x[kOctet];
        unpack(dout[r], d);
        unpack(in[r], x);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          const float n = normalized(x[j], s[r]), g = d[j] * weight[j];
          sum_g += g;
          sum_gn = fmaf(g, n, sum_gn);
          dweight[j] = fmaf(d[j], n, dweight[j]);
          dbias[j] += d[j];
        }
      }
      sum_g = warp_sum(sum_g);
      sum_gn = warp_sum(sum_gn);
      if (lane == 0) {
        shared[(warp * kRows + r) * 2] = sum_g;
        shared[(warp * kRows + r) * 2 + 1] = sum_gn;
      }
    }
    __syncthreads();  // the half written before is read now; the other one is written next
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!active || first + r >= end) continue;
      float mean_g = 0, mean_gn = 0;
      for (int w = 0; w < warps; ++w) {
        mean_g += shared[(w * kRows + r) * 2];
        mean_gn += shared[(w * kRows + r) * 2 + 1];
      }
      mean_g *= per_channel;
      mean_gn *= per_channel;
      if (kReloadWeight) load_octet(p.weight, 0, column, weight);
      float d[kOctet], x[kOctet], dx[kOctet];
      unpack(dout[r], d);
      unpack(in[r], x);
      unpack(din[r], dx);
#pragma unroll
      for (int j = 0; j < kOctet; ++j)
        dx[j] = add_input_gradient(dx[j], normalized(x[j], s[r]), d[j] * weight[j], s[r].rstd, mean_g, mean_gn);
      store_floats(static_cast<DIn*>(p.din.data) + (first + r) * p.din.pitch + column, dx);
    }
    float* const used = shared;
    shared = other;
    other = used;
  }
  if (!active) return;
  float* const partial = p.partials + static_cast<int64_t>(blockIdx.x) * 2 * p.channels + column;
  store_floats(partial, dweight);
  store_floats(partial + p.channels, dbias);
}

// The same for any layout, length and types: a thread takes every 256th column and keeps its sums in the partials.
__global__ void __launch_bounds__(kSlowThreads) layernorm_backward_any_kernel(Backward p) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * p.chunk;
  const int64_t end = begin + p.chunk < p.rows ? begin + p.chunk : p.rows;
  const float count = static_cast<float>(p.channels);
  float* const dweight = p.partials + static_cast<int64_t>(blockIdx.x) * 2 * p.channels;
  float* const dbias = dweight + p.channels;
  const auto for_each_channel = [&](auto&& visit) {
    for (int64_t j = threadIdx.x; j < p.channels; j += kSlowThreads) visit(j);
  };
  for_each_channel([&](int64_t j) { dweight[j] = dbias[j] = 0; });
  for (int64_t row = begin; row < end; ++row) {
    const Statistics s = {p.mean[row], p.rstd[row]};
    float sum_g = 0, sum_gn = 0;
    for_each_channel([&](int64_t j) {
      const float d = p.dout.load_one(row, j), g = d * p.weight.load_one(0, j);
      const float n = normalized(p.in.load_one(row, j), s);
      sum_g += g;
      sum_gn = fmaf(g, n, sum_gn);
      dweight[j] = fmaf(d, n, dweight[j]);
      dbias[j] += d;
    });
    const float mean_g = block_sum(sum_g, shared_memory<float>()) / count;
    const float mean_gn = block_sum(sum_gn, shared_memory<float>()) / count;
    for_each_channel([&](int64_t j) {
      const float g = p.dout.load_one(row, j) * p.weight.load_one(0, j);
      const float n = normalized(p.in.load_one(row, j), s);
      p.din.store_one(row, j, add_input_gradient(p.din.load_one(row, j), n, g, s.rstd, mean_g, mean_gn));
    });
  }
}

template <typename DIn, typename DOut, typename In, int kRows, int kThreads>
void launch_backward_rows(cudaStream_t stream, const Backward& p, unsigned blocks, unsigned threads) {
  launch("layernorm_backward", layernorm_backward_kernel<DIn, DOut, In, kRows, kThreads>,
         {.grid = dim3(blocks),
          .block = dim3(threads),
          .shared_bytes = size_t{2} * (threads / kWarp) * kRows * 2 * sizeof(float),
          .stream = stream},
         p);
}

void launch_backward(cudaStream_t stream, const Backward& p, bool vectors, unsigned blocks) {
  const unsigned threads = static_cast<unsigned>((p.channels / kOctet + kWarp - 1) / kWarp * kWarp);
  if (!vectors || threads > 1024) {
    launch("layernorm_backward", layernorm_backward_any_kernel,
           {.grid = dim3(blocks),
            .block = dim3(kSlowThreads),
            .shared_bytes = kSlowThreads / kWarp * sizeof(float),
            .stream = stream},
           p);
    return;
  }
  dispatch(p.din.dtype, [&]<typename DIn>() {
    dispatch(p.dout.dtype, p.in.dtype, [&]<typename DOut, typename In>() {
      constexpr int kRows = sizeof(DIn) + sizeof(DOut) + sizeof(In) == 6 ? kRowsAtOnce : kRowsAtOnce / 2;
      if (threads <= 512) {
        launch_backward_rows<DIn, DOut, In, kRows, 512>(stream, p, blocks, threads);
      } else {
        launch_backward_rows<DIn, DOut, In, 1, 1024>(stream, p, blocks, threads);
      }
    });
  });
}

}  // namespace

void CudaBackend::layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor in, Tensor weight, Tensor bias) {
  check_layernorm_forward(out, mean, rstd, in, weight, bias);
  const Timed timed(*this, "layernorm_forward", 0, static_cast<double>(in.bytes() + out.bytes()));
  const Forward f = {any_view(out),    any_view(in),   {},        {},       mean.as<float>(), rstd.as<float>(),
                     any_view(weight), any_view(bias), in.rows(), in.cols()};
  launch_forward<false>("layernorm_forward", stream_, f,
                        has_octet_rows(in) && has_octet_rows(out) && has_octet_rows(weight) && has_octet_rows(bias));
}

void CudaBackend::residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                             Tensor weight, Tensor bias) {
  check_layernorm_forward(out, mean, rstd, residual, weight, bias);
  check_layernorm_summands(residual, a, b);
  const Timed timed(*this, "residual_layernorm_forward", 0,
                    static_cast<double>(a.bytes() + b.bytes() + residual.bytes() + out.bytes()));
  const Forward f = {any_view(out),    any_view(residual), any_view(a),    any_view(b),     mean.as<float>(),
                     rstd.as<float>(), any_view(weight),   any_view(bias), residual.rows(), residual.cols()};
  bool vectors = a.dtype == residual.dtype && b.dtype == residual.dtype;
  for (const Tensor& t : {residual, out, a, b, weight, bias}) vectors = vectors && has_octet_rows(t);
  launch_forward<true>("residual_layernorm_forward", stream_, f, vectors);
}

void CudaBackend::layernorm_backward(Tensor din, Tensor dweight, Tensor dbias, bool accumulate_parameters, Tensor dout,
                                     Tensor in, Tensor mean, Tensor rstd, Tensor weight) {
  check_layernorm_backward(din, dweight, dbias, dout, in, mean, rstd, weight);
  const Timed timed(*this, "layernorm_backward", 0, static_cast<double>(2 * din.bytes() + dout.bytes() + in.bytes()));
  const RowChunks chunks = row_chunks(in.rows(), kMaxLayerNormChunks, kSmallestChunk);
  float* const partials = scratch<float>(static_cast<size_t>(chunks.count * 2 * in.cols()) * sizeof(float));
  const Backward p = {any_view(din),          any_view(dout), any_view(in), any_view(weight), mean.as<const float>(),
                      rstd.as<const float>(), partials,       in.rows(),    in.cols(),        chunks.rows};
  bool vectors = true;
  for (const Tensor& t : {din, dout, in, weight}) vectors = vectors && has_octet_rows(t);
  if (in.rows() > 0) launch_backward(stream_, p, vectors, static_cast<unsigned>(chunks.count));
  add_column_partials("layernorm_backward: parameters", stream_, dweight, dbias, partials, chunks.count,
                      accumulate_parameters);
}
