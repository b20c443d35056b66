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

class Flora final : public Optimizer {
 public:
  Flora(const OptimizerConfig& config, const std::vector<Parameter>& parameters, DType gradient_dtype,
        Backend& backend);

  void declare(MemoryPlan& plan) const override;
  void bind(Arena& arena) override;
  void begin_step(uint32_t step, StepScalars& scalars) override;
  uint32_t variant() const override { return transfer_due_ ? 1 : 0; }
  void update(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient, StepScalars* scalars) override;
  std::vector<StateTensor> state() const override;
  std::vector<std::string> compressed_parameters() const override;

 private:
  // What one parameter keeps from step to step. Tensors that it does not need stay empty.
  struct Slot {
    Parameter parameter;
    bool factored = false;    // row and col instead of second_moment
    bool compressed = false;  // momentum is [r, m] or [n, r]
    Tensor momentum, row, col, second_moment;
  };

  bool has_momentum() const { return config_.beta1 > 0; }
  Compression compression(const Slot& slot) const { return {slot.parameter, config_.rank}; }
  ProjectionId projection(const Slot& slot, const uint32_t* index) const;

  // gradient <- D, the update before clipping; the momentum moves on.
  void normalise(Slot& slot, Tensor gradient, StepScalars* scalars);
  void compressed_momentum(Slot& slot, Tensor gradient, StepScalars* scalars);
  void project_scaled(const Slot& slot, Tensor out, Tensor gradient, Tensor p, Tensor scaled, Tensor row_scale,
                      Tensor col_scale);
  void change_projection(Slot& slot, Tensor momentum, Tensor p_old, Tensor p_new);

  OptimizerConfig config_;
  Backend& backend_;
  std::vector<Slot> slots_;  // by Parameter::index
  bool transfer_due_ = false;

  // Shared by all parameters; sized for the largest.
  Scratch row_scale_, col_scale_;     // fp32
  Scratch projection_, projection2_;  // [r, d], the gradient's dtype
  Scratch compressed_;                // S, fp32
  Scratch decoded_momentum_, moved_;  // fp32, as large as a compressed momentum: of int8 states; of a transfer
  Scratch square_;                    // [r, r] of a transfer, fp32
  Scratch factor_;                    // r*r doubles of an orthonormal projection, as fp32 pairs
  Tensor squares_;                    // [4]: of the update, of the weight, of the momentum before and after a transfer
};
