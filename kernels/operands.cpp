// operands.cpp: see operands.h. A few comparisons per operation, nothing beside a kernel.
#include "kernels/operands.h"

namespace {

bool is_matrix(const Tensor& t) { return is_floating(t) && has_uniform_rows(t) && t.elements() > 0; }

bool same_rows(const Tensor& a, const Tensor& b) { return a.elements() == b.elements() && a.cols() == b.cols(); }

}  // namespace

MatmulShape check_matmul(const Tensor& out, const Tensor& a, const Tensor& b, const MatmulOptions& options) {
  require(is_matrix(out) && is_matrix(a) && is_matrix(b), "matmul: fp32 or bf16 matrices that are not empty");
  const MatmulShape shape = {out.rows(), out.cols(), options.transpose_a ? a.rows() : a.cols()};
  const Tensor& bias = options.bias;
  require((options.transpose_a ? a.cols() : a.rows()) == shape.m, "matmul: rows of a and of the result differ");
  require((options.transpose_b ? b.rows() : b.cols()) == shape.n, "matmul: columns of b and of the result differ");
  require((options.transpose_b ? b.cols() : b.rows()) == shape.k, "matmul: inner dimensions differ");
  require(bias.empty() || (bias.elements() == shape.n && bias.contiguous()), "matmul: length of the bias");
  return shape;
}

AttentionShape check_attention_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, int heads) {
  require(out.rank == 3 && qkv.rank == 3 && out.contiguous() && qkv.contiguous(),
          "attention: out [B,T,C], qkv [B,T,3C]");
  const AttentionShape s = {out.shape[0], out.shape[1], out.shape[2], heads, heads > 0 ? out.shape[2] / heads : 0};
  require(heads > 0 && s.head_dim * heads == s.channels, "attention: channels are a multiple of the heads");
  require(qkv.shape[0] == s.batch && qkv.shape[1] == s.sequence && qkv.shape[2] == 3 * s.channels, "attention: qkv");
  require(lse.dtype == DType::kF32 && lse.contiguous() && lse.elements() == s.token_heads(),
          "attention: lse [B,NH,T] fp32");
  return s;
}

AttentionShape check_attention_decode(const Tensor& out, const Tensor& qkv, int heads) {
  const int64_t channels = out.elements();
  require(out.contiguous() && qkv.contiguous() && channels > 0, "attention: out [C], qkv [T,3C]");
  require(qkv.cols() == 3 * channels && qkv.rows() > 0, "attention: qkv [T,3C]");
  require(heads > 0 && channels % heads == 0, "attention: channels are a multiple of the heads");
  return {1, qkv.rows(), channels, heads, channels / heads};
}

double last_query_bytes(const Tensor& out, const Tensor& qkv) {
  const size_t read = static_cast<size_t>((2 * qkv.rows() + 1) * out.elements()) * dtype_size(qkv.dtype);
  return static_cast<double>(read + out.bytes());
}

AttentionShape check_attention_backward(const Tensor& dqkv, const Tensor& dbias, const Tensor& dout, const Tensor& out,
                                        const Tensor& lse, const Tensor& qkv, int heads) {
  const AttentionShape s = check_attention_forward(out, lse, qkv, heads);
  require_elements(dqkv, qkv.elements(), "attention: dqkv");
  require_elements(dout, out.elements(), "attention: dout");
  require(dqkv.dtype == dout.dtype, "attention: dqkv and dout have one dtype");
  require_elements(dbias, 3 * s.channels, "attention: dbias [3C]");
  require(is_floating(dbias), "attention: dbias is fp32 or bf16");
  return s;
}

void check_classifier(const Tensor& losses, const Tensor& logits, const Tensor& targets, int64_t vocabulary,
                      const Tensor& lse) {
  const int64_t rows = logits.rows();
  require(losses.dtype == DType::kF32 && targets.dtype == DType::kI32, "classifier: fp32 losses, int32 targets");
  require(losses.elements() == rows && targets.elements() == rows, "classifier: one loss and target per row");
  require(vocabulary > 0 && vocabulary <= logits.cols() && has_uniform_rows(logits), "classifier: shape of the logits");
  require(lse.empty() || (lse.dtype == DType::kF32 && lse.contiguous() && lse.elements() == rows),
          "classifier: lse [n] fp32");
}

void check_classifier_gradient(const Tensor& logits, const Tensor& targets, const Tensor& lse, int64_t first,
                               int64_t vocabulary) {
  require(is_floating(logits) && has_uniform_rows(logits), "classifier_gradient: fp32 or bf16 logits");
  require(targets.dtype == DType::kI32 && lse.dtype == DType::kF32, "classifier_gradient: int32 targets, fp32 lse");
  require_elements(targets, logits.rows(), "classifier_gradient: one target per row");
  require_elements(lse, logits.rows(), "classifier_gradient: one log-sum-exp per row");
  require(first >= 0 && vocabulary > 0, "classifier_gradient: which columns these are");
}

void check_embedding_forward(const Tensor& out, const Tensor& tokens, const Tensor& wte, const Tensor& wpe) {
  require(tokens.dtype == DType::kI32 && tokens.rank == 2, "embedding: tokens [B, T] int32");
  const int64_t sequence = tokens.shape[1], channels = wte.cols();
  require(out.rows() == tokens.elements() && out.cols() == channels && wpe.cols() == channels, "embedding: shapes");
  require(wpe.rows() >= sequence, "embedding: fewer positions than the sequence has");
  require(wte.dtype == wpe.dtype, "embedding: both tables have one dtype");
  require(has_uniform_rows(out) && tokens.contiguous(), "embedding: rows of a view must have one stride");
}

void check_embedding_backward(const Tensor& dwte, const Tensor& dwpe, const Tensor& dout, const TokenGroups& groups,
                              int64_t first_row) {
  require(dout.rank == 3 && has_uniform_rows(dout), "embedding: dout [B, T, C]");
  const int64_t count = dout.shape[0] * dout.shape[1], channels = dout.cols();
  require(!dwte.empty() || !dwpe.empty(), "embedding: no gradient is wanted");
  require(dwte.empty() || (dwte.cols() == channels && has_uniform_rows(dwte) && first_row >= 0), "embedding: dwte");
  require(dwpe.empty() || (dwpe.cols() == channels && has_uniform_rows(dwpe) && dwpe.rows() >= dout.shape[1]),
          "embedding: dwpe");
  require(groups.ids.elements() == count && groups.positions.elements() == count, "embedding: token groups");
}

void check_layernorm_forward(const Tensor& out, const Tensor& mean, const Tensor& rstd, const Tensor& in,
                             const Tensor& weight, const Tensor& bias) {
  require(same_rows(out, in) && out.dtype == in.dtype, "layernorm: in and out differ");
  require_elements(weight, in.cols(), "layernorm: length of the weight");
  require_elements(bias, in.cols(), "layernorm: length of the bias");
  require(weight.dtype == bias.dtype, "layernorm: weight and bias have one dtype");
  require(mean.elements() == in.rows() && rstd.elements() == in.rows(), "layernorm: statistics");
  require(mean.dtype == DType::kF32 && rstd.dtype == DType::kF32, "layernorm: statistics are fp32");
  require(has_uniform_rows(in) && has_uniform_rows(out), "layernorm: rows of a view must have one stride");
}

void check_layernorm_summands(const Tensor& residual, const Tensor& a, const Tensor& b) {
  for (const Tensor& t : {a, b}) {
    require(same_rows(t, residual) && t.dtype == residual.dtype, "layernorm: summands differ");
    require(has_uniform_rows(t), "layernorm: rows of a view must have one stride");
  }
}

void check_layernorm_backward(const Tensor& din, const Tensor& dweight, const Tensor& dbias, const Tensor& dout,
                              const Tensor& in, const Tensor& mean, const Tensor& rstd, const Tensor& weight) {
  check_layernorm_forward(dout, mean, rstd, in, weight, weight);
  require(same_rows(din, in) && din.dtype == in.dtype && has_uniform_rows(din), "layernorm: din");
  require_elements(dweight, in.cols(), "layernorm: length of dweight");
  require_elements(dbias, in.cols(), "layernorm: length of dbias");
  require(dweight.dtype == dbias.dtype, "layernorm: dweight and dbias have one dtype");
}

void check_bias_backward(const Tensor& dbias, const Tensor& dout) {
  require_elements(dbias, dout.cols(), "bias_backward: length of dbias");
  require(has_uniform_rows(dout), "bias_backward: rows of a view must have one stride");
  require(is_floating(dbias) && is_floating(dout), "bias_backward: fp32 or bf16");
}

void check_gelu_backward(const Tensor& d, const Tensor& dbias, const Tensor& in) {
  check_bias_backward(dbias, d);
  require(d.dtype == in.dtype, "gelu_backward: one dtype");
  require(d.rows() == in.rows() && d.cols() == in.cols() && has_uniform_rows(in), "gelu_backward: sizes differ");
}

void check_projection(const Tensor& projection, ProjectionKind kind) {
  require(projection.rank == 2 && projection.contiguous(), "generate_projection: a contiguous matrix");
  require(kind != ProjectionKind::kCosine || projection.rows() <= projection.cols(),
          "generate_projection: at most as many rows as columns");
}

void check_factored_second_moment(const Tensor& row_state, const Tensor& col_state, const Tensor& row_scale,
                                  const Tensor& col_scale, const Tensor& grad) {
  const int64_t rows = grad.rows(), cols = grad.cols();
  require(row_state.elements() == rows && row_scale.elements() == rows && col_state.elements() == cols &&
              col_scale.elements() == cols && has_uniform_rows(grad),
          "factored_second_moment: shapes differ");
}

void check_factored_squares(const Tensor& row_squares, const Tensor& col_squares, const Tensor& grad) {
  require(is_matrix(grad), "factored_squares: an fp32 or bf16 matrix that is not empty");
  require(row_squares.dtype == DType::kF32 && col_squares.dtype == DType::kF32, "factored_squares: sums are fp32");
  require_elements(row_squares, grad.rows(), "factored_squares: one number per row");
  require_elements(col_squares, grad.cols(), "factored_squares: one number per column");
}

void check_factored_scales(const Tensor& row_state, const Tensor& col_state, const Tensor& row_scale,
                           const Tensor& col_scale) {
  for (const Tensor& t : {row_state, col_state, row_scale, col_scale})
    require(t.dtype == DType::kF32 && t.contiguous() && t.elements() > 0, "factored_scales: fp32 vectors");
  require(row_state.elements() == row_scale.elements() && col_state.elements() == col_scale.elements(),
          "factored_scales: shapes differ");
}

void check_scaled_sum(const ScaledSum& sum) {
  const int64_t rows = sum.in.rows(), cols = sum.in.cols();
  const auto fits = [&](const Tensor& t) { return t.rows() == rows && t.cols() == cols && has_uniform_rows(t); };
  require(fits(sum.in) && fits(sum.out) && (sum.added.empty() || fits(sum.added)) &&
              (sum.row_scale.empty() || sum.row_scale.elements() == rows) &&
              (sum.col_scale.empty() || sum.col_scale.elements() == cols),
          "scale_rows_cols: shapes differ");
}

void check_scaled_projection(const ScaledProjection& projection, const Tensor& grad) {
  check_projection(projection.plain, projection.kind);
  check_projection(projection.scaled, projection.kind);
  require(projection.plain.rows() == projection.scaled.rows() &&
              projection.plain.cols() == (projection.of_rows ? grad.rows() : grad.cols()) &&
              projection.scaled.cols() == projection.plain.cols() && projection.plain.dtype == projection.scaled.dtype,
          "factored_second_moment: the projection has another shape than the scales");
}

namespace {

// `whole` [d, m] or [n, d] and `projected` [r, m] or [n, r] belong to the projection.
void check_cosine_projection(const Tensor& whole, const Tensor& projected, const CosineProjection& p) {
  const int64_t dimension = p.of_rows ? whole.rows() : whole.cols();
  require(is_matrix(whole) && is_matrix(projected) && has_uniform_rows(whole) && has_uniform_rows(projected),
          "cosine projection: matrices in fp32 or bf16");
  require(p.rank > 0 && p.rank <= dimension && (p.of_rows ? projected.rows() : projected.cols()) == p.rank &&
              (p.of_rows ? projected.cols() == whole.cols() : projected.rows() == whole.rows()),
          "cosine projection: shapes differ");
}

}  // namespace

void check_cosine_down(const Tensor& out, const Tensor& in, const Tensor& scale, const CosineProjection& projection) {
  check_cosine_projection(in, out, projection);
  require(scale.empty() || (scale.dtype == DType::kF32 && scale.contiguous() &&
                            scale.elements() == (projection.of_rows ? in.rows() : in.cols())),
          "cosine_down: one scale for each column of the projection");
}

void check_cosine_up(const ScaledSum& sum, const Tensor& in, const CosineProjection& projection) {
  check_cosine_projection(sum.out, in, projection);
  check_scaled_sum({sum.out, sum.out, sum.row_scale, sum.col_scale});
  require((sum.in.empty() || (sum.in.data == sum.out.data && sum.in.dtype == sum.out.dtype)) && sum.added.empty(),
          "cosine_up: what is scaled is the result's old value");
}

void check_average(const MomentumAverage& average) {
  check_state(average.momentum, average.in);
  check_scaled_sum({average.in, average.in, average.row_scale, average.col_scale});
}

void check_parameter(const ParameterUpdate& p) {
  check_update(p.weight, p.master, p.grad, p.momentum, p.second_moment);
}

double total_bytes(std::span<const Tensor> tensors) {
  size_t bytes = 0;
  for (const Tensor& t : tensors) bytes += t.bytes();
  return static_cast<double>(bytes);
}

void check_quantize(const Tensor& out, const Tensor& in) {
  require(out.dtype == DType::kI8 || out.dtype == DType::kU8, "quantize: the result is int8 or uint8");
  require(in.dtype == DType::kF32, "quantize: the input is fp32");
  require_elements(in, out.elements(), "quantize: sizes differ");
}

void check_dequantize(const Tensor& out, const Tensor& in) {
  require(is_floating(out), "dequantize: the result is fp32 or bf16");
  require_elements(out, in.elements(), "dequantize: sizes differ");
}

void check_quantize_weight(const Tensor& out, const Tensor& in) {
  require(out.dtype == DType::kI8 && out.scales && out.contiguous(), "quantize_weight: int8 with scales");
  require(in.dtype == DType::kF32, "quantize_weight: the input is fp32");
  require_elements(in, out.elements(), "quantize_weight: sizes differ");
}

void check_dequantize_weight(const Tensor& out, const Tensor& in) {
  require(in.dtype == DType::kI8 && in.scales && in.contiguous(), "dequantize_weight: int8 with scales");
  require(is_floating(out), "dequantize_weight: the result is fp32 or bf16");
  require_elements(out, in.elements(), "dequantize_weight: sizes differ");
}

void check_state(const Tensor& state, const Tensor& grad) {
  require_elements(state, grad.elements(), "update: sizes of gradient and state differ");
  require(grad.contiguous(), "update: the gradient must be contiguous");
}

void check_update(const Tensor& weight, const Tensor& master, const Tensor& grad, const Tensor& m, const Tensor& v) {
  require_elements(weight, grad.elements(), "update: sizes of weight and gradient differ");
  require(grad.contiguous(), "update: the gradient must be contiguous");
  require(master.empty() || (master.dtype == DType::kF32 && master.elements() == weight.elements()),
          "update: the master copy is fp32 and as large as the weight");
  for (const Tensor& state : {m, v})
    if (!state.empty()) check_state(state, grad);
}

void check_apply_update(const Tensor& weight, const Tensor& master, const Tensor& update, const ApplyOptions& options,
                        const float* weight_squares) {
  check_update(weight, master, update);
  require(!options.scale_parameter || weight_squares, "apply_update: scale_parameter needs the sum of squares");
}

double update_bytes(const Tensor& weight, const Tensor& master, const Tensor& grad, const Tensor& m, const Tensor& v) {
  size_t bytes = grad.bytes();
  for (const Tensor& t : {weight, master, m, v}) bytes += t.empty() ? 0 : 2 * t.bytes();
  return static_cast<double>(bytes);
}

double update_bytes(std::span<const ParameterUpdate> parameters) {
  double bytes = 0;
  for (const ParameterUpdate& p : parameters)
    bytes += update_bytes(p.weight, p.master, p.grad, p.momentum, p.second_moment);
  return bytes;
}

double embedding_backward_bytes(const Tensor& dwte, bool accumulate_wte, const Tensor& dwpe, const Tensor& dout) {
  double bytes = 0;
  if (dwte)
    bytes += 2.0 * static_cast<double>(dout.bytes()) + (accumulate_wte ? 0.0 : static_cast<double>(dwte.bytes()));
  if (dwpe) bytes += static_cast<double>(dout.bytes());
  return bytes;
}
