// backward.cpp: the backward pass, last block first. In every linear layer the gradient of the input is computed
// before the weight's gradient is handed over, because the weight may be updated at once.
#include "model/gpt2.h"

// d_input = d_output W^T, dW = input^T d_output.
void Gpt2::product_backward(GradientSink& sink, const Parameter& weight_parameter, Tensor d_input, Tensor input,
                            Tensor d_output) {
  backend_.matmul(d_input, d_output, weight(weight_parameter), {.transpose_b = true});
  sink.from_rows(weight_parameter, [&](Tensor out, int64_t begin, bool accumulate) {
    backend_.matmul(out, input.columns(begin, out.rows()), d_output, {.transpose_a = true, .accumulate = accumulate});
  });
}

// The same with a bias: db = column sums of d_output.
void Gpt2::linear_backward(GradientSink& sink, const Parameter& weight_parameter, const Parameter& bias_parameter,
                           Tensor d_input, Tensor input, Tensor d_output) {
  product_backward(sink, weight_parameter, d_input, input, d_output);
  const GradientSink::Target d_bias = sink.target(bias_parameter);
  backend_.bias_backward(d_bias.tensor, d_output, d_bias.accumulate);
  sink.ready(bias_parameter);
}

// Adds to d_residual; both parameters of a LayerNorm get their gradients in one pass, so both are open at a time.
void Gpt2::norm_backward(GradientSink& sink, const Parameter& weight_parameter, const Parameter& bias_parameter,
                         Tensor d_out, Tensor in, Tensor mean, Tensor rstd) {
  const GradientSink::Target d_weight = sink.target(weight_parameter);
  const GradientSink::Target d_bias = sink.target(bias_parameter);
  backend_.layernorm_backward(activations_.d_residual, d_weight.tensor, d_bias.tensor, d_weight.accumulate, d_out, in,
                              mean, rstd, weight(weight_parameter));
  sink.ready(weight_parameter);
  sink.ready(bias_parameter);
}

// Brings back what the recompute level did not keep, by the same kernels on the same rounded inputs as in the forward
// pass.
void Gpt2::recompute_block(int64_t index) {
  const Gpt2Layer layer(store_.parameters(), index);
  const LayerActivations a = activations_.layer(index);
  const auto gone = [&](Tensor LayerActivations::*buffer) { return !activations_.keeps(buffer); };
  if (gone(&LayerActivations::ln1))
    backend_.layernorm_forward(a.ln1, a.mean1, a.rstd1, a.x, weight(layer.ln1_weight), weight(layer.ln1_bias));
  if (gone(&LayerActivations::qkv)) {  // and all that follows
    attention_branch(index, a);
    mlp_hidden(index, a);
    return;
  }
  if (gone(&LayerActivations::att)) backend_.attention_forward(a.att, a.lse, a.qkv, static_cast<int>(config_.heads));
  if (gone(&LayerActivations::ln2))
    backend_.layernorm_forward(a.ln2, a.mean2, a.rstd2, a.x2, weight(layer.ln2_weight), weight(layer.ln2_bias));
  if (gone(&LayerActivations::gelu)) backend_.gelu_forward(a.gelu, a.fch);
}

void Gpt2::backward_block(int64_t index, GradientSink& sink) {
  const Gpt2Layer layer(store_.parameters(), index);
  const LayerActivations a = activations_.layer(index);
  const Tensor d_residual = activations_.d_residual, d_wide = activations_.d_wide, d_qkv = activations_.d_qkv;
  const Tensor d_branch = activations_.branch;

  linear_backward(sink, layer.mlp_proj_weight, layer.mlp_proj_bias, d_wide, a.gelu, d_residual);
  const GradientSink::Target d_fc_bias = sink.target(layer.fc_bias);
  backend_.gelu_backward(d_wide, d_fc_bias.tensor, a.fch, d_fc_bias.accumulate);
  product_backward(sink, layer.fc_weight, d_branch, a.ln2, d_wide);
  sink.ready(layer.fc_bias);
  norm_backward(sink, layer.ln2_weight, layer.ln2_bias, d_branch, a.x2, a.mean2, a.rstd2);

  linear_backward(sink, layer.proj_weight, layer.proj_bias, d_branch, a.att, d_residual);
  const GradientSink::Target d_qkv_bias = sink.target(layer.qkv_bias);
  backend_.attention_backward(d_qkv, d_qkv_bias.tensor, d_branch, a.att, a.lse, a.qkv, static_cast<int>(config_.heads),
                              d_qkv_bias.accumulate);
  product_backward(sink, layer.qkv_weight, d_branch, a.ln1, d_qkv);
  sink.ready(layer.qkv_bias);
  norm_backward(sink, layer.ln1_weight, layer.ln1_bias, d_branch, a.x, a.mean1, a.rstd1);
}

void Gpt2::backward(GradientSink& sink) {
  store_.acquire(-1);
  // An untied head has had all its gradient; only now has the gate seen the loss.
  if (!config_.tied_head) {
    const Parameter& head = head_parameter();
    if (sink.wants_blocks(head)) {
      sink.from_rows(head, [&](Tensor out, int64_t begin, bool add) { head_gradient_rows(out, begin, add); });
    } else {
      sink.ready(head);
    }
  }
  backend_.fill(activations_.d_residual.data, 0, activations_.d_residual.bytes());
  activations_.acquire(config_.layers, Access::kRead);
  norm_backward(sink, parameter("ln_f.weight"), parameter("ln_f.bias"), activations_.branch,
                activations_.residual(config_.layers), activations_.final_mean, activations_.final_rstd);
  activations_.release(config_.layers, false);
  for (int64_t l = config_.layers - 1; l >= 0; --l) {
    store_.acquire(static_cast<int>(l));
    activations_.acquire(l, Access::kRead);
    recompute_block(l);
    backward_block(l, sink);
    activations_.release(l, false);
    store_.release(static_cast<int>(l), false);
  }
  embeddings_backward(sink);
  store_.release(-1, false);
}

// The tied embedding got the head's gradient first and gets the lookup's last; only now is it complete. In blocks it
// gets both now.
void Gpt2::embeddings_backward(GradientSink& sink) {
  const Parameter& wte = parameter("wte.weight");
  const Parameter& wpe = parameter("wpe.weight");
  const Tensor d_residual = activations_.d_residual;
  const GradientSink::Target d_wpe = sink.target(wpe);
  if (!sink.wants_blocks(wte)) {
    const GradientSink::Target d_wte = sink.target(wte);
    backend_.embedding_backward(d_wte.tensor, d_wte.accumulate, d_wpe.tensor, d_wpe.accumulate, d_residual, groups_);
    sink.ready(wte);
    sink.ready(wpe);
    return;
  }
  backend_.embedding_backward({}, false, d_wpe.tensor, d_wpe.accumulate, d_residual, groups_);
  sink.ready(wpe);
  sink.from_rows(wte, [&](Tensor out, int64_t begin, bool accumulate) {
    if (config_.tied_head) head_gradient_rows(out, begin, accumulate);
    backend_.embedding_backward(out, accumulate || config_.tied_head, {}, false, d_residual, groups_, begin);
  });
}
