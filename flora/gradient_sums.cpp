// gradient_sums.cpp: the memory of Gradients (gradients.h): sums over micro-batches, in full or projected, and the
// buffers that a gradient is written to before it is added or used.
#include <map>

#include "flora/gradients.h"

namespace {

// Where a parameter's gradient is alive within a micro-batch: a block's in the backward pass, those outside the blocks
// from the head on, but for an embedding that has no part in the head.
uint32_t gradient_phases(const Parameter& parameter) {
  if (parameter.layer >= 0 || (parameter.embedding && !parameter.long_lived)) return kPhaseBackward;
  return kPhaseHead | kPhaseBackward;
}

}  // namespace

// ---- sums over micro-batches

// The gradient of this micro-batch is complete: it is added to the sum, unless it was written in its place.
void Gradients::add_to_sum(Entry& e) {
  if (e.keep == Keep::kProjectedSum) {
    if (e.sum.dtype == DType::kF32) {
      project(e, e.sum, e.sum_written);
    } else {
      const Compression shape = compression(e);
      const Tensor projected = projected_.tensor({shape.compressed_rows(), shape.compressed_cols()});
      project(e, projected, false);
      add_rounded(e, projected);
    }
  } else if (e.buffered) {
    add_rounded(e, buffer_of(e));
  }
  e.sum_written = true;
  e.buffer_written = false;
}

// out (+)= the projected gradient of this micro-batch.
void Gradients::project(Entry& e, Tensor out, bool accumulate) {
  const Compression shape = compression(e);
  if (is_transformed(backend_, config_.projection, shape)) {
    backend_.cosine_down(out, buffer_of(e), {}, cosine_projection(e), accumulate);
  } else {
    project_down(backend_, out, buffer_of(e), projection(e), shape, accumulate);
  }
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
  const float factor = unbiased_factor(config_.projection, shape);
  if (is_transformed(backend_, config_.projection, shape)) {
    backend_.cosine_up({.out = out, .in = accumulate ? out : Tensor{}}, e.sum, cosine_projection(e), factor);
    return;
  }
  const Tensor p = projection(e);
  Tensor sum = e.sum;
  if (p.dtype == DType::kF32 && sum.dtype != DType::kF32) {  // else both would meet in bf16: another projection
    sum = projected_.tensor({shape.compressed_rows(), shape.compressed_cols()});
    backend_.convert(sum, e.sum);
  }
  project_up(backend_, out, sum, p, shape, factor, accumulate);
}

// The accumulation projection of step t, into the scratch: purpose 3, index t.
Tensor Gradients::projection(const Entry& e) {
  const Compression shape = compression(e);
  const Tensor p = projection_.tensor({shape.rank, shape.dimension()});
  backend_.generate_projection(p, config_.projection, projection_key(e), &scalars_->step);
  return p;
}

CosineProjection Gradients::cosine_projection(const Entry& e) const {
  const Compression shape = compression(e);
  return {.rank = shape.rank, .of_rows = shape.wide(), .key = projection_key(e), .index = &scalars_->step};
}

RandomKey Gradients::projection_key(const Entry& e) const {
  return {.seed = config_.seed, .purpose = RandomPurpose::kAccumulationProjection, .tensor = e.parameter.hash()};
}

// ---- memory

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
      const bool transformed = is_transformed(backend_, config_.projection, shape);
      if (!transformed) projection_.reserve(shape.projection_elements(), phases);
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
