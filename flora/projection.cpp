// projection.cpp: compressing, decoding and transferring with random projections; see projection.h for the costs.
#include "flora/projection.h"

#include <algorithm>

bool is_elongated(const Parameter& p) { return std::max(p.rows, p.cols) > 4 * std::min(p.rows, p.cols); }

bool is_compressed(const Parameter& parameter, int64_t rank, bool compress_embeddings, ProjectionKind projection) {
  if (!parameter.matrix || rank <= 0) return false;
  const int64_t small = std::min(parameter.rows, parameter.cols);
  // r orthonormal rows of length r span everything, and nothing is saved.
  if (has_orthonormal_rows(projection) ? small <= rank : small < rank) return false;
  return compress_embeddings || !is_elongated(parameter);
}

bool is_transformed(const Backend& backend, ProjectionKind kind, const Compression& shape) {
  return kind == ProjectionKind::kCosine && backend.transforms_cosines(shape.rank, shape.dimension());
}

float unbiased_factor(ProjectionKind kind, const Compression& shape) {
  if (!has_orthonormal_rows(kind)) return 1.0f;
  return static_cast<float>(shape.dimension()) / static_cast<float>(shape.rank);
}

void project_down(Backend& backend, Tensor out, Tensor g, Tensor p, const Compression& shape, bool accumulate) {
  if (shape.wide()) {
    backend.matmul(out, p, g, {.accumulate = accumulate});
  } else {
    backend.matmul(out, g, p, {.transpose_b = true, .accumulate = accumulate});
  }
}

void project_up(Backend& backend, Tensor out, Tensor m, Tensor p, const Compression& shape, float alpha,
                bool accumulate) {
  if (shape.wide()) {
    backend.matmul(out, p, m, {.transpose_a = true, .accumulate = accumulate, .alpha = alpha});
  } else {
    backend.matmul(out, m, p, {.accumulate = accumulate, .alpha = alpha});
  }
}

void project_rows_down(Backend& backend, Tensor out, Tensor g, Tensor p, const Compression& shape, int64_t begin) {
  if (shape.wide()) {
    backend.matmul(out, p.columns(begin, g.rows()), g, {.accumulate = begin > 0});
  } else {
    backend.matmul(out.slice(begin, g.rows()), g, p, {.transpose_b = true});
  }
}

void project_rows_up(Backend& backend, Tensor g, Tensor m, Tensor p, const Compression& shape, int64_t begin,
                     float alpha, bool accumulate) {
  if (shape.wide()) {
    backend.matmul(g, p.columns(begin, g.rows()), m, {.transpose_a = true, .accumulate = accumulate, .alpha = alpha});
  } else {
    backend.matmul(g, m.slice(begin, g.rows()), p, {.accumulate = accumulate, .alpha = alpha});
  }
}

void transfer(Backend& backend, Tensor out, Tensor m, Tensor p_old, Tensor p_new, Tensor square,
              const Compression& shape, float factor) {
  backend.matmul(square, p_new, p_old, {.transpose_b = true, .alpha = factor});
  if (shape.wide()) {
    backend.matmul(out, square, m);
  } else {
    backend.matmul(out, m, square, {.transpose_b = true});
  }
}
