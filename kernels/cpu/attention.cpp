// attention.cpp: causal self-attention on the packed projection, forward and backward.
// Compute-bound: 2 B T^2 C operations forward, 5 B T^2 C backward (half of a full matrix, thanks to causality).
//
// One thread owns one head of one sequence, so dK and dV need no atomics. It copies the head into contiguous fp32
// scratch, which also widens bf16, and walks over tiles of queries. A tile's scores are transposed, a row for each key
// and a column for each query: the softmax then works on many queries at a time, and all products are tile_product(),
// which leaves out what no query of a piece may see. The T x T scores never exist beyond one tile of queries. Results
// are summed in fp32 and rounded once. Compiled with -ffp-contract=fast (Makefile).

#include <cmath>
#include <type_traits>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/simd_math.h"
#include "kernels/cpu/tile_product.h"
#include "kernels/operands.h"

namespace {

// The queries of a tile, and those of a piece of it, which share what they do not see.
constexpr int64_t kTile = 64, kPiece = 16;
static_assert(kPiece % kLanes == 0);

// Rows in scratch end with zeros, so that products have whole registers.
int64_t padded(int64_t numbers) { return divide_up(numbers, kPiece) * kPiece; }

// `rows` rows of one head, out[rows, padded(head_dim)]: `row` is the head's first element in the first token, `stride`
// from token to token.
template <typename T>
void load_head(float* out, const T* row, int64_t stride, int64_t rows, int64_t head_dim, float factor = 1.0f) {
  const int64_t width = padded(head_dim);
  for (int64_t t = 0; t < rows; ++t, row += stride, out += width) {
#pragma omp simd
    for (int64_t j = 0; j < head_dim; ++j) out[j] = to_float(row[j]) * factor;
    std::fill(out + head_dim, out + width, 0.0f);
  }
}

template <typename T>
void store_row(T* row, const float* in, int64_t numbers, float factor) {
#pragma omp simd
  for (int64_t j = 0; j < numbers; ++j) row[j] = from_float<T>(in[j] * factor);
}

template <typename T>
void store_head(T* row, int64_t stride, const float* in, int64_t rows, int64_t head_dim, float factor = 1.0f) {
  for (int64_t t = 0; t < rows; ++t) store_row(row + t * stride, in + t * padded(head_dim), head_dim, factor);
}

// out[width, kTile] = the transpose of in[kTile, width].
void transpose_tile(float* out, const float* in, int64_t width) {
  for (int64_t i = 0; i < kTile; i += kLanes) {
    for (int64_t j = 0; j < width; j += kLanes) {
      SquareTile square;
      for (int l = 0; l < kLanes; ++l) load_all(square.rows[l], in + (i + l) * width + j);
      transpose(square);
      for (int l = 0; l < kLanes; ++l) store_all(out + (j + l) * kTile + i, square.rows[l]);
    }
  }
}

// Queries [begin, begin + rows) of a head, in pieces, and their products with keys.
struct QueryTile {
  int64_t begin, rows;

  // f(piece, count) for each piece: `count` queries from begin + piece on.
  template <typename F>
  void for_each_piece(F&& f) const {
    for (int64_t piece = 0; piece < rows; piece += kPiece) f(piece, std::min(kPiece, rows - piece));
  }

  // out[keys, kTile] = keys[keys, width] transposed[width, kTile], for the keys that a query's piece sees.
  void scores(float* out, const float* keys, const float* transposed, int64_t head_dim) const {
    const int64_t width = padded(head_dim), columns = padded(rows);
    const auto product = [&](int64_t key, int64_t count, int64_t piece) {
      tile_product(count, columns - piece, head_dim, {keys + key * width, width, 1}, transposed + piece, kTile,
                   out + key * kTile + piece, kTile, false);
    };
    product(0, begin, 0);
    for_each_piece([&](int64_t piece, int64_t count) { product(begin + piece, count, piece); });
  }

  // sums[keys, width] += scores[keys, kTile] queries[kTile, width]; the tile's own keys get their first summand.
  void add_to_keys(float* sums, const float* scores, const float* queries, int64_t width) const {
    const auto product = [&](int64_t key, int64_t count, int64_t piece, bool add) {
      tile_product(count, width, rows - piece, {scores + key * kTile + piece, kTile, 1}, queries + piece * width, width,
                   sums + key * width, width, add);
    };
    product(0, begin, 0, true);
    for_each_piece([&](int64_t piece, int64_t count) { product(begin + piece, count, piece, false); });
  }

  // out[count, width] = scores[keys, kTile]^T rows_of_keys[keys, width] of one piece.
  void sum_over_keys(float* out, const float* scores, const float* rows_of_keys, int64_t piece, int64_t count,
                     int64_t width) const {
    tile_product(count, width, visible(piece, count), {scores + piece, 1, kTile}, rows_of_keys, width, out, width,
                 false);
  }

  // The number of keys that a piece's last query sees.
  int64_t visible(int64_t piece, int64_t count) const { return begin + piece + count; }

  // What a query of the piece does not see among them.
  void hide_future(float* scores, int64_t piece, int64_t count, float value) const {
    for (int64_t key = 1; key < count; ++key) std::fill_n(scores + (begin + piece + key) * kTile + piece, key, value);
  }
};

// f(i, first number in tensors of C channels, and of 3 C) for head i of all. f must not throw.
template <typename F>
void for_each_head(const AttentionShape& s, int threads, F&& f) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < s.batch * s.heads; ++i) {
    const int64_t token = i / s.heads * s.sequence, channel = i % s.heads * s.head_dim;
    f(i, token * s.channels + channel, token * 3 * s.channels + channel);
  }
}

// What queries are multiplied by: scores are exponents of two, so that the softmax needs no factor.
float score_factor(int64_t head_dim) { return kLog2E / std::sqrt(static_cast<float>(head_dim)); }

// Scores [keys, kLanes of stride] become 2^(score - maximum) of each query. Writes the maxima and the sums.
void exponentiate(float* scores, int64_t stride, int64_t keys, Lanes& maximum, Lanes& sum) {
  load_all(maximum, scores);
  for (int64_t key = 1; key < keys; ++key) {
    Lanes score;
    load_all(score, scores + key * stride);
    larger(maximum, score, maximum);
  }
  sum = Lanes{};
  for (int64_t key = 0; key < keys; ++key) {
    Lanes score;
    load_all(score, scores + key * stride);
    simd_exp2(score, score - maximum);
    store_all(scores + key * stride, score);
    sum += score;
  }
}

template <typename Out, typename In>
void head_forward(const AttentionShape& s, Out* out, float* lse, const In* qkv, float* scratch) {
  const int64_t head_dim = s.head_dim, stride = 3 * s.channels, width = padded(head_dim);
  float *const k = scratch, *const v = k + s.sequence * width, *const scores = v + s.sequence * width;
  float *const q = scores + padded(s.sequence) * kTile, *const transposed = q + kTile * width;
  float* const o = transposed + kTile * width;
  load_head(k, qkv + s.channels, stride, s.sequence, head_dim);
  load_head(v, qkv + 2 * s.channels, stride, s.sequence, head_dim);
  for (int64_t begin = 0; begin < s.sequence; begin += kTile) {
    const QueryTile tile = {begin, std::min(kTile, s.sequence - begin)};
    load_head(q, qkv + begin * stride, stride, tile.rows, head_dim, score_factor(head_dim));
    std::fill(q + tile.rows * width, q + kTile * width, 0.0f);
    transpose_tile(transposed, q, width);
    tile.scores(scores, k, transposed, head_dim);
    tile.for_each_piece([&](int64_t piece, int64_t count) {
      tile.hide_future(scores, piece, count, -INFINITY);
      float maxima[kPiece], sums[kPiece];
      for (int64_t i = 0; i < kPiece; i += kLanes) {
        Lanes maximum, sum;
        exponentiate(scores + piece + i, kTile, tile.visible(piece, count), maximum, sum);
        store_all(maxima + i, maximum);
        store_all(sums + i, sum);
      }
      tile.sum_over_keys(o, scores, v, piece, count, width);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t query = begin + piece + i;
        lse[query] = kLn2 * (maxima[i] + std::log2(sums[i]));
        store_row(out + query * s.channels, o + i * width, head_dim, 1.0f / sums[i]);
      }
    });
  }
}

// With P = softmax(S), S = Q K^T / sqrt(HD): dV = P^T dO, dP = dO V^T, dS = P (dP - delta), delta_i = sum_j dO_ij O_ij,
// dQ = dS K / sqrt(HD), dK = dS^T Q / sqrt(HD). P comes back from the scores, which here are
// S log2 e, and their log-sum-exp.
template <typename Grad, typename Out, typename In>
void head_backward(const AttentionShape& s, Grad* dqkv, const Grad* dout, const Out* out, const float* lse,
                   const In* qkv, float* scratch) {
  const int64_t head_dim = s.head_dim, stride = 3 * s.channels, width = padded(head_dim), head = s.sequence * width;
  float *const k = scratch, *const v = k + head, *const dk = v + head, *const dv = dk + head;
  float *const p = dv + head, *const ds = p + padded(s.sequence) * kTile;
  float *const q = ds + padded(s.sequence) * kTile, *const d = q + kTile * width, *const dq = d + kTile * width;
  float* const transposed = dq + kTile * width;
  load_head(k, qkv + s.channels, stride, s.sequence, head_dim);
  load_head(v, qkv + 2 * s.channels, stride, s.sequence, head_dim);
  for (int64_t begin = 0; begin < s.sequence; begin += kTile) {
    const QueryTile tile = {begin, std::min(kTile, s.sequence - begin)};
    load_head(q, qkv + begin * stride, stride, tile.rows, head_dim, score_factor(head_dim));
    load_head(d, dout + begin * s.channels, s.channels, tile.rows, head_dim);
    std::fill(q + tile.rows * width, q + kTile * width, 0.0f);
    std::fill(d + tile.rows * width, d + kTile * width, 0.0f);
    transpose_tile(transposed, q, width);
    tile.scores(p, k, transposed, head_dim);
    transpose_tile(transposed, d, width);
    tile.scores(ds, v, transposed, head_dim);
    tile.for_each_piece([&](int64_t piece, int64_t count) {
      tile.hide_future(p, piece, count, -INFINITY);
      tile.hide_future(ds, piece, count, 0.0f);
      float row_lse[kPiece] = {}, deltas[kPiece] = {};
      for (int64_t i = 0; i < count; ++i) {
        const Out* const out_row = out + (begin + piece + i) * s.channels;
        const float* const d_row = d + (piece + i) * width;
        float delta = 0;
#pragma omp simd reduction(+ : delta)
        for (int64_t j = 0; j < head_dim; ++j) delta += d_row[j] * to_float(out_row[j]);
        deltas[i] = delta;
        row_lse[i] = kLog2E * lse[begin + piece + i];
      }
      for (int64_t i = 0; i < kPiece; i += kLanes) {
        Lanes query_lse, query_delta;
        load_all(query_lse, row_lse + i);
        load_all(query_delta, deltas + i);
        for (int64_t key = 0; key < tile.visible(piece, count); ++key) {
          float *const p_at = p + key * kTile + piece + i, *const ds_at = ds + key * kTile + piece + i;
          Lanes probability, d_probability;
          load_all(probability, p_at);
          load_all(d_probability, ds_at);
          simd_exp2(probability, probability - query_lse);
          store_all(p_at, probability);
          store_all(ds_at, probability * (d_probability - query_delta));
        }
      }
      tile.sum_over_keys(dq, ds, k, piece, count, width);
      store_head(dqkv + (begin + piece) * stride, stride, dq, count, head_dim, kLn2 * score_factor(head_dim));
    });
    tile.add_to_keys(dv, p, d, width);
    tile.add_to_keys(dk, ds, q, width);
  }
  store_head(dqkv + s.channels, stride, dk, s.sequence, head_dim, kLn2);  // the queries had kLog2E in their factor
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
  const int64_t head_dim = s.head_dim, stride = 3 * s.channels, width = heads * head_dim;
  float *const q = scratch, *const o = q + padded(width), *const wide = o + padded(width);
  const int64_t columns = padded(heads);
  float* const scores = wide + padded(width);  // [sequence, columns]: a column for each head
  load_head(q, qkv + (s.sequence - 1) * stride, stride, 1, width, score_factor(head_dim));
  for_each_row(qkv + s.channels, stride, s.sequence, width, wide, [&](int64_t t, const float* keys) {
    float* const row = scores + t * columns;
    for (int64_t h = 0; h < heads; ++h) {
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = h * head_dim; j < (h + 1) * head_dim; ++j) dot += q[j] * keys[j];
      row[h] = dot;
    }
    std::fill(row + heads, row + columns, 0.0f);
  });
  float sums[kTile];
  for (int64_t h = 0; h < heads; h += kLanes) {
    Lanes maximum, sum;
    exponentiate(scores + h, columns, s.sequence, maximum, sum);
    store_all(sums + h, sum);
  }
  std::fill_n(o, width, 0.0f);
  for_each_row(qkv + 2 * s.channels, stride, s.sequence, width, wide, [&](int64_t t, const float* values) {
    for (int64_t h = 0; h < heads; ++h) {
      const float p = scores[t * columns + h];
#pragma omp simd
      for (int64_t j = h * head_dim; j < (h + 1) * head_dim; ++j) o[j] += p * values[j];
    }
  });
  for (int64_t h = 0; h < heads; ++h) store_row(out + h * head_dim, o + h * head_dim, head_dim, 1.0f / sums[h]);
}

}  // namespace

int64_t attention_scratch_floats(int64_t sequence, int64_t channels, int64_t heads) {
  const int64_t width = padded(heads > 0 ? channels / heads : channels);
  return 4 * (sequence + kTile) * width + 2 * padded(sequence) * kTile;
}

void CpuBackend::attention_forward(Tensor out, Tensor lse, Tensor qkv, int heads) {
  const AttentionShape s = check_attention_forward(out, lse, qkv, heads);
  const Profiler::Scope scope(profiler, "attention_forward", 2 * s.score_flops(),
                              static_cast<double>(qkv.bytes() + out.bytes()));
  const size_t bytes = static_cast<size_t>(attention_scratch_floats(s.sequence, s.channels, heads)) * sizeof(float);
  thread_scratch(bytes);  // an error must not be thrown inside the parallel loop
  dispatch(out.dtype, qkv.dtype, [&]<typename Out, typename In>() {
    for_each_head(s, threads_, [&](int64_t i, int64_t first, int64_t packed) {
      head_forward(s, out.as<Out>() + first, lse.as<float>() + i * s.sequence, qkv.as<const In>() + packed,
                   thread_scratch(bytes));
    });
  });
}

void CpuBackend::attention_decode(Tensor out, Tensor qkv, int heads) {
  const AttentionShape s = check_attention_decode(out, qkv, heads);
  const Profiler::Scope scope(profiler, "attention_decode", 2 * s.last_query_flops(), last_query_bytes(out, qkv));
  const size_t bytes = static_cast<size_t>(attention_scratch_floats(s.sequence, s.channels, heads)) * sizeof(float);
  thread_scratch(bytes);  // an error must not be thrown inside the parallel loop
  // Half a tile of them: then three rows and the scores fit into the scratch, however short the sequence is.
  const int64_t together = std::min(kTile / 2, divide_up(heads, threads_));
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
        for_each_head(s, threads_, [&](int64_t i, int64_t first, int64_t packed) {
          head_backward(s, dqkv.as<Grad>() + packed, dout.as<const Grad>() + first, out.as<const Out>() + first,
                        lse.as<const float>() + i * s.sequence, qkv.as<const In>() + packed, thread_scratch(bytes));
        });
      });
    });
  }
  bias_backward(dbias, dqkv, accumulate);
}
