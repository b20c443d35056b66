// flora.h: Flora (Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024, arXiv
// 2402.03293, Algorithm 2 on an Adafactor base) and, with rank 0, Adafactor (arXiv 1804.04235) with momentum.
//
// State of a compressed parameter [n, m]: momentum r max(n, m), row and column statistics n + m. An update makes two
// matmuls of 2 r n m operations and about ten passes over the gradient and the weight (docs/design.md, "Flora,
// exactly").
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "flora/optimizer.h"
#include "flora/projection.h"

// By which factor the norm of a compressed momentum is expected to grow from one change of projection to the next, the
// largest over the parameters: beta1^kappa sqrt(1 + (d + 1)/r) for Gaussian projections, (d - 1) for Rademacher ones,
// when it is re-encoded (docs/design.md, "Flora, exactly"). From 1 on it grows without bound. 0 where nothing is
// compressed or a transfer cannot inflate.
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
  std::vector<std::string> compressed_parameters() const override;

 private:
  // What one parameter keeps from step to step, as numbers in states_; -1 for what it does not need.
  struct Slot {
    Parameter parameter;
    bool factored = false;    // row and col instead of second_moment
    bool compressed = false;  // momentum is [r, m] or [n, r]
    int momentum = -1, row = -1, col = -1, second_moment = -1;
  };

  bool has_momentum() const { return config_.beta1 > 0; }
  Compression compression(const Slot& slot) const { return {slot.parameter, config_.rank}; }
  void add_states(Slot& slot);
  void reserve_scratch(const Slot& slot);
  void project_with(const Slot& slot, Tensor p, const uint32_t* index, StepScalars* scalars);
  Tensor projection_of(const Slot& slot, const Scratch& scratch) const;
  Tensor compressed_of(const Slot& slot, const Scratch& scratch) const;
  void decode_momentum(const Slot& slot);
  Tensor momentum_numbers(const Slot& slot) const;

  void update_whole(const Slot& slot, Tensor weight, Tensor master, Tensor gradient, StepScalars* scalars);
  void update_in_blocks(const Slot& slot, Tensor weight, Tensor master, const Gradient& gradient, StepScalars* scalars);

  // gradient <- D, the update before clipping; the momentum moves on.
  void normalise(const Slot& slot, Tensor gradient, StepScalars* scalars);
  void compressed_momentum(const Slot& slot, Tensor gradient, StepScalars* scalars);
  void change_projection(const Slot& slot, Tensor momentum, Tensor p_old, Tensor p_new);

  // The same for rows of a gradient in blocks, whose scales are known and whose projections are made.
  void prepare_compressed(const Slot& slot, StepScalars* scalars);
  void finish_compressed(const Slot& slot, StepScalars* scalars);
  void to_update(const Slot& slot, Tensor gradient, int64_t begin, bool keep_momentum, StepScalars* scalars);
  Tensor copied_momentum(Tensor rows);

  void apply(const Slot& slot, Tensor weight, Tensor master, Tensor update, const RowRange& rows, StepScalars* scalars);

  std::vector<Slot> slots_;  // by Parameter::index
  bool transfer_due_ = false;

  // Shared by all parameters; sized for the largest.
  Scratch row_scale_, col_scale_;     // fp32
  Scratch projection_, projection2_;  // [r, d], the gradient's dtype
  Scratch compressed_;                // S, fp32
  Scratch decoded_momentum_, moved_;  // as large as a compressed momentum: of int8 states; of a transfer, fp32
  Scratch square_;                    // [r, r] of a transfer, fp32
  Scratch factor_;                    // r*r doubles of an orthonormal projection, as fp32 pairs
  Scratch copied_momentum_;           // a block's rows of an uncompressed momentum, in its dtype
  Tensor squares_;                    // [4]: of the update, of the weight, of the momentum before and after a transfer
};
