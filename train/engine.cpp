// engine.cpp: see engine.h.
#include "train/engine.h"

#include <cmath>

namespace {

KernelShapes kernel_shapes(const EngineConfig& config) {
  KernelShapes shapes;
  shapes.batch = config.shapes.batch;
  shapes.sequence = config.shapes.sequence;
  shapes.channels = config.model.channels;
  shapes.heads = config.model.heads;
  shapes.vocabulary = config.model.padded_vocabulary();
  const DType bf16_type = DType::kBF16;
  shapes.any_bf16 = config.weight_dtype == bf16_type || config.shapes.dtype == bf16_type ||
                    config.gradients.gradient_dtype == bf16_type || config.gradients.accumulation_dtype == bf16_type ||
                    config.optimizer.state_dtype == bf16_type;
  return shapes;
}

// Stands for the ranks of a run that is only planned.
class PlannedRanks final : public Communicator {
 public:
  explicit PlannedRanks(int size) : size_(size) {}
  int rank() const override { return 0; }
  int size() const override { return size_; }
  Ticket all_reduce(std::span<const Tensor>) override { refuse(); }
  Ticket all_gather(void*, size_t) override { refuse(); }
  void wait(Ticket) override {}
  int64_t bytes_sent() const override { return 0; }

 private:
  [[noreturn]] static void refuse() { throw std::logic_error("the ranks of a plan say nothing to each other"); }

  int size_;
};

std::unique_ptr<Communicator> planned(int ranks) {
  if (ranks == 1) return std::make_unique<AloneCommunicator>();
  return std::make_unique<PlannedRanks>(ranks);
}

// Of random projections: bf16 beside bf16 activations, because tensor cores do not multiply fp32 numbers.
DType projection_dtype(const EngineConfig& config) {
  return config.shapes.dtype == DType::kBF16 ? DType::kBF16 : config.gradients.gradient_dtype;
}

// What follows from offloading, from ranks and from gradients in blocks for the parts. What visits the device is copied
// on a stream of its own from and to memory that changes, so the operations are not the same each time.
EngineConfig completed(EngineConfig config, Communicator& communicator, const Backend& backend) {
  const Offload& offload = config.offload;
  config.ranks = communicator.size();
  if (is_spread(config)) {
    if (offload.state || offload.weights) throw std::invalid_argument("weights and states are on ranks or on the host");
    config.optimizer.states = {offload.layers_in_flight, &communicator, updates_parts(config)};
    config.graphs = false;
  } else if (offload.state || offload.weights) {
    config.optimizer.states = {.streamed_layers = offload.layers_in_flight};
  }
  if (offload.activations) config.shapes.streamed_layers = offload.layers_in_flight;
  if (offload.activations || offload.state || offload.weights) config.graphs = false;
  config.master_weights = config.master_weights && config.weight_dtype == DType::kBF16;
  config.gradients.layer_by_layer = config.optimizer.states.streamed_layers > 0 && !config.optimizer.states.parts;
  config.gradients.beside = config.overlap_updates && can_overlap_updates(config, backend);
  config.optimizer.blocks = config.gradients.blocks;
  config.gradients.projection_dtype = projection_dtype(config);
  config.shapes.head_blocks = config.shapes.training && config.gradients.blocks != GradientBlocks::kWhole;
  return config;
}

// One sequence, as long as those of the run; the last token's logits.
ActivationShapes sampling_shapes(const EngineConfig& config) {
  return {.sequence = config.shapes.sequence, .dtype = config.shapes.dtype, .training = false, .sampling = true};
}

std::vector<Parameter> parameters_of(const EngineConfig& config) {
  std::vector<Parameter> parameters = gpt2_parameters(config.model);
  for (Parameter& p : parameters) p.quantized = config.weight_dtype == DType::kI8 && p.matrix && p.layer >= 0;
  return parameters;
}

WeightStoreConfig store_config(const EngineConfig& config) {
  return {.dtype = config.weight_dtype,
          .plain_dtype = config.shapes.dtype,
          .master_weights = config.master_weights,
          .blocks = is_spread(config) || config.offload.weights ? config.optimizer.states : LayerPlace{}};
}

}  // namespace

bool is_spread(const EngineConfig& config) { return config.spread == Spread::kWeights && config.ranks > 1; }

bool updates_parts(const EngineConfig& config) {
  const OptimizerKind kind = config.optimizer.kind;
  return (kind == OptimizerKind::kAdamW || kind == OptimizerKind::kSgd) && config.weight_dtype != DType::kI8;
}

bool can_overlap_updates(const EngineConfig& config, const Backend& backend) {
  return config.shapes.training && config.gradients.kind == GradientMode::kFused &&
         config.gradients.blocks == GradientBlocks::kWhole && !config.offload.state && !config.offload.weights &&
         config.ranks == 1 && backend.has_update_stream();
}

Engine::Engine(const EngineConfig& config, Backend& backend, Communicator& communicator)
    : Engine(config, backend, nullptr, &communicator) {}

Engine::Engine(const EngineConfig& config, Backend& backend)
    : Engine(config, backend, planned(config.ranks), nullptr) {}

Engine::Engine(const EngineConfig& config, Backend& backend, std::unique_ptr<Communicator> own, Communicator* given)
    : own_communicator_(std::move(own)),
      communicator_(given ? *given : *own_communicator_),
      config_(completed(config, communicator_, backend)),
      backend_(backend),
      store_(parameters_of(config_), store_config(config_), backend),
      model_(config_.model, config_.shapes, store_, backend),
      graphs_(backend, config_.graphs) {
  if (config_.shapes.training) {
    optimizer_ = make_optimizer(config_.optimizer, store_.parameters(), projection_dtype(config_), backend);
    gradients_ = std::make_unique<Gradients>(config_.gradients, *optimizer_, store_, backend, communicator_);
  }
  if (config_.sampling) sampler_ = std::make_unique<Gpt2>(config_.model, sampling_shapes(config_), store_, backend);
  store_.declare(plan_);
  if (optimizer_) optimizer_->declare(plan_);
  if (gradients_) gradients_->declare(plan_);
  model_.declare(plan_);
  if (sampler_) sampler_->declare(plan_);
  plan_.add(&scalars_, "step.scalars", Category::kWorkspace, sizeof(StepScalars));
  plan_.add(&loss_, "step.loss", Category::kWorkspace, DType::kF32, {1});
  const size_t workspace_bytes = backend.workspace_bytes(kernel_shapes(config_));
  plan_.add(&workspace_, "backend.workspace", Category::kWorkspace, workspace_bytes);
  if (config_.gradients.beside)
    plan_.add(&update_workspace_, "backend.update_workspace", Category::kWorkspace, workspace_bytes);
}

MemoryPlan Engine::plan() const {
  MemoryPlan plan = plan_;
  plan.layout();
  return plan;
}

void Engine::allocate() {
  arena_ = std::make_unique<Arena>(backend_, plan_);
  const size_t workspace_bytes = backend_.workspace_bytes(kernel_shapes(config_));
  backend_.set_workspace(workspace_, workspace_bytes);
  if (update_workspace_) backend_.set_workspace(update_workspace_, workspace_bytes, Stream::kUpdate);
  store_.zero_padding();
  if (optimizer_) optimizer_->states().zero();
}

std::vector<float> Engine::token_losses(const HostBatch& batch) {
  const Tensor losses = model_.token_losses(batch);
  std::vector<float> out(static_cast<size_t>(losses.elements()));
  backend_.copy(out.data(), losses.data, out.size() * sizeof(float));
  backend_.synchronize();
  return out;
}

float Engine::evaluate(const HostBatch& batch) {
  model_.evaluate(batch, loss_, false, 1.0f);
  return result().loss;
}

StepResult Engine::result() {
  StepResult result;
  float squares = 0;
  StepScalars scalars;
  backend_.copy(&scalars, scalars_, sizeof scalars);
  backend_.copy(&result.loss, loss_.data, sizeof(float));
  if (gradients_) backend_.copy(&squares, gradients_->gradient_squares(), sizeof(float));
  backend_.synchronize();
  result.grad_norm = std::sqrt(squares);
  result.lr = scalars.lr;
  result.applied = scalars.gate != 0;
  return result;
}
