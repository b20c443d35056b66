// operands.h: what the operations of backend.h demand of their tensors, checked in the same way by every backend. Each
// check throws std::logic_error (a bug of the caller) that says what does not fit; limits of one device are its own.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/dispatch.h"
#include "kernels/tensor.h"

inline bool is_floating(const Tensor& t) { return t.dtype == DType::kF32 || t.dtype == DType::kBF16; }

// `tensor` is contiguous and has `elements` elements.
inline void require_elements(const Tensor& tensor, int64_t elements, const char* what) {
  require(tensor.elements() == elements && tensor.contiguous(), what);
}

struct MatmulShape {
  int64_t m = 0, n = 0, k = 0;
};
MatmulShape check_matmul(const Tensor& out, const Tensor& a, const Tensor& b, const MatmulOptions& options);

struct AttentionShape {
  int64_t batch = 0, sequence = 0, channels = 0, heads = 0, head_dim = 0;
  int64_t token_heads() const { return batch * sequence * heads; }
  // Operations of one product of all queries with the keys they see, and of the last query alone.
  double score_flops() const {
    return static_cast<double>(batch * sequence) * static_cast<double>((sequence + 1) * channels);
  }
  double last_query_flops() const { return 2.0 * static_cast<double>(sequence * channels); }
};
AttentionShape check_attention_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, int heads);
AttentionShape check_attention_decode(const Tensor& out, const Tensor& qkv, int heads);
// Bytes that attention_decode() must move: all keys and values, one query, one row of the result.
double last_query_bytes(const Tensor& out, const Tensor& qkv);
AttentionShape check_attention_backward(const Tensor& dqkv, const Tensor& dbias, const Tensor& dout, const Tensor& out,
                                        const Tensor& lse, const Tensor& qkv, int heads);

void check_classifier(const Tensor& losses, const Tensor& logits, const Tensor& targets, int64_t vocabulary,
                      const Tensor& lse = {});
void check_classifier_gradient(const Tensor& logits, const Tensor& targets, const Tensor& lse, int64_t first,
                               int64_t vocabulary);
void check_embedding_forward(const Tensor& out, const Tensor& tokens, const Tensor& wte, const Tensor& wpe);
void check_embedding_backward(const Tensor& dwte, const Tensor& dwpe, const Tensor& dout, const TokenGroups& groups,
                              int64_t first_row = 0);
void check_layernorm_forward(const Tensor& out, const Tensor& mean, const Tensor& rstd, const Tensor& in,
                             const Tensor& weight, const Tensor& bias);
void check_layernorm_summands(const Tensor& residual, const Tensor& a, const Tensor& b);
void check_layernorm_backward(const Tensor& din, const Tensor& dweight, const Tensor& dbias, const Tensor& dout,
                              const Tensor& in, const Tensor& mean, const Tensor& rstd, const Tensor& weight);
void check_bias_backward(const Tensor& dbias, const Tensor& dout);
void check_gelu_backward(const Tensor& d, const Tensor& dbias, const Tensor& in);

void check_projection(const Tensor& projection, ProjectionKind kind);
void check_factored_second_moment(const Tensor& row_state, const Tensor& col_state, const Tensor& row_scale,
                                  const Tensor& col_scale, const Tensor& grad);
void check_factored_squares(const Tensor& row_squares, const Tensor& col_squares, const Tensor& grad);
void check_factored_scales(const Tensor& row_state, const Tensor& col_state, const Tensor& row_scale,
                           const Tensor& col_scale);
void check_scaled_sum(const ScaledSum& sum);
void check_quantize(const Tensor& out, const Tensor& in);
void check_dequantize(const Tensor& out, const Tensor& in);
void check_quantize_weight(const Tensor& out, const Tensor& in);
void check_dequantize_weight(const Tensor& out, const Tensor& in);
void check_scaled_projection(const ScaledProjection& projection, const Tensor& grad);
void check_cosine_down(const Tensor& out, const Tensor& in, const Tensor& scale, const CosineProjection& projection);
void check_cosine_up(const ScaledSum& sum, const Tensor& in, const CosineProjection& projection);
void check_average(const MomentumAverage& average);
// Elementwise work on a gradient (or what is added) and a state of the same length, both contiguous.
void check_state(const Tensor& state, const Tensor& grad);
// Of the operations that change weights; m and v may be empty.
void check_update(const Tensor& weight, const Tensor& master, const Tensor& grad, const Tensor& m = {},
                  const Tensor& v = {});
void check_apply_update(const Tensor& weight, const Tensor& master, const Tensor& update, const ApplyOptions& options,
                        const float* weight_squares);
void check_parameter(const ParameterUpdate& parameter);

double total_bytes(std::span<const Tensor> tensors);
// Bytes that the backward pass of the embedding must move: dout once or twice, each row of dwte that it touches, and
// the whole of it where it is set to 0 first.
double embedding_backward_bytes(const Tensor& dwte, bool accumulate_wte, const Tensor& dwpe, const Tensor& dout);
// Bytes that an operation which changes weights must move: the gradient is read, everything else read and written.
double update_bytes(const Tensor& weight, const Tensor& master, const Tensor& grad, const Tensor& m = {},
                    const Tensor& v = {});
double update_bytes(std::span<const ParameterUpdate> parameters);
