// flora.h: Flora (Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024, arXiv
// 2402.03293, Algorithm 2 on an Adafactor base) and, with rank 0, Adafactor (arXiv 1804.04235) with momentum.
//
// With `residual` what the projection does not hold is not averaged away but used at full weight, as in
// Fira (arXiv 2410.01623) and arXiv 2512.07112; see docs/design.md.
//
// State of a compressed parameter [n, m]: momentum r max(n, m), row and column statistics n + m. An update makes two
// matmuls of 2 r n m operations (or transforms, see projection.h) and eight passes over the gradient and the weight
// (docs/design.md, "Flora, exactly").
#pragma once

#include <span>
#include <string>
#include <vector>

#include "flora/optimizers.h"
#include "flora/projection.h"

// By which factor the norm of a compressed momentum is expected to grow from one change of projection to the next, the
// largest over the parameters: beta1^kappa sqrt(1 + (d + 1)/r) for Gaussian projections, (d - 1) for Rademacher ones,
// when it is re-encoded, and beta1^kappa sqrt(d/r) for orthonormal ones that are kept unbiased (docs/design.md, "Flora,
// exactly"). From 1 on it grows without bound. 0 where nothing is compressed or a transfer cannot inflate.
double transfer_growth(const OptimizerConfig& config, const std::vector<Parameter>& parameters);

// The transfer of a run that chose none: the paper's reencode while it is bounded, else rescale.
TransferKind bounded_transfer(OptimizerConfig config, const std::vector<Parameter>& parameters);

class Flora final : public Optimizer {
 public:
  Flora(const OptimizerConfig& config, const std::vector<Parameter>& parameters, DType gradient_dtype,
        Backend& backend);

  void declare(MemoryPlan& plan) override;
  void begin_step(uint32_t step, StepScalars& scalars) override;
  uint32_t variant() const override { return transfer_due_ ? 1 : 0; }
  void update(const Parameter& parameter, Tensor weight, Tensor master, const Gradient& gradient,
              StepScalars* scalars) override;
  void update_vectors(std::span<const VectorGradient> vectors, SquaresTarget squares, StepScalars* scalars) override;
  std::vector<std::string> compressed_parameters() const override;

 private:
  // What one parameter keeps from step to step, as numbers in states_; -1 for what it does not need.
  struct Entry {
    Parameter parameter;
    bool factored = false;     // row and col instead of second_moment
    bool compressed = false;   // momentum is [r, m] or [n, r]
    bool transformed = false;  // by cosine transforms; else by products with projections that are made
    int momentum = -1, row = -1, col = -1, second_moment = -1;
  };

  Compression compression(const Entry& entry) const { return {entry.parameter, config_.rank}; }
  void add_states(Entry& entry);
  void reserve_scratch(const Entry& entry);

  // The parts of an update, in this order; compress() and to_update() for all rows or block by block.
  bool second_moment(const Entry& entry, const Gradient& gradient, StepScalars* scalars);
  void begin_momentum(const Entry& entry, bool projected, StepScalars* scalars);
  void compress(const Entry& entry, Tensor gradient, const RowRange& rows, StepScalars* scalars);
  ScaledSum momentum_less_s(const Entry& entry) const;
  void to_update(const Entry& entry, Tensor gradient, const RowRange& rows, bool keep_momentum, SquaresTarget squares,
                 const ScaledSum* beside, StepScalars* scalars);
  void apply(const Entry& entry, Tensor weight, Tensor master, Tensor update, const RowRange& rows,
             const MomentumAverage* average, StepScalars* scalars);
  void transfer_momentum(const Entry& entry, StepScalars* scalars);

  const uint32_t* decoder(const StepScalars* scalars) const;
  void generate(const Entry& entry, Tensor p, const uint32_t* index);
  CosineProjection cosine_projection(const Entry& entry, const uint32_t* index) const;
  RandomKey projection_key(const Entry& entry) const;
  MomentumAverage average_of(const Entry& entry) const;
  Tensor projection_of(const Entry& entry, const Scratch& scratch) const;
  Tensor compressed_of(const Entry& entry, const Scratch& scratch) const;
  bool keeps_residual(const Entry& entry) const { return entry.compressed && config_.residual; }
  void decode_momentum(const Entry& entry);
  Tensor momentum_numbers(const Entry& entry) const;
  Tensor copied_momentum(Tensor rows);

  std::vector<Entry> entries_;  // by Parameter::index
  bool transfer_due_ = false;

  // Shared by all parameters; sized for the largest.
  Scratch row_scale_, col_scale_;           // fp32
  Scratch projection_, scaled_projection_;  // [r, d], the gradient's dtype: of the momentum; of S
  Scratch compressed_;                      // S, fp32
  Scratch decoded_momentum_;                // a compressed momentum as products take it, or what --residual decodes
  Scratch moved_;                           // a compressed momentum of a transfer, fp32
  Scratch square_;                          // [r, r] of a transfer, fp32
  Scratch copied_momentum_;                 // a block's rows of an uncompressed momentum, in its dtype
  // Codes are no numbers yet, and bf16 numbers beside fp32 projections would be multiplied in bf16, both of them.
  bool decodes_momentum_;
  Tensor squares_;  // [4]: of the update, of the weight, of the momentum before and after a transfer
};
