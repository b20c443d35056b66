// engine.h: everything a training step needs, put together from a configuration: weights, model, optimizer,
// gradients, and the memory plan they declare. Also without the training half, for evaluation and sampling.
#pragma once

#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "flora/gradients.h"
#include "kernels/backend.h"
#include "kernels/graph_cache.h"
#include "kernels/memory_plan.h"
#include "model/gpt2.h"
#include "model/weights.h"
#include "parallel/communicator.h"

// What ranks keep together, each a part of it, and gather layer by layer.
enum class Spread : uint8_t { kNone, kWeights };  // kWeights: the blocks' matrices and their optimizer states
inline constexpr std::pair<Spread, const char*> kSpreadNames[] = {{Spread::kNone, "none"},
                                                                  {Spread::kWeights, "weights"}};

// What stays in host memory and visits the device layer by layer.
struct Offload {
  bool activations = false;  // the residual stream between the blocks
  bool state = false;        // of the optimizer, of the blocks
  bool weights = false;      // of the blocks; their state comes along
  int layers_in_flight = 2;  // on the device at a time; of a sharded run, too
};

struct EngineConfig {
  Gpt2Config model;
  ActivationShapes shapes;           // shapes.training = false: no optimizer, no gradients
  DType weight_dtype = DType::kF32;  // kI8: of the blocks' matrices, the rest has the activations' dtype
  bool master_weights = false;
  OptimizerConfig optimizer;
  GradientConfig gradients;
  Offload offload;
  Spread spread = Spread::kNone;
  int ranks = 1;          // of the run, for a plan; with a communicator as many as it has
  bool sampling = false;  // text will be sampled: there is a sampler()
  bool graphs = true;     // record a step's operations and replay them, where the backend can
  // Updates run beside the backward pass, where can_overlap_updates(): changes no bit, costs memory.
  bool overlap_updates = false;
};

// Whether ranks keep the blocks' matrices together, and an update then needs nothing but a rank's part: that of AdamW
// and SGD; but 8-bit weights are updated by whole rows.
bool is_spread(const EngineConfig& config);
bool updates_parts(const EngineConfig& config);

// Whether there are updates that a second stream can make while the backward pass goes on: fused ones, of gradients
// that are whole and of weights that stay where they are.
bool can_overlap_updates(const EngineConfig& config, const Backend& backend);

// What a step did, read back once per step.
struct StepResult {
  float loss = 0;       // mean over the tokens of the step
  float grad_norm = 0;  // global, before clipping
  float lr = 0;         // as the optimizer used it
  bool applied = true;  // false: the gate was closed, weights and state are as before
};

class Engine {
 public:
  // With a communicator of several ranks each computes config.gradients.micro_batches of a step's micro-batches.
  Engine(const EngineConfig& config, Backend& backend, Communicator& communicator);
  // One process alone; with several ranks in `config`, the plan of each of them.
  Engine(const EngineConfig& config, Backend& backend);

  // What every part declares, not yet laid out.
  const MemoryPlan& declared() const { return plan_; }
  // The same, laid out. Needs no device memory.
  MemoryPlan plan() const;
  // Allocates exactly the plan, once. Weights are undefined then, states zeros.
  void allocate();

  ParameterStore& store() { return store_; }
  Gpt2& model() { return model_; }
  // The same weights for one sequence, token by token (Gpt2::logits with `cached`). What it keeps of the tokens so far
  // lasts until model() is used, whose memory it shares. Only with config.sampling.
  Gpt2& sampler() { return *sampler_; }
  Optimizer& optimizer() { return *optimizer_; }
  const Optimizer& optimizer() const { return *optimizer_; }
  Gradients& gradients() { return *gradients_; }
  Backend& backend() { return backend_; }
  Communicator& communicator() { return communicator_; }
  const EngineConfig& config() const { return config_; }
  const Arena& arena() const { return *arena_; }

  // One optimizer step over gradients.micro_batches micro-batches; next_batch(i) supplies the i-th. With global-norm
  // clipping under fused updates every micro-batch is asked for twice (first all, then all again).
  template <typename NextBatch>
  StepResult step(uint32_t t, float lr, NextBatch&& next_batch) {
    StepContext context{t, lr, scalars_};
    if (gradients_->needs_norm_pass()) {
      context.norm_pass = true;
      pass(context, next_batch);
      context.norm_pass = false;
    }
    pass(context, next_batch);
    return result();
  }

  // The loss of every position of a batch, [B*T] in nats; 0 where it has no target.
  std::vector<float> token_losses(const HostBatch& batch);

  // Mean loss over the tokens of a batch.
  float evaluate(const HostBatch& batch);

 private:
  template <typename NextBatch>
  void pass(const StepContext& context, NextBatch&& next_batch) {
    const int count = config_.gradients.micro_batches;
    gradients_->begin_step(context);
    for (int i = 0; i < count; ++i) {
      const HostBatch batch = next_batch(i);
      if (batch.batch != config_.shapes.batch || batch.sequence != config_.shapes.sequence)
        throw std::logic_error("a training step takes micro-batches of the planned shape");
      model_.load(batch);
      const bool last = i + 1 == count;
      const auto operations = [&] {
        gradients_->begin_micro_batch(i, last);
        model_.train(*gradients_, loss_, i > 0, 1.0f / static_cast<float>(count * communicator_.size()), scalars_);
      };
      if (last && communicator_.size() > 1) {
        operations();  // what the ranks say to each other is not recorded
      } else {
        graphs_.run(graph_key(i > 0 ? 1 : 0, last ? 1 : 0), operations);
      }
    }
    if (communicator_.size() > 1) {
      gradients_->end_step();
    } else {
      graphs_.run(graph_key(2, 0), [&] { gradients_->end_step(); });
    }
  }
  // Micro-batches that come first, last, or between issue different operations.
  uint32_t graph_key(uint32_t position, uint32_t last) const { return 8 * gradients_->variant() + 2 * position + last; }

  StepResult result();

  Engine(const EngineConfig& config, Backend& backend, std::unique_ptr<Communicator> own, Communicator* given);

  std::unique_ptr<Communicator> own_communicator_;  // where none was given
  Communicator& communicator_;
  EngineConfig config_;
  Backend& backend_;
  MemoryPlan plan_;
  std::unique_ptr<Arena> arena_;  // outlives what lives in it
  WeightStore store_;
  Gpt2 model_;
  std::unique_ptr<Gpt2> sampler_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<Gradients> gradients_;
  GraphCache graphs_;
  Tensor loss_;
  StepScalars* scalars_ = nullptr;
  void *workspace_ = nullptr, *update_workspace_ = nullptr;  // of the backend
};
