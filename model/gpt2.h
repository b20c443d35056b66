// gpt2.h: the forward and backward pass of GPT-2 over the operations of a Backend. The model owns neither weights (it
// takes them from a ParameterStore, layer by layer) nor gradients (it hands each one to a GradientSink and forgets it).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "flora/gradients.h"
#include "kernels/backend.h"
#include "kernels/memory_plan.h"
#include "model/activations.h"
#include "model/config.h"

// One micro-batch in host memory: B*T inputs, targets (-1: no loss), and the groups for the embedding's backward pass.
struct HostBatch {
  int64_t batch = 0, sequence = 0;
  const int32_t* inputs = nullptr;
  const int32_t* targets = nullptr;
  const int32_t* group_ids = nullptr;        // [N], only for training
  const int32_t* group_starts = nullptr;     // [N + 1]
  const int32_t* group_positions = nullptr;  // [N]
};

// The twelve parameters of a transformer block, by role instead of by position.
struct Gpt2Layer {
  static constexpr int64_t kParameters = 12;  // per block
  static constexpr int64_t kFirst = 2;        // after wte and wpe; see gpt2_parameters()

  Gpt2Layer(const std::vector<Parameter>& all, int64_t index) : Gpt2Layer(&all[kFirst + index * kParameters]) {}

  const Parameter &ln1_weight, &ln1_bias, &qkv_weight, &qkv_bias, &proj_weight, &proj_bias, &ln2_weight, &ln2_bias,
      &fc_weight, &fc_bias, &mlp_proj_weight, &mlp_proj_bias;

 private:
  explicit Gpt2Layer(const Parameter* p)
      : ln1_weight(p[0]),
        ln1_bias(p[1]),
        qkv_weight(p[2]),
        qkv_bias(p[3]),
        proj_weight(p[4]),
        proj_bias(p[5]),
        ln2_weight(p[6]),
        ln2_bias(p[7]),
        fc_weight(p[8]),
        fc_bias(p[9]),
        mlp_proj_weight(p[10]),
        mlp_proj_bias(p[11]) {}
};

class Gpt2 {
 public:
  // `training` in the shapes decides whether backward passes are possible (and planned for).
  Gpt2(const Gpt2Config& config, const ActivationShapes& shapes, ParameterStore& store, Backend& backend);

  void declare(MemoryPlan& plan);

  // Weights ~ N(0, 0.02), residual projections scaled by 1/sqrt(2 L), LayerNorm 1 and 0, biases 0; from the seed.
  void initialize(uint64_t seed);

  // Brings a micro-batch to the device; the host may reuse it at once.
  void load(const HostBatch& batch);

  // The loaded micro-batch of a step: loss[0] (device, fp32) = or += loss_scale * mean loss, and every gradient of
  // loss_scale * mean loss goes to the sink. A loss that is not finite closes scalars->gate before the backward pass.
  // The same operations on the same memory every time, so it can be recorded and replayed (graph_cache.h).
  void train(GradientSink& sink, Tensor loss, bool accumulate_loss, float loss_scale, StepScalars* scalars);

  // The loss of every position of the batch, 0 where it has no target: [B*T], device, fp32, valid until the next pass.
  // No gradients.
  Tensor token_losses(const HostBatch& batch);

  // loss[0] = or += loss_scale * mean loss over the batch. No gradients.
  void evaluate(const HostBatch& batch, Tensor loss, bool accumulate_loss, float loss_scale);

  // Logits of the last `rows` positions (at most the head chunk) of one sequence; a [rows, Vp] view of the logits
  // buffer. With shapes.sampling the first `cached` tokens may be those that the last call had: then one token comes
  // after them, and costs a pass over itself alone.
  Tensor logits(const int32_t* tokens, int64_t count, int64_t rows, int64_t cached = 0);

  const Gpt2Config& config() const { return config_; }
  const Parameter& parameter(const std::string& name) const;

 private:
  void load(const HostBatch& batch, int64_t cached);
  void forward(bool training);
  int64_t batch_elements(int64_t tokens) const;
  void forward_block(int64_t layer, bool training);
  void recompute_block(int64_t layer);
  void attention_branch(int64_t layer, const LayerActivations& a);
  void mlp_hidden(int64_t layer, const LayerActivations& a);
  void norm_into(int64_t next_layer, Tensor a, Tensor b);
  void head(GradientSink* sink, float gradient_scale);
  const Parameter& head_parameter() const { return parameter(config_.tied_head ? "wte.weight" : "lm_head.weight"); }
  void head_gradient_rows(Tensor out, int64_t begin, bool accumulate);
  void embeddings_backward(GradientSink& sink);
  void backward(GradientSink& sink);
  void backward_block(int64_t layer, GradientSink& sink);
  void product_backward(GradientSink& sink, const Parameter& weight, Tensor d_input, Tensor input, Tensor d_output);
  void linear_backward(GradientSink& sink, const Parameter& weight, const Parameter& bias, Tensor d_input, Tensor input,
                       Tensor d_output);
  void norm_backward(GradientSink& sink, const Parameter& weight, const Parameter& bias, Tensor d_out, Tensor in,
                     Tensor mean, Tensor rstd);
  Tensor weight(const Parameter& parameter) { return store_.weight(parameter); }

  Gpt2Config config_;
  ActivationShapes shapes_;
  ParameterStore& store_;
  Backend& backend_;
  Activations activations_;
  Tensor inputs_, targets_;  // [B, T], [B*T] of the batch at hand
  int64_t cached_ = 0;       // tokens before it, of which only keys and values are there
  float head_gradient_scale_ = 0;
  TokenGroups groups_;
  int32_t* batch_memory_ = nullptr;  // all of the batch, one part after another

  // In host memory, so that the next batch is laid out while the last one is copied.
  static constexpr size_t kStagingBuffers = 2;
  int32_t* staging_memory_ = nullptr;
  std::vector<int> staging_events_;  // the buffer has been copied to the device
  size_t next_staging_ = 0;
};
