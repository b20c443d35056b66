// gradient_storage.cpp: buffers and sums of gradients; see gradient_storage.h. A compressed sum costs one matmul of
// 2 r n m operations per micro-batch and one to decompress; a bf16 sum one pass over the gradient.
#include "flora/gradient_storage.h"

#include <algorithm>
#include <map>

#include "flora/optimizer_state.h"

namespace {

constexpr int64_t kVectorAlignment = 64;  // elements

}  // namespace

GradientStorage::GradientStorage(const SinkConfig& config, const std::vector<Parameter>& parameters,
                                 const std::vector<Keep>& keep, uint32_t slot_phases, Backend& backend)
    : config_(config),
      backend_(backend),
      slot_phases_(slot_phases),
      projection_("gradient.projection", config.gradient_dtype),
      projected_("gradient.projected", DType::kF32),
      factor_("gradient.cholesky", DType::kF32) {
  require_indexed(parameters);
  for (size_t i = 0; i < parameters.size(); ++i) {
    Entry e;
    e.parameter = parameters[i];
    e.keep = keep[i];
    // A long-lived gradient is summed in fp32 in place, so only others need a slot in front of a bf16 sum.
    const bool rounded_sum = config.micro_batches > 1 && full_dtype(e.parameter) == DType::kBF16;
    e.has_slot = e.keep != Keep::kFull || rounded_sum;
    if (e.keep == Keep::kCompressed) {
      const Compression shape = compression(e);
      projection_.reserve(shape.projection_elements());
      if (config.accumulation_dtype != DType::kF32) projected_.reserve(shape.compressed_elements());
      factor_.reserve(static_cast<int64_t>(factor_scratch_bytes(config.projection, shape.rank) / sizeof(float)));
      compressed_phases_ |= gradient_phases(e.parameter) | slot_phases_;
    }
    entries_.push_back(e);
  }
  reserve_slots();
}

// Elements of a matrix's slot: a block, or everything.
int64_t GradientStorage::slot_elements(const Parameter& parameter) const {
  const int64_t rows = block_rows(parameter);
  return rows > 0 ? rows * parameter.cols : parameter.padded_elements();
}

// Sizes of the shared slots: the largest matrix, the vectors of the largest layer, those outside the layers.
void GradientStorage::reserve_slots() {
  std::map<int, int64_t> vectors;  // elements by layer
  for (Entry& e : entries_) {
    if (uses_shared_matrix(e)) {
      matrix_elements_ = std::max(matrix_elements_, slot_elements(e.parameter));
      matrix_phases_ |= gradient_phases(e.parameter) | slot_phases_;
    }
    if (e.parameter.long_lived && block_rows(e.parameter) > 0)
      long_lived_block_elements_ = std::max(long_lived_block_elements_, slot_elements(e.parameter));
    if (uses_vectors(e)) {
      int64_t& used = vectors[e.parameter.layer];
      e.vector_offset = used;
      used += (e.parameter.elements() + kVectorAlignment - 1) / kVectorAlignment * kVectorAlignment;
      int64_t& size = e.parameter.layer < 0 ? top_vector_elements_ : layer_vector_elements_;
      size = std::max(size, used);
    }
  }
}

bool GradientStorage::uses_shared_matrix(const Entry& e) const {
  return e.has_slot && !e.parameter.long_lived && e.parameter.matrix;
}

DType GradientStorage::full_dtype(const Parameter& parameter) const {
  if (parameter.long_lived) return DType::kF32;
  return config_.micro_batches > 1 ? config_.accumulation_dtype : config_.gradient_dtype;
}

// Sums of several micro-batches live through the next forward pass; of a single one, until the update.
uint32_t GradientStorage::kept_phases(const Entry& e) const {
  return config_.micro_batches > 1 ? static_cast<uint32_t>(kPhaseAlways) : gradient_phases(e.parameter) | kPhaseUpdate;
}

void GradientStorage::declare(MemoryPlan& plan) const {
  constexpr Category kGradients = Category::kGradients;
  for (const Entry& e : entries_) {
    const Parameter& p = e.parameter;
    if (e.keep == Keep::kFull)
      plan.add_tensor(p.name + ".gradient", kGradients, full_dtype(p), p.padded_elements(), kept_phases(e));
    if (e.keep == Keep::kCompressed)
      plan.add_tensor(p.name + ".accumulator", kGradients, config_.accumulation_dtype,
                      compression(e).compressed_elements(), kept_phases(e));
    if (e.has_slot && p.long_lived && block_rows(p) == 0)
      plan.add_tensor(p.name + ".gradient", kGradients, DType::kF32, p.padded_elements(),
                      gradient_phases(p) | slot_phases_);
  }
  const DType dtype = config_.gradient_dtype;
  if (matrix_elements_ > 0) plan.add_tensor("gradient.matrix", kGradients, dtype, matrix_elements_, matrix_phases_);
  if (long_lived_block_elements_ > 0)
    plan.add_tensor("gradient.rows", kGradients, DType::kF32, long_lived_block_elements_, kPhaseBackward);
  if (layer_vector_elements_ > 0)
    plan.add_tensor("gradient.vectors", kGradients, dtype, layer_vector_elements_, kPhaseBackward | slot_phases_);
  if (top_vector_elements_ > 0)
    plan.add_tensor("gradient.top_vectors", kGradients, dtype, top_vector_elements_,
                    kPhaseHead | kPhaseBackward | slot_phases_);
  for (const Scratch* scratch : {&projection_, &projected_, &factor_}) scratch->declare(plan, compressed_phases_);
}

void GradientStorage::bind(Arena& arena) {
  const DType dtype = config_.gradient_dtype;
  const auto shared = [&](const char* name, int64_t elements) {
    return elements > 0 ? arena.tensor(name, dtype, {elements}).as<char>() : nullptr;
  };
  char* const matrix = shared("gradient.matrix", matrix_elements_);
  void* const rows = long_lived_block_elements_ > 0
                         ? arena.tensor("gradient.rows", DType::kF32, {long_lived_block_elements_}).data
                         : nullptr;
  char* const vectors = shared("gradient.vectors", layer_vector_elements_);
  char* const top_vectors = shared("gradient.top_vectors", top_vector_elements_);
  for (Entry& e : entries_) {
    const Parameter& p = e.parameter;
    if (e.keep == Keep::kFull)
      e.sum = p.tensor(arena.tensor(p.name + ".gradient", full_dtype(p), {p.padded_elements()}).data, full_dtype(p));
    if (e.keep == Keep::kCompressed)
      e.sum = arena.tensor(p.name + ".accumulator", config_.accumulation_dtype,
                           {compression(e).compressed_rows(), compression(e).compressed_cols()});
    if (p.long_lived && block_rows(p) > 0) {
      e.slot = p.tensor(rows, DType::kF32);
    } else if (e.has_slot && p.long_lived) {
      e.slot = p.tensor(arena.tensor(p.name + ".gradient", DType::kF32, {p.padded_elements()}).data, DType::kF32);
    } else if (uses_shared_matrix(e)) {
      e.slot = p.tensor(matrix, dtype);
    } else if (uses_vectors(e)) {
      char* const base = p.layer < 0 ? top_vectors : vectors;
      e.slot = p.tensor(base + static_cast<size_t>(e.vector_offset) * dtype_size(dtype), dtype);
    }
  }
  for (Scratch* scratch : {&projection_, &projected_, &factor_}) scratch->bind(arena);
}

void GradientStorage::begin_micro_batch(int index, StepScalars* scalars) {
  scalars_ = scalars;
  if (index > 0) return;
  for (Entry& e : entries_) e.slot_written = e.sum_written = false;
}

GradientSink::Target GradientStorage::target(const Parameter& parameter) {
  Entry& e = entry(parameter);
  bool& written = e.has_slot ? e.slot_written : e.sum_written;
  const GradientSink::Target target{e.has_slot ? e.slot : e.sum, written};
  written = true;
  return target;
}

// The accumulation projection of step t, into the scratch: purpose 3, index t.
Tensor GradientStorage::generate(const Entry& e) {
  const Compression shape = compression(e);
  const Tensor p = projection_.tensor({shape.rank, shape.dimension()});
  const RandomKey key{
      .seed = config_.seed, .purpose = RandomPurpose::kAccumulationProjection, .tensor = e.parameter.hash()};
  make_projection(backend_, p, {config_.projection, key, &scalars_->step}, factor_.data(), scalars_);
  return p;
}

// sum (+)= added, rounded stochastically in bf16.
void GradientStorage::add_to(Entry& e, Tensor added) {
  if (!e.sum_written) backend_.fill(e.sum.data, 0, e.sum.bytes());
  backend_.accumulate(e.sum, added,
                      {.seed = config_.seed, .purpose = RandomPurpose::kGradientRounding, .tensor = e.parameter.hash()},
                      &scalars_->rounding_counter);
}

void GradientStorage::add(const Parameter& parameter) {
  Entry& e = entry(parameter);
  if (e.keep == Keep::kCompressed) {
    const Compression shape = compression(e);
    const Tensor p = generate(e);
    if (e.sum.dtype == DType::kF32) {
      project_down(backend_, e.sum, e.slot, p, shape, e.sum_written);
    } else {
      const Tensor projected = projected_.tensor({shape.compressed_rows(), shape.compressed_cols()});
      project_down(backend_, projected, e.slot, p, shape, false);
      add_to(e, projected);
    }
  } else if (e.keep == Keep::kFull && e.has_slot) {
    add_to(e, e.slot);
  }
  e.sum_written = true;
  e.slot_written = false;
}

Tensor GradientStorage::finish(const Parameter& parameter) {
  Entry& e = entry(parameter);
  if (e.keep == Keep::kFull) {
    add(parameter);
    return e.sum;
  }
  e.slot_written = false;
  if (e.keep == Keep::kCompressed && e.sum_written)
    project_up(backend_, e.slot, e.sum, generate(e), compression(e), 1.0f, true);
  return e.slot;
}

Tensor GradientStorage::gradient(const Parameter& parameter) {
  Entry& e = entry(parameter);
  if (e.keep != Keep::kCompressed) return e.sum;
  project_up(backend_, e.slot, e.sum, generate(e), compression(e), 1.0f, false);
  return e.slot;
}

Tensor GradientStorage::sum(const Parameter& parameter) const {
  return entries_.at(static_cast<size_t>(parameter.index)).sum;
}
