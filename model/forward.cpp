// forward.cpp: what a pass over the model is made of: batch, forward, head, and initialization. The backward pass is in
// backward.cpp.
#include "model/gpt2.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

Gpt2::Gpt2(const Gpt2Config& config, const ActivationShapes& shapes, ParameterStore& store, Backend& backend)
    : config_(config), shapes_(shapes), store_(store), backend_(backend), activations_(config, shapes, backend) {
  if (shapes.sequence > config.positions) throw std::logic_error("the sequence is longer than the model's positions");
}

// Inputs and targets, for training the three parts of the token groups, too.
int64_t Gpt2::batch_elements(int64_t tokens) const { return shapes_.training ? 5 * tokens + 1 : 2 * tokens; }

void Gpt2::declare(MemoryPlan& plan) {
  activations_.declare(plan);
  const size_t bytes = static_cast<size_t>(batch_elements(shapes_.batch * shapes_.sequence)) * sizeof(int32_t);
  const std::string name = shapes_.sampling ? "sample.batch" : "batch";
  const uint32_t phases = shapes_.sampling ? kPhaseSample : kPhaseAlways;
  plan.add(&batch_memory_, name, Category::kActivations, bytes, phases);
  plan.add(&staging_memory_, name + ".staging", Category::kActivations, kStagingBuffers * bytes, phases, true);
}

const Parameter& Gpt2::parameter(const std::string& name) const {
  for (const Parameter& parameter : store_.parameters()) {
    if (parameter.name == name) return parameter;
  }
  throw std::logic_error("no parameter " + name);
}

void Gpt2::initialize(uint64_t seed) {
  const float residual_scale = 1.0f / std::sqrt(2.0f * static_cast<float>(config_.layers));
  HeldLayer<ParameterStore> held(store_);
  for (const Parameter& parameter : store_.parameters()) {
    held.hold(parameter.layer, Access::kOverwrite);
    const auto ends_with = [&](const std::string& suffix) {
      return parameter.name.size() >= suffix.size() &&
             parameter.name.compare(parameter.name.size() - suffix.size(), suffix.size(), suffix) == 0;
    };
    const auto set = [&](Tensor rows, int64_t begin) {
      if (!parameter.matrix) {
        backend_.fill_constant(rows, ends_with(".weight") ? 1.0f : 0.0f);
        return;
      }
      const RandomKey key{seed, RandomPurpose::kInit, parameter.hash(), static_cast<uint64_t>(begin * parameter.cols)};
      backend_.fill_normal(rows, 0.0f, 0.02f * (ends_with("c_proj.weight") ? residual_scale : 1.0f), key);
    };
    store_.assign(parameter, set);
    const Tensor master = store_.master(parameter);
    if (master) set(master, 0);
  }
}

void Gpt2::load(const HostBatch& batch) { load(batch, 0); }

void Gpt2::load(const HostBatch& batch, int64_t cached) {
  activations_.resize(batch.batch, batch.sequence, cached);  // throws before anything is written
  cached_ = cached;
  const int64_t tokens = batch.batch * batch.sequence;
  const bool training = shapes_.training && batch.group_ids;
  const size_t buffer = next_staging_;
  next_staging_ = (buffer + 1) % kStagingBuffers;
  if (buffer == staging_events_.size()) {
    staging_events_.push_back(backend_.create_event());
  } else {
    backend_.synchronize_event(staging_events_[buffer]);
  }
  int32_t* const staging =
      staging_memory_ + static_cast<int64_t>(buffer) * batch_elements(shapes_.batch * shapes_.sequence);
  int64_t used = 0;
  const auto part = [&](const int32_t* values, int64_t count) {
    if (values) std::copy_n(values, count, staging + used);
    used += count;
    return Tensor::of(batch_memory_ + (used - count), DType::kI32, {count});
  };
  inputs_ = part(batch.inputs, tokens).view({batch.batch, batch.sequence});
  targets_ = part(batch.targets, tokens);
  if (training) {
    groups_.ids = part(batch.group_ids, tokens);
    groups_.starts = part(batch.group_starts, tokens + 1);
    groups_.positions = part(batch.group_positions, tokens);
  }
  backend_.copy(batch_memory_, staging, static_cast<size_t>(used) * sizeof(int32_t));
  backend_.record(staging_events_[buffer], Stream::kCompute);
}

// x, ln1 of the next block (or ln_f after the last one) from the sum of the residual stream and a block's output.
void Gpt2::norm_into(int64_t next_layer, Tensor a, Tensor b) {
  const Tensor residual = activations_.residual(next_layer);
  if (next_layer == config_.layers) {
    backend_.residual_layernorm_forward(residual, activations_.final_norm, activations_.final_mean,
                                        activations_.final_rstd, a, b, weight(parameter("ln_f.weight")),
                                        weight(parameter("ln_f.bias")));
    return;
  }
  const Gpt2Layer layer(store_.parameters(), next_layer);
  const LayerActivations next = activations_.layer(next_layer);
  backend_.residual_layernorm_forward(residual, next.ln1, next.mean1, next.rstd1, a, b, weight(layer.ln1_weight),
                                      weight(layer.ln1_bias));
}

// From ln1: qkv, attention, its projection, and with them x2 and ln2.
void Gpt2::attention_branch(int64_t index, const LayerActivations& a) {
  const Gpt2Layer layer(store_.parameters(), index);
  const int heads = static_cast<int>(config_.heads);
  const int64_t tokens = a.qkv.rows();
  const Tensor qkv = a.qkv.view({tokens, a.qkv.cols()}).slice(cached_, tokens - cached_);
  backend_.matmul(qkv, a.ln1, weight(layer.qkv_weight), {.bias = weight(layer.qkv_bias)});
  if (cached_ > 0) {
    backend_.attention_decode(a.att, a.qkv, heads);
  } else {
    backend_.attention_forward(a.att, a.lse, a.qkv, heads);
  }
  backend_.matmul(activations_.branch, a.att, weight(layer.proj_weight), {.bias = weight(layer.proj_bias)});
  backend_.residual_layernorm_forward(a.x2, a.ln2, a.mean2, a.rstd2, a.x, activations_.branch, weight(layer.ln2_weight),
                                      weight(layer.ln2_bias));
}

// From ln2: the hidden layer of the MLP.
void Gpt2::mlp_hidden(int64_t index, const LayerActivations& a) {
  const Gpt2Layer layer(store_.parameters(), index);
  backend_.matmul(a.fch, a.ln2, weight(layer.fc_weight), {.bias = weight(layer.fc_bias)});
  backend_.gelu_forward(a.gelu, a.fch);
}

void Gpt2::forward_block(int64_t index, bool training) {
  const Gpt2Layer layer(store_.parameters(), index);
  activations_.acquire(index, Access::kRead);
  const LayerActivations a = activations_.layer(index);
  attention_branch(index, a);
  mlp_hidden(index, a);
  backend_.matmul(activations_.branch, a.gelu, weight(layer.mlp_proj_weight), {.bias = weight(layer.mlp_proj_bias)});
  // The next block's first LayerNorm is fused into this residual add, so its weights are acquired here.
  const int next = index + 1 < config_.layers ? static_cast<int>(index + 1) : -1;
  store_.acquire(next);
  activations_.acquire(index + 1, Access::kOverwrite);
  norm_into(index + 1, a.x2, activations_.branch);
  activations_.release(index + 1, training);
  activations_.release(index, false);
  store_.release(next, false);
}

void Gpt2::forward(bool training) {
  store_.acquire(-1);
  activations_.acquire(0, Access::kOverwrite);
  const Tensor positions = weight(parameter("wpe.weight"));
  backend_.embedding_forward(activations_.residual(0), inputs_, weight(parameter("wte.weight")),
                             positions.slice(cached_, positions.rows() - cached_));
  activations_.release(0, training);
  store_.release(-1, false);
  for (int64_t l = 0; l < config_.layers; ++l) {
    store_.acquire(static_cast<int>(l));
    if (l == 0) {
      const Gpt2Layer layer(store_.parameters(), 0);
      activations_.acquire(0, Access::kRead);
      const LayerActivations a = activations_.layer(0);
      backend_.layernorm_forward(a.ln1, a.mean1, a.rstd1, a.x, weight(layer.ln1_weight), weight(layer.ln1_bias));
      activations_.release(0, false);
    }
    forward_block(l, training);
    store_.release(static_cast<int>(l), false);
  }
}

// Walks over chunks of tokens: logits, loss, and with a sink the gradients of the head's weight (unless that comes in
// blocks, later) and input (into branch).
void Gpt2::head(GradientSink* sink, float gradient_scale) {
  store_.acquire(-1);
  const Parameter& head = head_parameter();
  const Tensor head_weight = store_.padded_weight(head);
  const bool blocks = sink && sink->wants_blocks(head);
  head_gradient_scale_ = gradient_scale;
  const int64_t tokens = targets_.elements(), C = config_.channels, V = config_.vocabulary;
  const Tensor norm = activations_.final_norm.view({tokens, C});
  const Tensor d_norm = activations_.branch.view({tokens, C});
  for (int64_t begin = 0; begin < tokens; begin += shapes_.head_chunk) {
    const int64_t count = std::min(shapes_.head_chunk, tokens - begin);
    const Tensor logits = activations_.logits.slice(0, count);
    const Tensor in = norm.slice(begin, count);
    backend_.matmul(logits, in, head_weight, {.transpose_b = true});
    backend_.classifier(activations_.losses.slice(begin, count), logits, targets_.slice(begin, count), V,
                        gradient_scale, sink != nullptr, blocks ? activations_.head_lse.slice(begin, count) : Tensor{});
    if (!sink) continue;
    backend_.matmul(d_norm.slice(begin, count), logits, head_weight);
    if (blocks) continue;
    // With the padding rows, whose gradient is 0: whole tiles.
    const GradientSink::Target target = sink->target(head);
    backend_.matmul(head.padded(target.tensor), logits, in, {.transpose_a = true, .accumulate = target.accumulate});
  }
  store_.release(-1, false);
}

// Rows [begin, ...) of the gradient of the head's weight, from logits computed again: those of these rows only.
void Gpt2::head_gradient_rows(Tensor out, int64_t begin, bool accumulate) {
  const int64_t rows = out.rows(), tokens = targets_.elements();
  const Tensor logits = activations_.logits_block(rows);
  const Tensor norm = activations_.final_norm.view({tokens, config_.channels});
  const Tensor head_weight = store_.stored(head_parameter()).slice(begin, rows);
  for (int64_t first = 0; first < tokens; first += logits.rows()) {
    const int64_t count = std::min(logits.rows(), tokens - first);
    const Tensor chunk = logits.slice(0, count), in = norm.slice(first, count);
    backend_.matmul(chunk, in, head_weight, {.transpose_b = true});
    backend_.classifier_gradient(chunk, targets_.slice(first, count), activations_.head_lse.slice(first, count), begin,
                                 config_.vocabulary, head_gradient_scale_);
    backend_.matmul(out, chunk, in, {.transpose_a = true, .accumulate = accumulate || first > 0});
  }
}

void Gpt2::train(GradientSink& sink, Tensor loss, bool accumulate_loss, float loss_scale, StepScalars* scalars) {
  forward(true);
  const float per_token = loss_scale / static_cast<float>(targets_.elements());
  head(&sink, per_token);
  backend_.sum(loss, activations_.losses, per_token, accumulate_loss);
  sink.loss(loss);
  backend_.gate_on_finite(scalars, loss);
  backward(sink);
}

Tensor Gpt2::token_losses(const HostBatch& batch) {
  load(batch);
  forward(false);
  head(nullptr, 0.0f);
  return activations_.losses;
}

void Gpt2::evaluate(const HostBatch& batch, Tensor loss, bool accumulate_loss, float loss_scale) {
  backend_.sum(loss, token_losses(batch), loss_scale / static_cast<float>(batch.batch * batch.sequence),
               accumulate_loss);
}

Tensor Gpt2::logits(const int32_t* tokens, int64_t count, int64_t rows, int64_t cached) {
  const int64_t fresh = count - cached;
  if (cached > 0 && fresh != 1) throw std::logic_error("one token comes after those that are kept");
  load({.batch = 1, .sequence = fresh, .inputs = tokens + cached}, cached);
  forward(false);
  store_.acquire(-1);
  const Parameter& head = head_parameter();
  const Tensor out = activations_.logits.slice(0, rows);
  backend_.matmul(out, activations_.final_norm.view({fresh, config_.channels}).slice(fresh - rows, rows),
                  store_.padded_weight(head), {.transpose_b = true});
  store_.release(-1, false);
  return out;
}
