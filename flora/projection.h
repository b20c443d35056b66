// projection.h: what random projections do to a matrix: compress it, decode it, and carry a compressed matrix from one
// projection to the next. Each costs one matmul of 2 r n m operations (a transfer: 2 r^2 (n + m)), or a CPU's cosine
// transforms of 2.5 n m log2(d) in its place; a projection is generated when it is needed and never stored.
//
// Of a parameter [n, m] the smaller dimension d is compressed, with P [r, d] from the generator:
//   n <  m: d = n, down(G) = P G   [r, m], up(M) = P^T M
//   n >= m: d = m, down(G) = G P^T [n, r], up(M) = M P
#pragma once

#include <cstdint>

#include "flora/parameter.h"
#include "kernels/backend.h"
#include "kernels/tensor.h"

// True when a gradient or momentum of this shape is held in a projection of rank r (docs/design.md, section Flora).
bool is_compressed(const Parameter& parameter, int64_t rank, bool compress_embeddings, ProjectionKind projection);

// More than four times as long as wide, or as wide as long: such matrices are compressed only where embeddings are.
bool is_elongated(const Parameter& parameter);

// True for projections with orthonormal rows: they decode to less than was there (r / d of it on average), Gaussian and
// Rademacher ones to what was there and noise.
inline bool has_orthonormal_rows(ProjectionKind kind) { return kind == ProjectionKind::kCosine; }

// The shape of a compressed parameter.
struct Compression {
  int64_t rows = 0, cols = 0, rank = 0;

  Compression(const Parameter& parameter, int64_t rank) : rows(parameter.rows), cols(parameter.cols), rank(rank) {}

  bool wide() const { return rows < cols; }  // n < m: the projection multiplies from the left
  int64_t dimension() const { return wide() ? rows : cols; }
  int64_t compressed_rows() const { return wide() ? rank : rows; }
  int64_t compressed_cols() const { return wide() ? cols : rank; }
  int64_t compressed_elements() const { return compressed_rows() * compressed_cols(); }
  int64_t projection_elements() const { return rank * dimension(); }
};

// Whether the device has cosine transforms for it, which need no projection but all of a vector at once (not so where
// the rows of a gradient in blocks are projected); otherwise a projection is made, and multiplied with.
bool is_transformed(const Backend& backend, ProjectionKind kind, const Compression& shape);

// What up(down(G)) is multiplied by to be G on average: d / r for orthonormal rows, else 1.
float unbiased_factor(ProjectionKind kind, const Compression& shape);

// out (+)= down(g).
void project_down(Backend& backend, Tensor out, Tensor g, Tensor p, const Compression& shape, bool accumulate);

// out (+)= alpha * up(m).
void project_up(Backend& backend, Tensor out, Tensor m, Tensor p, const Compression& shape, float alpha,
                bool accumulate);

// Parts of them, for rows [begin, begin + g.rows()) of the parameter: out is all of down(), to which such a part is
// added or whose rows it is; g (+)= these rows of alpha * up(m).
void project_rows_down(Backend& backend, Tensor out, Tensor g, Tensor p, const Compression& shape, int64_t begin);
void project_rows_up(Backend& backend, Tensor g, Tensor m, Tensor p, const Compression& shape, int64_t begin,
                     float alpha, bool accumulate);

// out = factor * down'(up(m)): from projection p_old to p_new without decoding, through the r x r matrix P' P^T in
// `square` (fp32). out may not be m.
void transfer(Backend& backend, Tensor out, Tensor m, Tensor p_old, Tensor p_new, Tensor square,
              const Compression& shape, float factor = 1.0f);
