// sinks.cpp: the choice of a sink, and what all sinks share (sink_base.h). Costs one pass over each gradient for the
// norm.
#include "flora/sinks.h"

#include <algorithm>
#include <stdexcept>

#include "flora/sink_base.h"

SinkBase::SinkBase(const SinkConfig& config, Optimizer& optimizer, ParameterStore& store, Backend& backend,
                   const std::vector<GradientStorage::Keep>& keep, uint32_t slot_phases)
    : config_(config),
      backend_(backend),
      storage_(config, store.parameters(), keep, slot_phases, backend),
      optimizer_(optimizer),
      store_(store) {
  for (const Parameter& parameter : store.parameters()) layers_.push_back(parameter.layer);
  std::sort(layers_.rbegin(), layers_.rend());
  layers_.erase(std::unique(layers_.begin(), layers_.end()), layers_.end());
}

void SinkBase::declare(MemoryPlan& plan) const {
  storage_.declare(plan);
  plan.add_tensor("gradient.squares", Category::kWorkspace, DType::kF32, 1);
}

void SinkBase::bind(Arena& arena) {
  storage_.bind(arena);
  squares_ = arena.tensor("gradient.squares", DType::kF32, {1});
}

void SinkBase::begin_step(const StepContext& context) {
  if (context.micro_batches != config_.micro_batches)
    throw std::logic_error("a sink is made for a fixed number of micro-batches");
  scalars_ = context.scalars;
  StepScalars scalars;
  scalars.lr = context.lr;
  scalars.step = context.step;
  scalars.rounding_counter = context.step * static_cast<uint32_t>(config_.micro_batches);
  optimizer_.begin_step(context.step, scalars);
  backend_.copy(scalars_, &scalars, sizeof scalars);
  squares_written_ = false;
}

void SinkBase::begin_micro_batch(int index, bool is_last) {
  is_last_ = is_last;
  // Unique within a run of up to 2^32 micro-batches, so that no two additions round with the same numbers.
  if (index > 0) backend_.increment(&scalars_->rounding_counter);
  storage_.begin_micro_batch(index, scalars_);
}

void SinkBase::add_squares(Tensor gradient) {
  backend_.sum_squares(squares_, gradient, squares_written_);
  squares_written_ = true;
}

void SinkBase::judge_norm() {
  backend_.gate_on_finite(scalars_, squares_);
  if (clips()) backend_.clip_scale(scalars_, squares_.as<float>(), config_.clip_norm);
}

void SinkBase::clip(Tensor gradient) {
  if (clips()) backend_.scale(gradient, &scalars_->gradient_scale);
}

void SinkBase::update(const Parameter& parameter, Tensor gradient) {
  store_.acquire(parameter.layer, Access::kUpdate);
  optimizer_.update(parameter, store_.stored(parameter), store_.master(parameter), gradient, scalars_);
  store_.release(parameter.layer, true);
}

void SinkBase::update(const Parameter& parameter, const BlockedGradient& gradient) {
  store_.acquire(parameter.layer, Access::kUpdate);
  optimizer_.update_in_blocks(parameter, store_.stored(parameter), store_.master(parameter), gradient, scalars_);
  store_.release(parameter.layer, true);
}

std::vector<GradientStorage::Keep> keep_compressed(const SinkConfig& config, const std::vector<Parameter>& parameters,
                                                   GradientStorage::Keep other) {
  std::vector<GradientStorage::Keep> keep;
  for (const Parameter& parameter : parameters)
    keep.push_back(is_compressed(parameter, config.accumulation_rank, config.compress_embeddings, config.projection)
                       ? GradientStorage::Keep::kCompressed
                       : other);
  return keep;
}

std::unique_ptr<UpdatingSink> make_sink(const SinkConfig& config, Optimizer& optimizer, ParameterStore& store,
                                        Backend& backend) {
  if (config.micro_batches < 1) throw std::invalid_argument("a step has at least one micro-batch");
  if (config.blocks != GradientBlocks::kWhole && (config.kind != SinkKind::kFused || config.micro_batches > 1))
    throw std::invalid_argument("gradients in blocks need a fused sink and one micro-batch");
  switch (config.kind) {
    case SinkKind::kDense: return make_dense_sink(config, optimizer, store, backend);
    case SinkKind::kFused: return make_fused_sink(config, optimizer, store, backend);
    case SinkKind::kCompressed: return make_compressed_sink(config, optimizer, store, backend);
  }
  throw std::logic_error("unknown sink");
}
