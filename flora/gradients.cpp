// gradients.cpp: what a step does with a gradient; see gradients.h. What is kept of it, and where, is in
// gradient_sums.cpp.
#include "flora/gradients.h"

#include <algorithm>
#include <stdexcept>

Gradients::Gradients(const GradientConfig& config, Optimizer& optimizer, ParameterStore& store, Backend& backend,
                     Communicator& communicator)
    : config_(config),
      optimizer_(optimizer),
      store_(store),
      backend_(backend),
      communicator_(communicator),
      matrices_{{"gradient.matrix", config.gradient_dtype, 0, Category::kGradients},
                {"gradient.second_matrix", config.gradient_dtype, 0, Category::kGradients}},
      vectors_{{"gradient.vectors", config.gradient_dtype, 0, Category::kGradients},
               {"gradient.second_vectors", config.gradient_dtype, 0, Category::kGradients}},
      top_vectors_("gradient.top_vectors", config.gradient_dtype, 0, Category::kGradients),
      rows_("gradient.rows", DType::kF32, kPhaseBackward, Category::kGradients),
      projection_("gradient.projection", config.projection_dtype.value_or(config.gradient_dtype), 0),
      projected_("gradient.projected", DType::kF32, 0) {
  const bool fused = config.kind == GradientMode::kFused;
  if (config.micro_batches < 1) throw std::invalid_argument("a step has at least one micro-batch");
  if (config.blocks != GradientBlocks::kWhole && (!fused || config.micro_batches > 1))
    throw std::invalid_argument("gradients in blocks need fused updates and one micro-batch");
  if (config.beside && (!fused || config.blocks != GradientBlocks::kWhole || config.layer_by_layer || shared()))
    throw std::invalid_argument("updates beside the backward pass are fused, of whole gradients, and of one rank");
  if (config.beside) {
    for (auto& turns : in_use_)
      for (InUse& buffer : turns) buffer.done_event = backend.create_event();
    given_event_ = backend.create_event();
    updated_event_ = backend.create_event();
  }
  if (config.kind == GradientMode::kCompressed && config.accumulation_rank <= 0)
    throw std::invalid_argument("compressed gradients need an accumulation rank");
  require_indexed(store.parameters());
  for (const Parameter& parameter : store.parameters()) {
    Entry e;
    e.parameter = parameter;
    e.keep = keep(parameter);
    // A long-lived gradient is summed in fp32 in place, so only others need a buffer in front of a bf16 sum.
    const bool rounded_sum = config.micro_batches > 1 && sum_dtype(parameter) == DType::kBF16;
    e.buffered = e.keep != Keep::kSum || rounded_sum;
    entries_.push_back(e);
    const size_t layer = static_cast<size_t>(parameter.layer + 1);
    if (layers_.size() <= layer) layers_.resize(layer + 1);
    layers_[layer].parameters += wants_blocks(parameter) ? 0 : 1;
    layers_[layer].vectors += parameter.matrix ? 0 : 1;
  }
  reserve_buffers();
}

// ---- a step

std::vector<Tensor> Gradients::tensors_of(const std::vector<Complete>& gradients) {
  std::vector<Tensor> tensors;
  for (const Complete& complete : gradients) tensors.push_back(complete.gradient);
  return tensors;
}

void Gradients::begin_step(const StepContext& context) {
  scalars_ = context.scalars;
  StepScalars scalars;
  scalars.lr = context.lr;
  scalars.step = context.step;
  // No two additions of a run, or of its ranks, round with the same numbers.
  const uint32_t ranks = static_cast<uint32_t>(communicator_.size()),
                 rank = static_cast<uint32_t>(communicator_.rank());
  scalars.rounding_counter = (context.step * ranks + rank) * static_cast<uint32_t>(config_.micro_batches);
  optimizer_.begin_step(context.step, scalars);
  backend_.copy(scalars_, &scalars, sizeof scalars);
  const bool norm_is_known = norm_pass_ && !context.norm_pass;
  if (norm_is_known) gate_and_clip();
  norm_pass_ = context.norm_pass;
  squares_written_ = false;
  serial_ = !stepped_ || backend_.profiler;
  stepped_ = stepped_ || !context.norm_pass;
}

void Gradients::begin_micro_batch(int index, bool is_last) {
  is_last_ = is_last;
  used_ = 0;
  for (LayerProgress& layer : layers_) {
    layer.ready = 0;
    layer.waiting.clear();
  }
  if (index > 0) backend_.increment(&scalars_->rounding_counter);
  if (index > 0) return;
  for (Entry& e : entries_) e.buffer_written = e.sum_written = false;
}

GradientSink::Target Gradients::target(const Parameter& parameter) {
  Entry& e = entry(parameter);
  bool& written = e.buffered ? e.buffer_written : e.sum_written;
  if (e.buffered && !written && two_buffers()) {
    if (parameter.matrix) last_turn_ = 1 - last_turn_;
    e.turn = parameter.matrix ? last_turn_ : parameter.layer & 1;
    free_buffer(e);
  }
  const Target target{e.buffered ? buffer_of(e) : sum_of(e), written};
  written = true;
  return target;
}

void Gradients::ready(const Parameter& parameter) {
  Entry& e = entry(parameter);
  const bool used_at_once = config_.kind == GradientMode::kFused && is_last_;
  if (!used_at_once) add_to_sum(e);
  if (shared() && is_last_) {
    share(e);
  } else if (used_at_once) {
    const Complete here{&e, complete(e)};
    // In a norm pass nothing is gained by waiting.
    LayerProgress& layer = layers_.at(static_cast<size_t>(parameter.layer + 1));
    if (parameter.matrix || norm_pass_) {
      use({here});
    } else if (layer.waiting.push_back(here); layer.waiting.size() == layer.vectors) {
      use(layer.waiting);
      layer.waiting.clear();
    }
    if (++used_ == entries_.size()) join();
  }
}

void Gradients::loss(Tensor loss) {
  if (is_last_) communicator_.wait(communicator_.all_reduce(loss));
}

// In blocks: computed once for each pass that the update needs, and never kept.
void Gradients::from_rows(const Parameter& parameter, const Rows& rows) {
  if (!wants_blocks(parameter)) {
    GradientSink::from_rows(parameter, rows);
    return;
  }
  while (!travelling_.empty()) receive();  // what is on its way may be in this buffer
  bool first_pass = norm_pass_ || !clips();
  const Gradient gradient(parameter.rows, block_rows(parameter), [&](int64_t begin, int64_t count) {
    const Tensor block = buffer_of(entry(parameter)).slice(0, count);
    rows(block, begin, false);
    communicator_.wait(communicator_.all_reduce(block));
    if (first_pass) add_squares({&block, 1});
    if (begin + count == parameter.rows) first_pass = false;
    if (!norm_pass_) clip({&block, 1});
    return block;
  });
  if (norm_pass_) {
    gradient.pass([](const RowRange&, const Tensor&) {});
  } else {
    update(parameter, gradient);
  }
}

// Dense and compressed: the updates, layer by layer in the order of the backward pass. The norm of dense gradients is
// known before the first of them; that of compressed ones, which costs a decompression, only where it clips.
void Gradients::end_step() {
  while (!travelling_.empty()) receive();
  if (config_.kind == GradientMode::kFused) return;
  if (config_.kind == GradientMode::kCompressed) gate_on_sums();
  const bool norm_first = config_.kind == GradientMode::kDense || clips();
  const bool kept = config_.kind == GradientMode::kDense;  // else decompressed one by one
  if (norm_first) {
    std::vector<Tensor> gradients;
    for (Entry& e : entries_) {
      gradients.push_back(whole(e));
      if (kept) continue;
      add_squares(gradients);
      gradients.clear();
    }
    if (kept) add_squares(gradients);
    gate_and_clip();
  }
  std::vector<int> layers;  // the last one first, -1 at the end
  for (const Entry& e : entries_) layers.push_back(e.parameter.layer);
  std::sort(layers.rbegin(), layers.rend());
  layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
  HeldLayer<ParameterStore> held(store_);
  for (int layer : layers) {
    if (!optimizer_.updates_parts()) held.hold(layer, Access::kUpdate);
    std::vector<Complete> vectors;
    if (kept) {
      std::vector<Tensor> gradients;
      for (Entry& e : entries_)
        if (e.parameter.layer == layer) gradients.push_back(whole(e));
      clip(gradients);
    }
    for (Entry& e : entries_) {
      if (e.parameter.layer != layer) continue;
      const Tensor gradient = whole(e);
      if (!kept) clip({&gradient, 1});
      if (e.parameter.matrix) {
        update(e.parameter, {gradient, norm_first ? SquaresTarget{} : measured({&gradient, 1})});
      } else {
        vectors.push_back({&e, gradient});
      }
    }
    if (vectors.empty()) continue;
    const std::vector<Tensor> tensors = tensors_of(vectors);
    update_vectors(vectors, norm_first ? SquaresTarget{} : measured(tensors));
  }
}

// Under fused updates: what becomes of a complete gradient, or of a layer's vectors.
void Gradients::use(const std::vector<Complete>& gradients) {
  const std::vector<Tensor> tensors = tensors_of(gradients);
  if (norm_pass_) {
    add_squares(tensors);
    return;
  }
  const SquaresTarget squares = clips() ? SquaresTarget{} : measured(tensors);  // known from the norm pass
  beside(gradients, [&] {
    clip(tensors);
    const Parameter& first = gradients.front().entry->parameter;
    if (first.matrix) {
      update(first, {tensors.front(), squares});
    } else {
      update_vectors(gradients, squares);
    }
  });
}

// Issues `work`, which uses these gradients, to the update stream, where it comes after all that they are made of.
template <typename Work>
void Gradients::beside(const std::vector<Complete>& gradients, Work&& work) {
  if (!runs_beside()) {
    work();
    return;
  }
  updating_ = true;
  backend_.record(given_event_, Stream::kCompute);
  backend_.wait(given_event_, Stream::kUpdate);
  backend_.on(Stream::kUpdate);
  try {
    work();
  } catch (...) {
    backend_.on(Stream::kCompute);
    throw;
  }
  backend_.on(Stream::kCompute);
  for (const auto& [entry, gradient] : gradients) {
    InUse& buffer = in_use(*entry);
    backend_.record(buffer.done_event, Stream::kUpdate);
    buffer.busy = true;
  }
}

// What the compute stream is given from now on comes after all updates.
void Gradients::join() {
  if (!updating_) return;
  updating_ = false;
  backend_.record(updated_event_, Stream::kUpdate);
  backend_.wait(updated_event_, Stream::kCompute);
  for (auto& turns : in_use_)
    for (InUse& buffer : turns) buffer.busy = false;
}

// Of one layer.
void Gradients::update_vectors(const std::vector<Complete>& vectors, SquaresTarget squares) {
  const int layer = vectors.front().entry->parameter.layer;
  const bool parts = optimizer_.updates_parts();  // of matrices: vectors are whole, and not streamed then
  if (!parts) store_.acquire(layer, Access::kUpdate);
  std::vector<VectorGradient> updates;
  for (const auto& [entry, gradient] : vectors) {
    const Parameter& p = entry->parameter;
    updates.push_back({&p, store_.stored(p), store_.master(p), gradient});
  }
  optimizer_.update_vectors(updates, squares, scalars_);
  if (!parts) store_.release(layer, true);
}

void Gradients::update(const Parameter& parameter, const Gradient& gradient) {
  if (optimizer_.updates_parts()) {  // in place; what is not in parts is not streamed
    if (store_.spread(parameter)) {
      optimizer_.update_part(parameter, store_.part(parameter), gradient, scalars_);
      store_.part_changed(parameter);
    } else {
      optimizer_.update(parameter, store_.stored(parameter), store_.master(parameter), gradient, scalars_);
    }
    return;
  }
  store_.acquire(parameter.layer, Access::kUpdate);
  optimizer_.update(parameter, store_.stored(parameter), store_.master(parameter), gradient, scalars_);
  store_.release(parameter.layer, true);
}

// ---- ranks

// What of a parameter's gradient the ranks add up.
Tensor Gradients::shared_gradient(Entry& e) { return config_.kind == GradientMode::kFused ? complete(e) : sum_of(e); }

// In the last micro-batch: the gradient of one parameter goes on its way, a layer's vectors with the last of them.
// Where the weights of a layer are about to go, what is under way is waited for.
void Gradients::share(Entry& e) {
  LayerProgress& layer = layers_.at(static_cast<size_t>(e.parameter.layer + 1));
  const Complete here{&e, shared_gradient(e)};
  if (e.parameter.matrix) {
    send({here});
  } else if (layer.waiting.push_back(here); layer.waiting.size() == layer.vectors) {
    send(std::move(layer.waiting));
    layer.waiting.clear();
  }
  const bool complete = ++layer.ready == layer.parameters;
  if (complete && config_.layer_by_layer && config_.kind == GradientMode::kFused)
    while (!travelling_.empty()) receive();
}

void Gradients::send(std::vector<Complete> gradients) {
  const std::vector<Tensor> tensors = tensors_of(gradients);
  const Communicator::Ticket ticket = communicator_.all_reduce(tensors);
  travelling_.push_back({std::move(gradients), ticket});
}

// What has been under way for longest is there.
void Gradients::receive() {
  const Travelling first = std::move(travelling_.front());
  travelling_.pop_front();
  communicator_.wait(first.ticket);
  if (config_.kind == GradientMode::kFused) use(first.gradients);
}

// Before a buffer is written anew: what travels out of it has arrived, and no update reads it any more.
void Gradients::free_buffer(const Entry& e) {
  const Tensor buffer = buffer_of(e);
  const char* const begin = static_cast<const char*>(buffer.data);
  const auto overlaps = [&](const Travelling& t) {
    return std::any_of(t.gradients.begin(), t.gradients.end(), [&](const Complete& complete) {
      const char* const other = static_cast<const char*>(complete.gradient.data);
      return other < begin + buffer.bytes() && begin < other + complete.gradient.bytes();
    });
  };
  while (std::any_of(travelling_.begin(), travelling_.end(), overlaps)) receive();
  InUse& in_use = this->in_use(e);
  if (in_use.busy) backend_.wait(in_use.done_event, Stream::kCompute);
  in_use.busy = false;
}

// ---- norm and clipping

// gradient_squares() += sum of gradient^2, from 0 at the start of a step.
void Gradients::add_squares(std::span<const Tensor> gradients) {
  backend_.sum_squares(squares_, gradients, squares_written_);
  squares_written_ = true;
}

// The same by the update of these gradients: where it leaves their squares. Updates of several ranks may see parts of
// them only, which are no part of the sum.
SquaresTarget Gradients::measured(std::span<const Tensor> gradients) {
  if (shared()) {
    add_squares(gradients);
    return {};
  }
  const SquaresTarget target{squares_.as<float>(), squares_written_};
  squares_written_ = true;
  return target;
}

// From the complete gradient_squares(): closes the gate when they are not finite and sets the clipping factor.
void Gradients::gate_and_clip() {
  backend_.gate_on_finite(scalars_, squares_);
  if (clips()) backend_.clip_scale(scalars_, squares_.as<float>(), config_.clip_norm);
}

// gradient *= the clipping factor.
void Gradients::clip(std::span<const Tensor> gradients) {
  if (clips()) backend_.scale(gradients, &scalars_->gradient_scale);
}

// A gradient that is not finite leaves a sum that is not finite, and compressed sums are small: the gate is known
// before the first update and without a decompression.
void Gradients::gate_on_sums() {
  for (const Entry& e : entries_) backend_.sum_squares(sum_squares_, sum_of(e), &e != entries_.data());
  backend_.gate_on_finite(scalars_, sum_squares_);
}
