// optimizers.h: what every optimizer does with a gradient, the options of all of them, and the factory that makes one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "flora/parameter.h"
#include "flora/states.h"
#include "kernels/backend.h"
#include "kernels/memory_plan.h"

enum class OptimizerKind : uint8_t { kFlora, kAdamW, kAdafactor, kSgd };
inline constexpr std::pair<OptimizerKind, const char*> kOptimizerNames[] = {{OptimizerKind::kFlora, "flora"},
                                                                            {OptimizerKind::kAdamW, "adamw"},
                                                                            {OptimizerKind::kAdafactor, "adafactor"},
                                                                            {OptimizerKind::kSgd, "sgd"}};

// What a change of projection does to a compressed momentum M, beside down'(up(M)).
enum class TransferKind : uint8_t {
  kReencode,  // nothing: orthonormal projections forget (r / d of M remains on average), others inflate
  kUnbiased,  // orthonormal ones: times d / r, so that what M decodes to is kept on average, and inflates
  kRescale,   // times what restores the norm of M
  kRestart,   // M becomes 0 instead
};
inline constexpr std::pair<TransferKind, const char*> kTransferNames[] = {{TransferKind::kReencode, "reencode"},
                                                                          {TransferKind::kUnbiased, "unbiased"},
                                                                          {TransferKind::kRescale, "rescale"},
                                                                          {TransferKind::kRestart, "restart"}};

// Which gradients are computed and used in blocks of rows instead of as a whole. Only under fused updates with one
// micro-batch.
enum class GradientBlocks : uint8_t {
  kWhole,      // none
  kEmbedding,  // long-lived ones: the token embedding's and the head's
  kAll,        // those of the blocks' matrices, too
};
inline constexpr std::pair<GradientBlocks, const char*> kGradientBlocksNames[] = {
    {GradientBlocks::kWhole, "whole"}, {GradientBlocks::kEmbedding, "embedding"}, {GradientBlocks::kAll, "all"}};

// Rows in a block of this parameter's gradient, 0 where it is not in blocks. A block has about as many elements as the
// square of the parameter's smaller dimension, and begins where a block of 8-bit codes does.
int64_t gradient_block_rows(const Parameter& parameter, GradientBlocks blocks);

// A gradient for an update: as a whole, or in blocks of rows of which one exists at a time. Whoever needs several
// passes over blocks computes them several times.
class Gradient {
 public:
  // load(begin, count): rows [begin, begin + count) of the gradient, valid until the next call; may be changed.
  using Load = std::function<Tensor(int64_t begin, int64_t count)>;

  // squares: where an update leaves the sum of the squares of this gradient, which it reads anyway.
  Gradient(const Tensor& whole, SquaresTarget squares = {}) : whole_(whole), squares_(squares) {}
  Gradient(int64_t rows, int64_t block_rows, Load load)
      : rows_(rows), block_rows_(block_rows), load_(std::move(load)) {}

  const Tensor& whole() const { return whole_; }  // an empty tensor where it is in blocks
  SquaresTarget squares() const { return squares_; }

  // One pass: f(which rows, their gradient), once with everything or for every block, in order.
  template <typename F>
  void pass(F&& f) const {
    if (whole_) f(RowRange{}, whole_);
    for (int64_t begin = 0; begin < rows_; begin += block_rows_) {
      const RowRange rows{begin, std::min(block_rows_, rows_ - begin)};
      f(rows, load_(rows.begin, rows.count));
    }
  }

 private:
  Tensor whole_;
  SquaresTarget squares_;
  int64_t rows_ = 0, block_rows_ = 1;
  Load load_;
};

// One of a layer's vectors that are updated together.
struct VectorGradient {
  const Parameter* parameter = nullptr;
  Tensor weight, master, gradient;  // [cols]; master may be empty
};

// All options of all optimizers; docs/design.md gives the formulas that use them. Adafactor is Flora with rank 0.
struct OptimizerConfig {
  OptimizerKind kind = OptimizerKind::kFlora;
  uint64_t seed = 0;                // the run's seed
  float beta1 = 0.9f;               // 0: no momentum and no memory for it
  float weight_decay = 0.0f;        // applied to parameters of the decay group
  float matrix_lr_scale = 1.0f;     // factor on the learning rate of the blocks' matrices
  DType state_dtype = DType::kF32;  // kF32, kBF16 or kI8: momentum (and full second moments, as kU8, when kI8);
                                    // 1-D parameters and factored statistics stay fp32 under kI8

  int64_t half_life = 0;        // of the second moment, in tokens; 0: beta2 and decay_rate alone say
  int64_t tokens_per_step = 0;  // what half_life is compared with

  // AdamW
  float beta2 = 0.95f;
  float eps = 1e-8f;

  // Flora and Adafactor
  int64_t rank = 256;
  uint32_t kappa = 200;
  float decay_rate = -0.8f;
  float eps1 = 1e-30f, eps2 = 1e-3f;
  float clip = 1.0f;  // of rms(update)
  bool factored = true;
  bool scale_parameter = false;
  bool relative_step = false;  // lr_t = min(1e-2 or, with warmup_init, 1e-6 t; 1/sqrt(t)) instead of the schedule
  bool warmup_init = false;
  bool compress_embeddings = false;
  bool embedding_momentum = true;  // of the token embedding and the head, where they are elongated
  ProjectionKind projection = ProjectionKind::kCosine;
  TransferKind transfer = TransferKind::kReencode;
  bool residual = false;  // what the projection does not hold is used at full weight; orthonormal projections only

  // Memory
  LayerPlace states;                               // of the blocks; in parts: AdamW and SGD only
  GradientBlocks blocks = GradientBlocks::kWhole;  // which gradients come in blocks of rows
  int64_t weight_piece = int64_t{1} << 22;  // elements of an 8-bit weight that are decoded for an update at a time
};

// Decay of a second moment over one step that has config.half_life: 0.5^(tokens_per_step / half_life). "Small batch
// size training for language models" (arXiv 2507.07101) finds that the half-life in tokens is what carries over from
// one batch size to another.
float half_life_decay(const OptimizerConfig& config);

class Optimizer {
 public:
  Optimizer(const OptimizerConfig& config, const std::vector<Parameter>& parameters, Backend& backend);
  virtual ~Optimizer() = default;
  virtual void declare(MemoryPlan& plan);

  // Writes the step's scalars this optimizer needs (beta2, bias corrections, projection indices; lr when it has a
  // schedule of its own) into the host-side struct; called once per step, before any update().
  virtual void begin_step(uint32_t step, StepScalars& scalars) = 0;

  // Which of several sequences of operations update() issues in the step begun last; steps with the same number issue
  // the same ones.
  virtual uint32_t variant() const { return 0; }

  // Updates `weight` ([rows, cols] or [cols], maybe with a master copy) from `gradient`, whose contents are used up; in
  // blocks or not makes no difference but in the rounding of sums. All are views of the unpadded parameter. `scalars`
  // is in device memory.
  virtual void update(const Parameter& parameter, Tensor weight, Tensor master, const Gradient& gradient,
                      StepScalars* scalars) = 0;

  // Updates several 1-D parameters of one layer, in one operation. squares: of their gradients, one after another.
  virtual void update_vectors(std::span<const VectorGradient> vectors, SquaresTarget squares, StepScalars* scalars) = 0;

  // Updates a rank's part of a matrix that is spread over ranks, as update() would; with config.states.parts, of
  // optimizers that work element by element.
  virtual void update_part(const Parameter& parameter, const ParameterStore::Kept& kept, const Gradient& gradient,
                           StepScalars* scalars);
  bool updates_parts() const { return config_.states.parts; }

  // All states, in the order of the parameters; those of streamed layers without their memory.
  const std::vector<StateTensor>& state() const { return states_.list(); }
  StateStore& states() { return states_; }

  // Parameters whose momentum is compressed; empty for optimizers that compress nothing (a reason to warn).
  virtual std::vector<std::string> compressed_parameters() const { return {}; }

 protected:
  // States of a parameter's own shape, for the constructor; return their numbers in states_. Momentum has the state
  // dtype, but 1-D parameters keep fp32 beside int8 states. Second moments are fp32, those of matrices uint8 beside
  // int8.
  int add_momentum(const Parameter& parameter);  // -1 with beta1 = 0
  int add_second_moment(const Parameter& parameter);

  // The update of a vector, all but its states.
  ParameterUpdate update_of(const VectorGradient& vector) const;

  // The key of a parameter's rounding, from element `begin` on.
  RandomKey rounding(const Parameter& parameter, int64_t begin = 0) const;
  float decay_of(const Parameter& parameter) const { return parameter.decay ? config_.weight_decay : 0.0f; }
  float lr_scale_of(const Parameter& p) const { return p.matrix && p.layer >= 0 ? config_.matrix_lr_scale : 1.0f; }

  OptimizerConfig config_;
  Backend& backend_;
  StateStore states_;
  WeightPieces pieces_;
};

// gradient_dtype: of random projections, as a rule that of the gradients that update() gets.
std::unique_ptr<Optimizer> make_optimizer(const OptimizerConfig& config, const std::vector<Parameter>& parameters,
                                          DType gradient_dtype, Backend& backend);
