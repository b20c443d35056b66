// test_operands.cpp: the checks that every backend makes of an operation's tensors: what fits passes, and what differs
// in one thing is refused.
#include "kernels/operands.h"

#include <gtest/gtest.h>

#include <stdexcept>

namespace {

constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16, kI8 = DType::kI8, kU8 = DType::kU8, kI32 = DType::kI32;

// Checks look at shapes, not at numbers.
Tensor tensor(std::initializer_list<int64_t> shape, DType dtype = kF32) {
  static float memory;
  return Tensor::of(&memory, dtype, shape);
}

// The same with a gap after each row: not contiguous, but rows have one stride.
Tensor strided(std::initializer_list<int64_t> shape, DType dtype = kF32) {
  Tensor t = tensor(shape, dtype);
  for (int i = 0; i + 1 < t.rank; ++i) t.stride[i] *= 2;
  return t;
}

#define EXPECT_REFUSED(check) EXPECT_THROW(check, std::logic_error)

TEST(Operands, Matmul) {
  const Tensor out = tensor({4, 7}), a = tensor({4, 5}), b = tensor({5, 7});
  const MatmulShape shape = check_matmul(out, a, b, {.bias = tensor({7})});
  EXPECT_EQ(shape.m, 4);
  EXPECT_EQ(shape.n, 7);
  EXPECT_EQ(shape.k, 5);
  EXPECT_EQ(check_matmul(out, tensor({5, 4}), tensor({7, 5}), {.transpose_a = true, .transpose_b = true}).k, 5);
  EXPECT_EQ(check_matmul(strided({4, 7}), strided({4, 5}), strided({5, 7}), {}).k, 5);
  EXPECT_REFUSED(check_matmul(tensor({3, 7}), a, b, {}));
  EXPECT_REFUSED(check_matmul(tensor({4, 6}), a, b, {}));
  EXPECT_REFUSED(check_matmul(out, tensor({4, 6}), b, {}));
  EXPECT_REFUSED(check_matmul(out, a, b, {.transpose_a = true}));
  EXPECT_REFUSED(check_matmul(out, a, b, {.transpose_b = true}));
  EXPECT_REFUSED(check_matmul(out, tensor({4, 5}, kI32), b, {}));
  EXPECT_REFUSED(check_matmul(tensor({4, 7}), tensor({4, 0}), tensor({0, 7}), {}));
  EXPECT_REFUSED(check_matmul(out, a, b, {.bias = tensor({4})}));
}

TEST(Operands, Attention) {
  const Tensor out = tensor({2, 5, 12}), lse = tensor({2, 3, 5}), qkv = tensor({2, 5, 36});
  const AttentionShape shape = check_attention_forward(out, lse, qkv, 3);
  EXPECT_EQ(shape.head_dim, 4);
  EXPECT_EQ(shape.token_heads(), 30);
  for (int heads : {0, -3, 5}) EXPECT_REFUSED(check_attention_forward(out, lse, qkv, heads)) << heads;
  EXPECT_REFUSED(check_attention_forward(tensor({10, 12}), lse, qkv, 3));
  EXPECT_REFUSED(check_attention_forward(strided({2, 5, 12}), lse, qkv, 3));
  EXPECT_REFUSED(check_attention_forward(out, tensor({2, 5}), qkv, 3));
  EXPECT_REFUSED(check_attention_forward(out, tensor({2, 3, 5}, kBF16), qkv, 3));
  EXPECT_REFUSED(check_attention_forward(out, strided({2, 3, 5}), qkv, 3));
  EXPECT_REFUSED(check_attention_forward(out, lse, out, 3));

  const AttentionShape last = check_attention_decode(tensor({6}), tensor({5, 18}), 3);
  EXPECT_EQ(last.batch, 1);
  EXPECT_EQ(last.sequence, 5);
  EXPECT_EQ(last.head_dim, 2);
  for (int heads : {0, -3, 4}) EXPECT_REFUSED(check_attention_decode(tensor({6}), tensor({5, 18}), heads)) << heads;
  EXPECT_REFUSED(check_attention_decode(tensor({6}), tensor({5, 6}), 3));
  EXPECT_REFUSED(check_attention_decode(tensor({6}), strided({5, 18}), 3));

  const Tensor bias = tensor({36}, kBF16);
  EXPECT_EQ(check_attention_backward(qkv, bias, out, out, lse, qkv, 3).heads, 3);
  EXPECT_REFUSED(check_attention_backward(out, bias, out, out, lse, qkv, 3));
  EXPECT_REFUSED(check_attention_backward(qkv, bias, qkv, out, lse, qkv, 3));
  EXPECT_REFUSED(check_attention_backward(qkv, bias, tensor({2, 5, 12}, kBF16), out, lse, qkv, 3));
  EXPECT_REFUSED(check_attention_backward(qkv, tensor({12}), out, out, lse, qkv, 3));
  EXPECT_REFUSED(check_attention_backward(qkv, tensor({36}, kI32), out, out, lse, qkv, 3));
}

TEST(Operands, Classifier) {
  const Tensor losses = tensor({4}), logits = strided({4, 9}), targets = tensor({4}, kI32);
  EXPECT_NO_THROW(check_classifier(losses, logits, targets, 9));
  for (int64_t vocabulary : {0, 10}) EXPECT_REFUSED(check_classifier(losses, logits, targets, vocabulary));
  EXPECT_REFUSED(check_classifier(tensor({4}, kBF16), logits, targets, 9));
  EXPECT_REFUSED(check_classifier(losses, logits, losses, 9));
  EXPECT_REFUSED(check_classifier(tensor({3}), logits, targets, 9));
  EXPECT_REFUSED(check_classifier(losses, logits, tensor({5}, kI32), 9));
  EXPECT_NO_THROW(check_classifier(losses, logits, targets, 9, losses));
  EXPECT_REFUSED(check_classifier(losses, logits, targets, 9, tensor({5})));
  EXPECT_REFUSED(check_classifier(losses, logits, targets, 9, targets));

  const Tensor lse = losses, columns = strided({4, 3});
  EXPECT_NO_THROW(check_classifier_gradient(columns, targets, lse, 8, 9));
  EXPECT_NO_THROW(check_classifier_gradient(columns, targets, lse, 9, 9));
  EXPECT_REFUSED(check_classifier_gradient(columns, targets, lse, -1, 9));
  EXPECT_REFUSED(check_classifier_gradient(columns, targets, lse, 0, 0));
  EXPECT_REFUSED(check_classifier_gradient(tensor({5, 3}), targets, lse, 0, 9));
  EXPECT_REFUSED(check_classifier_gradient(tensor({4, 3}, kI32), targets, lse, 0, 9));
  EXPECT_REFUSED(check_classifier_gradient(columns, lse, lse, 0, 9));
  EXPECT_REFUSED(check_classifier_gradient(columns, targets, tensor({4}, kBF16), 0, 9));
}

TEST(Operands, Embedding) {
  const Tensor out = tensor({2, 5, 8}), tokens = tensor({2, 5}, kI32), wte = tensor({100, 8}), wpe = tensor({5, 8});
  EXPECT_NO_THROW(check_embedding_forward(out, tokens, wte, wpe));
  EXPECT_REFUSED(check_embedding_forward(out, tensor({2, 5}), wte, wpe));
  EXPECT_REFUSED(check_embedding_forward(out, tensor({10}, kI32), wte, wpe));
  EXPECT_NO_THROW(check_embedding_forward(out, tokens, tensor({100, 8}, kBF16), tensor({5, 8}, kBF16)));
  EXPECT_REFUSED(check_embedding_forward(out, tokens, wte, tensor({5, 8}, kBF16)));
  EXPECT_REFUSED(check_embedding_forward(out, tokens, wte, tensor({4, 8})));
  EXPECT_REFUSED(check_embedding_forward(out, tokens, tensor({100, 9}), wpe));
  EXPECT_REFUSED(check_embedding_forward(tensor({2, 4, 8}), tokens, wte, wpe));

  const TokenGroups groups = {tensor({10}, kI32), tensor({11}, kI32), tensor({10}, kI32)};
  EXPECT_NO_THROW(check_embedding_backward(wte, wpe, out, groups));
  EXPECT_REFUSED(check_embedding_backward(wte, wpe, tensor({10, 8}), groups));
  EXPECT_REFUSED(check_embedding_backward(tensor({100, 9}), wpe, out, groups));
  EXPECT_REFUSED(check_embedding_backward(wte, tensor({4, 8}), out, groups));
  EXPECT_REFUSED(check_embedding_backward(wte, wpe, tensor({2, 4, 8}), groups));
  EXPECT_NO_THROW(check_embedding_backward(strided({3, 8}), {}, out, groups, 99));
  EXPECT_NO_THROW(check_embedding_backward({}, wpe, out, groups));
  EXPECT_REFUSED(check_embedding_backward({}, {}, out, groups));
  EXPECT_REFUSED(check_embedding_backward(wte, wpe, out, groups, -1));
}

TEST(Operands, LayerNorm) {
  const Tensor x = strided({2, 5, 8}), rows = tensor({10}), weight = tensor({8});
  EXPECT_NO_THROW(check_layernorm_forward(x, rows, rows, x, weight, weight));
  EXPECT_REFUSED(check_layernorm_forward(tensor({2, 5, 7}), rows, rows, x, weight, weight));
  EXPECT_REFUSED(check_layernorm_forward(x, tensor({5}), rows, x, weight, weight));
  EXPECT_REFUSED(check_layernorm_forward(x, rows, tensor({10}, kBF16), x, weight, weight));
  EXPECT_REFUSED(check_layernorm_forward(x, rows, rows, x, tensor({10}), weight));
  EXPECT_REFUSED(check_layernorm_forward(x, rows, rows, x, weight, tensor({10})));
  EXPECT_REFUSED(check_layernorm_forward(x, rows, rows, x, weight, tensor({8}, kBF16)));
  EXPECT_NO_THROW(check_layernorm_forward(x, rows, rows, x, tensor({8}, kBF16), tensor({8}, kBF16)));
  EXPECT_REFUSED(check_layernorm_forward(tensor({10, 8}, kBF16), rows, rows, x, weight, weight));

  EXPECT_NO_THROW(check_layernorm_summands(x, x, tensor({10, 8})));
  EXPECT_REFUSED(check_layernorm_summands(x, tensor({8, 10}), x));
  EXPECT_REFUSED(check_layernorm_summands(x, x, tensor({10, 8}, kBF16)));

  EXPECT_NO_THROW(check_layernorm_backward(x, weight, weight, x, x, rows, rows, weight));
  EXPECT_REFUSED(check_layernorm_backward(tensor({2, 5, 7}), weight, weight, x, x, rows, rows, weight));
  EXPECT_REFUSED(check_layernorm_backward(tensor({10, 8}, kBF16), weight, weight, x, x, rows, rows, weight));
  EXPECT_REFUSED(check_layernorm_backward(x, weight, weight, tensor({10, 8}, kBF16), x, rows, rows, weight));
  EXPECT_REFUSED(check_layernorm_backward(x, tensor({10}), weight, x, x, rows, rows, weight));
  EXPECT_REFUSED(check_layernorm_backward(x, weight, tensor({10}), x, x, rows, rows, weight));
  EXPECT_REFUSED(check_layernorm_backward(x, weight, tensor({8}, kBF16), x, x, rows, rows, weight));
}

TEST(Operands, BiasBackward) {
  EXPECT_NO_THROW(check_bias_backward(tensor({8}, kBF16), strided({10, 8})));
  EXPECT_REFUSED(check_bias_backward(tensor({10}), tensor({10, 8})));
  EXPECT_REFUSED(check_bias_backward(tensor({8}, kI32), tensor({10, 8})));
}

TEST(Operands, Projections) {
  EXPECT_NO_THROW(check_projection(tensor({5, 3}), ProjectionKind::kGaussian));
  EXPECT_NO_THROW(check_projection(tensor({3, 3}), ProjectionKind::kCosine));
  EXPECT_REFUSED(check_projection(tensor({5, 3}), ProjectionKind::kCosine));
  EXPECT_REFUSED(check_projection(strided({5, 3}), ProjectionKind::kGaussian));
  EXPECT_REFUSED(check_projection(tensor({15}), ProjectionKind::kGaussian));
}

TEST(Operands, RowsAndColumns) {
  const Tensor x = strided({5, 8}), rows = tensor({5}), cols = tensor({8});
  EXPECT_NO_THROW(check_factored_second_moment(rows, cols, rows, cols, x));
  EXPECT_REFUSED(check_factored_second_moment(cols, cols, rows, cols, x));
  EXPECT_REFUSED(check_factored_second_moment(rows, rows, rows, cols, x));
  EXPECT_REFUSED(check_factored_second_moment(rows, cols, cols, cols, x));
  EXPECT_REFUSED(check_factored_second_moment(rows, cols, rows, rows, x));
  EXPECT_NO_THROW(check_factored_squares(rows, cols, x));
  EXPECT_REFUSED(check_factored_squares(cols, cols, x));
  EXPECT_REFUSED(check_factored_squares(rows, rows, x));
  EXPECT_REFUSED(check_factored_squares(rows, cols, tensor({0, 8})));
  EXPECT_NO_THROW(check_factored_scales(rows, cols, rows, cols));
  EXPECT_REFUSED(check_factored_scales(cols, cols, rows, cols));
  EXPECT_REFUSED(check_factored_scales(rows, cols, rows, rows));
  EXPECT_REFUSED(check_factored_scales(tensor({rows.elements()}, kBF16), cols, rows, cols));
  EXPECT_NO_THROW(check_scaled_sum({x, x, rows, cols}));
  EXPECT_NO_THROW(check_scaled_sum({x, x}));
  EXPECT_REFUSED(check_scaled_sum({tensor({8, 5}), x, rows, cols}));
  EXPECT_REFUSED(check_scaled_sum({x, x, cols}));
  EXPECT_REFUSED(check_scaled_sum({x, x, {}, rows}));
}

TEST(Operands, EightBitWeights) {
  const Tensor x = tensor({300}), narrow = tensor({300}, kBF16);
  static float scales[2];
  Tensor codes = tensor({300}, kI8);
  EXPECT_REFUSED(check_quantize_weight(codes, x));  // no scales
  EXPECT_REFUSED(check_dequantize_weight(x, codes));
  codes.scales = scales;
  EXPECT_NO_THROW(check_quantize_weight(codes, x));
  EXPECT_REFUSED(check_quantize_weight(codes, narrow));
  EXPECT_REFUSED(check_quantize_weight(codes, tensor({299})));
  EXPECT_REFUSED(check_quantize_weight(x, x));
  for (const Tensor& out : {x, narrow}) EXPECT_NO_THROW(check_dequantize_weight(out, codes));
  EXPECT_REFUSED(check_dequantize_weight(strided({20, 15}), codes));
  EXPECT_REFUSED(check_dequantize_weight(x, narrow));
}

TEST(Operands, EightBitStates) {
  const Tensor x = tensor({300});
  for (DType dtype : {kI8, kU8}) {
    EXPECT_NO_THROW(check_quantize(tensor({300}, dtype), x));
    EXPECT_NO_THROW(check_dequantize(tensor({300}, kBF16), tensor({300}, dtype)));
  }
  EXPECT_REFUSED(check_quantize(x, x));
  EXPECT_REFUSED(check_quantize(tensor({300}, kI8), tensor({300}, kBF16)));
  EXPECT_REFUSED(check_quantize(tensor({299}, kI8), x));
  EXPECT_REFUSED(check_dequantize(tensor({300}, kU8), tensor({300}, kI8)));
  EXPECT_REFUSED(check_dequantize(tensor({299}), tensor({300}, kI8)));
}

TEST(Operands, Updates) {
  const Tensor w = tensor({4, 5}, kBF16), g = tensor({20}), master = tensor({4, 5}), state = tensor({20}, kI8);
  EXPECT_NO_THROW(check_update(w, master, g, state, state));
  EXPECT_NO_THROW(check_update(w, {}, g));
  EXPECT_REFUSED(check_update(tensor({21}), {}, g));
  EXPECT_REFUSED(check_update(w, {}, strided({4, 5})));
  EXPECT_REFUSED(check_update(w, w, g));
  EXPECT_REFUSED(check_update(w, tensor({21}), g));
  EXPECT_REFUSED(check_update(w, {}, g, tensor({21})));
  EXPECT_REFUSED(check_update(w, {}, g, {}, tensor({21})));
  EXPECT_REFUSED(check_state(tensor({21}), g));
  EXPECT_REFUSED(check_state(strided({4, 5}), g));

  const float squares = 1;
  EXPECT_NO_THROW(check_apply_update(w, {}, g, {.scale_parameter = true}, &squares));
  EXPECT_NO_THROW(check_apply_update(w, {}, g, {}, nullptr));
  EXPECT_REFUSED(check_apply_update(w, {}, g, {.scale_parameter = true}, nullptr));
}

// The gradient is read, everything else read and written.
TEST(Operands, UpdateBytes) {
  const Tensor w = tensor({20}, kBF16), g = tensor({20}), master = tensor({20}), state = tensor({20}, kI8);
  EXPECT_EQ(update_bytes(w, {}, g), 20 * (4 + 2 * 2));
  EXPECT_EQ(update_bytes(w, master, g, state, state), 20 * (4 + 2 * (2 + 4 + 1 + 1)));
}

}  // namespace
