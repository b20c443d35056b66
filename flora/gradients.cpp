// gradients.cpp: see gradients.h. First what a step does with a gradient, then sums and their memory.
#include "flora/gradients.h"

#include <algorithm>
#include <map>
#include <stdexcept>

namespace {

// Where a parameter's gradient is alive within a micro-batch: a block's in the backward pass, those outside the blocks
// from the head on, but for an embedding that has no part in the head.
uint32_t gradient_phases(const Parameter& parameter) {
  if (parameter.layer >= 0 || (parameter.embedding && !parameter.long_lived)) return kPhaseBackward;
  return kPhaseHead | kPhaseBackward;
}

}  // namespace

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

// ---- sums over micro-batches

// The gradient of this micro-batch is complete: it is added to the sum, unless it was written in its place.
void Gradients::add_to_sum(Entry& e) {
  if (e.keep == Keep::kProjectedSum) {
    const Compression shape = compression(e);
    const Tensor p = projection(e);
    if (e.sum.dtype == DType::kF32) {
      project_down(backend_, e.sum, buffer_of(e), p, shape, e.sum_written);
    } else {
      const Tensor projected = projected_.tensor({shape.compressed_rows(), shape.compressed_cols()});
      project_down(backend_, projected, buffer_of(e), p, shape, false);
      add_rounded(e, projected);
    }
  } else if (e.buffered) {
    add_rounded(e, buffer_of(e));
  }
  e.sum_written = true;
  e.buffer_written = false;
}

// sum (+)= added, rounded stochastically in bf16.
void Gradients::add_rounded(Entry& e, Tensor added) {
  const Tensor sum = sum_of(e);
  if (!e.sum_written) backend_.fill(sum.data, 0, sum.bytes());
  backend_.accumulate(sum, added,
                      {.seed = config_.seed, .purpose = RandomPurpose::kGradientRounding, .tensor = e.parameter.hash()},
                      &scalars_->rounding_counter);
}

// In the last micro-batch, where the gradient is used at once: the whole gradient of the step, which is the full sum,
// or the buffer, to which a projected sum of those before is added.
Tensor Gradients::complete(Entry& e) {
  if (e.keep == Keep::kSum) {
    add_to_sum(e);
    return sum_of(e);
  }
  const Tensor buffer = buffer_of(e);
  e.buffer_written = false;
  if (e.keep == Keep::kProjectedSum && e.sum_written) decode_sum(e, buffer, true);
  return buffer;
}

// After the last micro-batch: the whole gradient of the step; a projected sum is decompressed into the buffer and valid
// until the next call.
Tensor Gradients::whole(Entry& e) {
  if (e.keep == Keep::kSum) return sum_of(e);
  const Tensor buffer = buffer_of(e);
  decode_sum(e, buffer, false);
  return buffer;
}

// A projected sum back to the size it had: the sum, on average, because it is added to what was never projected and has
// the scale of a gradient for optimizers and for clipping.
void Gradients::decode_sum(const Entry& e, Tensor out, bool accumulate) {
  const Compression shape = compression(e);
  const Tensor p = projection(e);
  Tensor sum = e.sum;
  if (p.dtype == DType::kF32 && sum.dtype != DType::kF32) {  // else both would meet in bf16: another projection
    sum = projected_.tensor({shape.compressed_rows(), shape.compressed_cols()});
    backend_.convert(sum, e.sum);
  }
  project_up(backend_, out, sum, p, shape, unbiased_factor(config_.projection, shape), accumulate);
}

// The accumulation projection of step t, into the scratch: purpose 3, index t.
Tensor Gradients::projection(const Entry& e) {
  const Compression shape = compression(e);
  const Tensor p = projection_.tensor({shape.rank, shape.dimension()});
  const RandomKey key{
      .seed = config_.seed, .purpose = RandomPurpose::kAccumulationProjection, .tensor = e.parameter.hash()};
  backend_.generate_projection(p, config_.projection, key, &scalars_->step);
  return p;
}

// ---- memory

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

Gradients::Keep Gradients::keep(const Parameter& parameter) const {
  if (config_.kind == GradientMode::kFused && config_.micro_batches == 1) return Keep::kNothing;
  const bool projected =
      config_.kind != GradientMode::kDense &&
      is_compressed(parameter, config_.accumulation_rank, config_.compress_embeddings, config_.projection);
  return projected ? Keep::kProjectedSum : Keep::kSum;
}

// Of a full sum.
DType Gradients::sum_dtype(const Parameter& parameter) const {
  if (parameter.long_lived) return DType::kF32;
  return config_.micro_batches > 1 ? config_.accumulation_dtype : config_.gradient_dtype;
}

// Sums of several micro-batches live through the next forward pass; of a single one, until the update.
uint32_t Gradients::sum_phases(const Parameter& parameter) const {
  return config_.micro_batches > 1 ? static_cast<uint32_t>(kPhaseAlways) : gradient_phases(parameter) | kPhaseUpdate;
}

// Buffers are used by the backward pass, and again where the updates come later: they decompress, or what is in them
// has been under way.
uint32_t Gradients::buffer_phases(const Parameter& parameter) const {
  const bool later = config_.kind == GradientMode::kCompressed || (config_.kind == GradientMode::kFused && shared());
  return gradient_phases(parameter) | (later ? static_cast<uint32_t>(kPhaseUpdate) : 0);
}

void Gradients::reserve_buffers() {
  constexpr int64_t kVectorAlignment = 64;  // elements
  const int turns = two_buffers() ? 2 : 1;
  std::map<int, int64_t> vectors;  // elements by layer
  for (Entry& e : entries_) {
    const Parameter& p = e.parameter;
    const uint32_t phases = buffer_phases(p);
    if (e.keep == Keep::kProjectedSum) {
      const Compression shape = compression(e);
      projection_.reserve(shape.projection_elements(), phases);
      if (config_.accumulation_dtype != DType::kF32) projected_.reserve(shape.compressed_elements(), phases);
    }
    if (!e.buffered) continue;
    const int64_t block = block_rows(p) * p.cols;
    if (p.long_lived) {
      rows_.reserve(block);
    } else if (p.matrix) {
      for (int turn = 0; turn < (turns > 1 && block == 0 ? 2 : 1); ++turn)
        matrices_[turn].reserve(block > 0 ? block : p.padded_elements(), phases);
    } else {
      int64_t& used = vectors[p.layer];
      e.vector_offset = used;
      used += (p.elements() + kVectorAlignment - 1) / kVectorAlignment * kVectorAlignment;
      if (p.layer < 0) top_vectors_.reserve(used, phases);
      for (int turn = 0; p.layer >= 0 && turn < turns; ++turn) vectors_[turn].reserve(used, phases);
    }
  }
}

void Gradients::declare(MemoryPlan& plan) {
  constexpr Category kGradients = Category::kGradients;
  for (Entry& e : entries_) {
    const Parameter& p = e.parameter;
    if (e.keep == Keep::kSum)
      plan.add(&e.sum, p.name + ".gradient", kGradients, sum_dtype(p), {p.padded_rows, p.cols}, sum_phases(p));
    if (e.keep == Keep::kProjectedSum)
      plan.add(&e.sum, p.name + ".accumulator", kGradients, config_.accumulation_dtype,
               {compression(e).compressed_rows(), compression(e).compressed_cols()}, sum_phases(p));
    if (e.buffered && p.long_lived && !wants_blocks(p))
      plan.add(&e.buffer, p.name + ".gradient", kGradients, DType::kF32, {p.padded_rows, p.cols}, buffer_phases(p));
  }
  for (Scratch* shared :
       {&matrices_[0], &matrices_[1], &rows_, &vectors_[0], &vectors_[1], &top_vectors_, &projection_, &projected_})
    shared->declare(plan);
  plan.add(&squares_, "gradient.squares", Category::kWorkspace, DType::kF32, {1});
  if (config_.kind == GradientMode::kCompressed)
    plan.add(&sum_squares_, "gradient.sum_squares", Category::kWorkspace, DType::kF32, {1});
}

Tensor Gradients::buffer_of(const Entry& e) const {
  const Parameter& p = e.parameter;
  const DType dtype = config_.gradient_dtype;
  if (p.long_lived) return wants_blocks(p) ? p.tensor(rows_.data(), DType::kF32) : p.tensor(e.buffer);
  if (p.matrix) return p.tensor(matrices_[e.turn].data(), dtype);
  char* const vectors = static_cast<char*>((p.layer < 0 ? top_vectors_ : vectors_[e.turn]).data());
  return p.tensor(vectors + static_cast<size_t>(e.vector_offset) * dtype_size(dtype), dtype);
}

Tensor Gradients::sum_of(const Entry& e) const {
  return e.keep == Keep::kProjectedSum ? e.sum : e.parameter.tensor(e.sum);
}
