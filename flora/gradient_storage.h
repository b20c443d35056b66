// gradient_storage.h: the memory of gradients behind all sinks: what the backward pass writes into, and what is kept
// of it from one micro-batch to the next.
//
// A gradient is written either straight into the sum of its step (`kFull`) or into a slot that other parameters use,
// too: one matrix, the vectors of one layer, the vectors outside the layers; a long-lived gradient has a slot of its
// own. A slot is then used up at once (`kSlot`), added to a full sum with stochastic rounding (a bf16 sum), or
// projected and added to a compressed one (`kCompressed`). Of a gradient in blocks the slot holds one block: the matrix
// slot, or for long-lived ones a slot that they share, in fp32.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "flora/gradient_sink.h"
#include "flora/projection.h"
#include "flora/sinks.h"

class GradientStorage {
 public:
  enum class Keep : uint8_t { kSlot, kFull, kCompressed };

  // keep[i] is what is kept of parameter i. slot_phases: phases in which slots are used besides those in which the
  // backward pass fills them.
  GradientStorage(const SinkConfig& config, const std::vector<Parameter>& parameters, const std::vector<Keep>& keep,
                  uint32_t slot_phases, Backend& backend);

  void declare(MemoryPlan& plan) const;
  void bind(Arena& arena);

  // The next gradients belong to micro-batch `index` of a step; index 0 starts new sums.
  void begin_micro_batch(int index, StepScalars* scalars);

  GradientSink::Target target(const Parameter& parameter);

  // The gradient of this micro-batch is complete: adds it to the sum (nothing to do for one written in place).
  void add(const Parameter& parameter);

  // The same for the last micro-batch where the sum is used at once. Returns the whole gradient of the step: the slot,
  // to which a compressed sum is added decompressed, or the full sum.
  Tensor finish(const Parameter& parameter);

  // After the last micro-batch: the whole gradient of the step; a compressed one is decompressed into its slot and
  // valid until the next call.
  Tensor gradient(const Parameter& parameter);

  // The kept sum as it is: compressed, or in full.
  Tensor sum(const Parameter& parameter) const;

  // Of a gradient in blocks: rows in each (0: it is whole), and the memory of `rows` rows.
  int64_t block_rows(const Parameter& parameter) const { return gradient_block_rows(parameter, config_.blocks); }
  Tensor block(const Parameter& parameter, int64_t rows) { return entry(parameter).slot.slice(0, rows); }

 private:
  struct Entry {
    Parameter parameter;
    Keep keep = Keep::kSlot;
    bool has_slot = false;
    int64_t vector_offset = 0;  // in the slot of its layer's vectors
    Tensor slot, sum;
    bool slot_written = false, sum_written = false;
  };

  Entry& entry(const Parameter& parameter) { return entries_.at(static_cast<size_t>(parameter.index)); }
  bool uses_shared_matrix(const Entry& e) const;
  bool uses_vectors(const Entry& e) const { return e.has_slot && !e.parameter.long_lived && !e.parameter.matrix; }
  DType full_dtype(const Parameter& parameter) const;
  uint32_t kept_phases(const Entry& e) const;
  int64_t slot_elements(const Parameter& parameter) const;
  Compression compression(const Entry& e) const { return {e.parameter, config_.accumulation_rank}; }
  void reserve_slots();
  Tensor generate(const Entry& e);
  void add_to(Entry& e, Tensor added);

  SinkConfig config_;
  Backend& backend_;
  std::vector<Entry> entries_;  // by Parameter::index
  uint32_t slot_phases_, matrix_phases_ = 0, compressed_phases_ = 0;
  int64_t long_lived_block_elements_ = 0, matrix_elements_ = 0, layer_vector_elements_ = 0, top_vector_elements_ = 0;
  Scratch projection_, projected_, factor_;
  StepScalars* scalars_ = nullptr;
};
