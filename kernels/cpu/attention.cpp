// attention.cpp: causal self-attention on the packed projection, forward and backward.
// Compute-bound: 2 B T^2 C operations forward, 5 B T^2 C backward (half of a full matrix, thanks to causality).
//
// One thread owns one head of one sequence, so dK and dV need no atomics. It copies the head into contiguous fp32
// scratch (which also widens bf16, and lets sgemm read with a short stride), walks over tiles of queries, and
// multiplies each with the keys up to the tile's end. The T x T scores never exist beyond one tile of rows. Results are
// summed in fp32 and rounded once.

#include <cmath>
#include <type_traits>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/simd_math.h"
#include "kernels/operands.h"

namespace {

constexpr int64_t kQueryTile = 64;

int64_t round_to_vectors(int64_t floats) { return (floats + 15) / 16 * 16; }

int64_t head_floats(const AttentionShape& s) { return round_to_vectors(s.sequence * s.head_dim); }

// Not a power of two, which would put the rows of a tile into the same few lines of the cache.
int64_t score_stride(const AttentionShape& s) { return round_to_vectors(s.sequence) + 16; }

// Rows [begin, begin + rows) of one head: `row` is the head's first element in token 0, `stride` from token to token.
template <typename T>
void load_head(float* out, const T* row, int64_t stride, int64_t rows, int64_t head_dim, float factor = 1.0f) {
  for (int64_t t = 0; t < rows; ++t, row += stride, out += head_dim) {
#pragma omp simd
    for (int64_t j = 0; j < head_dim; ++j) out[j] = to_float(row[j]) * factor;
  }
}

template <typename T>
void store_head(T* row, int64_t stride, const float* in, int64_t rows, int64_t head_dim) {
  for (int64_t t = 0; t < rows; ++t, row += stride, in += head_dim) {
#pragma omp simd
    for (int64_t j = 0; j < head_dim; ++j) row[j] = from_float<T>(in[j]);
  }
}

// What a query must not see gets a score of -infinity, a probability of 0, up to a whole number of vectors: loops over
// scores then have no remainder to do one by one. Returns that number.
int64_t hide_future(float* scores, int64_t visible, int64_t keys) {
  const int64_t width = round_to_vectors(keys);
  std::fill(scores + visible, scores + width, -INFINITY);
  return width;
}

struct RowSum {
  float sum, maximum;
};

// Scores become exp(score - maximum). Returns their sum and the maximum.
RowSum exponentiate_row(float* scores, int64_t width) {
  float maximum = scores[0];
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < width; ++j) {
    const float score = scores[j];  // a value: compilers do not vectorise a choice between references
    maximum = std::max(maximum, score);
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < width; ++j) {
    const float e = simd_exp(scores[j] - maximum);
    scores[j] = e;
    sum += e;
  }
  return {sum, maximum};
}

template <typename Out, typename In>
void head_forward(const AttentionShape& s, Out* out, float* lse, const In* qkv, float* scratch) {
  const int64_t head_dim = s.head_dim, stride = 3 * s.channels;
  float* const k = scratch;
  float* const v = k + head_floats(s);
  float* const q = v + head_floats(s);
  float* const o = q + kQueryTile * head_dim;
  float* const scores = o + kQueryTile * head_dim;
  load_head(k, qkv + s.channels, stride, s.sequence, head_dim);
  load_head(v, qkv + 2 * s.channels, stride, s.sequence, head_dim);
  const float factor = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (int64_t begin = 0; begin < s.sequence; begin += kQueryTile) {
    const int64_t rows = std::min(kQueryTile, s.sequence - begin), keys = begin + rows;
    load_head(q, qkv + begin * stride, stride, rows, head_dim, factor);
    gemm({rows, keys, head_dim, false, true}, 1.0f, q, head_dim, k, head_dim, 0.0f, scores, score_stride(s));
    float inverse_sums[kQueryTile];
    for (int64_t i = 0; i < rows; ++i) {
      float* const score_row = scores + i * score_stride(s);
      const RowSum row = exponentiate_row(score_row, hide_future(score_row, begin + i + 1, keys));
      lse[begin + i] = row.maximum + std::log(row.sum);
      inverse_sums[i] = 1.0f / row.sum;
    }
    gemm({rows, head_dim, keys}, 1.0f, scores, score_stride(s), v, head_dim, 0.0f, o, head_dim);
    for (int64_t i = 0; i < rows; ++i) {
      Out* const row = out + (begin + i) * s.channels;
#pragma omp simd
      for (int64_t j = 0; j < head_dim; ++j) row[j] = from_float<Out>(o[i * head_dim + j] * inverse_sums[i]);
    }
  }
}

// With P = softmax(S), S = Q K^T / sqrt(HD): dV = P^T dO, dP = dO V^T, dS = P (dP - delta), delta_i = sum_j dO_ij O_ij,
// dQ = dS K / sqrt(HD), dK = dS^T Q / sqrt(HD). P comes back from the scores and their log-sum-exp.
template <typename Grad, typename Out, typename In>
void head_backward(const AttentionShape& s, Grad* dqkv, const Grad* dout, const Out* out, const float* lse,
                   const In* qkv, float* scratch) {
  const int64_t head_dim = s.head_dim, stride = 3 * s.channels, head = head_floats(s), width = score_stride(s);
  float *const q = scratch, *const k = q + head, *const v = k + head, *const d = v + head;
  float *const dq = d + head, *const dk = dq + head, *const dv = dk + head;
  float *const p = dv + head, *const ds = p + kQueryTile * width;
  const float factor = 1.0f / std::sqrt(static_cast<float>(head_dim));
  load_head(q, qkv, stride, s.sequence, head_dim, factor);
  load_head(k, qkv + s.channels, stride, s.sequence, head_dim);
  load_head(v, qkv + 2 * s.channels, stride, s.sequence, head_dim);
  load_head(d, dout, s.channels, s.sequence, head_dim);
  std::fill_n(dk, head, 0.0f);
  std::fill_n(dv, head, 0.0f);
  for (int64_t begin = 0; begin < s.sequence; begin += kQueryTile) {
    const int64_t rows = std::min(kQueryTile, s.sequence - begin), keys = begin + rows;
    const float *const q_tile = q + begin * head_dim, *const d_tile = d + begin * head_dim;
    gemm({rows, keys, head_dim, false, true}, 1.0f, q_tile, head_dim, k, head_dim, 0.0f, p, width);
    gemm({rows, keys, head_dim, false, true}, 1.0f, d_tile, head_dim, v, head_dim, 0.0f, ds, width);
    for (int64_t i = 0; i < rows; ++i) {
      const Out* const out_row = out + (begin + i) * s.channels;
      const float* const d_row = d_tile + i * head_dim;
      float delta = 0;
#pragma omp simd reduction(+ : delta)
      for (int64_t j = 0; j < head_dim; ++j) delta += d_row[j] * to_float(out_row[j]);
      float *const p_row = p + i * width, *const ds_row = ds + i * width;
      const float row_lse = lse[begin + i];
      const int64_t visible = begin + i + 1, padded = hide_future(p_row, visible, keys);
      std::fill(ds_row + visible, ds_row + padded, 0.0f);
#pragma omp simd
      for (int64_t j = 0; j < padded; ++j) {
        const float probability = simd_exp(p_row[j] - row_lse);
        p_row[j] = probability;
        ds_row[j] = probability * (ds_row[j] - delta);
      }
    }
    gemm({keys, head_dim, rows, true, false}, 1.0f, p, width, d_tile, head_dim, 1.0f, dv, head_dim);
    gemm({keys, head_dim, rows, true, false}, 1.0f, ds, width, q_tile, head_dim, 1.0f, dk, head_dim);
    gemm({rows, head_dim, keys}, factor, ds, width, k, head_dim, 0.0f, dq + begin * head_dim, head_dim);
  }
  store_head(dqkv, stride, dq, s.sequence, head_dim);
  store_head(dqkv + s.channels, stride, dk, s.sequence, head_dim);
  store_head(dqkv + 2 * s.channels, stride, dv, s.sequence, head_dim);
}

// Calls f(token, its row as fp32) for each token: `width` numbers from `rows` on, `stride` from token to token.
template <typename T, typename F>
void for_each_row(const T* rows, int64_t stride, int64_t tokens, int64_t width, float* scratch, F&& f) {
  const int64_t ahead = rows_ahead<T>(width) * stride;
  for (int64_t t = 0; t < tokens; ++t, rows += stride) {
    prefetch(rows + ahead, width);
    if constexpr (std::is_same_v<T, float>) {
      f(t, rows);
    } else {
      load_head(scratch, rows, stride, 1, width);
      f(t, scratch);
    }
  }
}

// The last query of `heads` neighbouring heads; `out` and `qkv` begin at the first one's channels. A token's heads lie
// side by side, so memory is read in long pieces when they are taken together.
template <typename Out, typename In>
void decode_heads(const AttentionShape& s, Out* out, const In* qkv, int64_t heads, float* scratch) {
  const int64_t head_dim = s.head_dim, stride = 3 * s.channels, width = heads * head_dim, row = score_stride(s);
  float *const q = scratch, *const o = q + round_to_vectors(width), *const wide = o + round_to_vectors(width);
  float* const scores = wide + round_to_vectors(width);
  load_head(q, qkv + (s.sequence - 1) * stride, stride, 1, width, 1.0f / std::sqrt(static_cast<float>(head_dim)));
  for_each_row(qkv + s.channels, stride, s.sequence, width, wide, [&](int64_t t, const float* keys) {
    for (int64_t h = 0; h < heads; ++h) {
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = h * head_dim; j < (h + 1) * head_dim; ++j) dot += q[j] * keys[j];
      scores[h * row + t] = dot;
    }
  });
  for (int64_t h = 0; h < heads; ++h) {
    float* const p = scores + h * row;
    const float inverse = 1.0f / exponentiate_row(p, hide_future(p, s.sequence, s.sequence)).sum;
#pragma omp simd
    for (int64_t t = 0; t < s.sequence; ++t) p[t] *= inverse;
  }
  std::fill_n(o, width, 0.0f);
  for_each_row(qkv + 2 * s.channels, stride, s.sequence, width, wide, [&](int64_t t, const float* values) {
    for (int64_t h = 0; h < heads; ++h) {
      const float p = scores[h * row + t];
#pragma omp simd
      for (int64_t j = h * head_dim; j < (h + 1) * head_dim; ++j) o[j] += p * values[j];
    }
  });
  store_head(out, width, o, 1, width);
}

}  // namespace

int64_t attention_scratch_floats(int64_t sequence, int64_t channels, int64_t heads) {
  const AttentionShape s = {1, sequence, channels, heads, heads > 0 ? channels / heads : channels};
  return 7 * head_floats(s) + 2 * kQueryTile * score_stride(s) + 2 * kQueryTile * s.head_dim;
}

void CpuBackend::attention_forward(Tensor out, Tensor lse, Tensor qkv, int heads) {
  const AttentionShape s = check_attention_forward(out, lse, qkv, heads);
  const Profiler::Scope scope(profiler, "attention_forward", 2 * s.score_flops(),
                              static_cast<double>(qkv.bytes() + out.bytes()));
  const size_t bytes = static_cast<size_t>(attention_scratch_floats(s.sequence, s.channels, heads)) * sizeof(float);
  thread_scratch(bytes);  // an error must not be thrown inside the parallel loop
  dispatch(out.dtype, qkv.dtype, [&]<typename Out, typename In>() {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_)
    for (int64_t i = 0; i < s.batch * heads; ++i) {
      const int64_t token = i / heads * s.sequence, channel = i % heads * s.head_dim;
      head_forward(s, out.as<Out>() + token * s.channels + channel, lse.as<float>() + i * s.sequence,
                   qkv.as<const In>() + token * 3 * s.channels + channel, thread_scratch(bytes));
    }
  });
}

void CpuBackend::attention_decode(Tensor out, Tensor qkv, int heads) {
  const AttentionShape s = check_attention_decode(out, qkv, heads);
  const Profiler::Scope scope(profiler, "attention_decode", 2 * s.last_query_flops(), last_query_bytes(out, qkv));
  const size_t bytes = static_cast<size_t>(attention_scratch_floats(s.sequence, s.channels, heads)) * sizeof(float);
  thread_scratch(bytes);  // an error must not be thrown inside the parallel loop
  // Half a tile of them: then three rows and the scores fit into the scratch, however short the sequence is.
  const int64_t together = std::min(kQueryTile / 2, divide_up(heads, threads_));
  dispatch(out.dtype, qkv.dtype, [&]<typename Out, typename In>() {
#pragma omp parallel for schedule(static) num_threads(threads_)
    for (int64_t first = 0; first < heads; first += together) {
      const int64_t channel = first * s.head_dim;
      decode_heads(s, out.as<Out>() + channel, qkv.as<const In>() + channel, std::min(together, heads - first),
                   thread_scratch(bytes));
    }
  });
}

void CpuBackend::attention_backward(Tensor dqkv, Tensor dbias, Tensor dout, Tensor out, Tensor lse, Tensor qkv,
                                    int heads, bool accumulate) {
  const AttentionShape s = check_attention_backward(dqkv, dbias, dout, out, lse, qkv, heads);
  {
    const Profiler::Scope scope(profiler, "attention_backward", 5 * s.score_flops(),
                                static_cast<double>(qkv.bytes() + dqkv.bytes() + out.bytes() + dout.bytes()));
    const size_t bytes = static_cast<size_t>(attention_scratch_floats(s.sequence, s.channels, heads)) * sizeof(float);
    thread_scratch(bytes);  // an error must not be thrown inside the parallel loop
    dispatch(dqkv.dtype, [&]<typename Grad>() {
      dispatch(out.dtype, qkv.dtype, [&]<typename Out, typename In>() {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_)
        for (int64_t i = 0; i < s.batch * heads; ++i) {
          const int64_t token = i / heads * s.sequence, channel = i % heads * s.head_dim;
          head_backward(s, dqkv.as<Grad>() + token * 3 * s.channels + channel,
                        dout.as<const Grad>() + token * s.channels + channel,
                        out.as<const Out>() + token * s.channels + channel, lse.as<const float>() + i * s.sequence,
                        qkv.as<const In>() + token * 3 * s.channels + channel, thread_scratch(bytes));
        }
      });
    });
  }
  bias_backward(dbias, dqkv, accumulate);
}
