// gradients.h: what happens to a gradient. The model computes gradients and hands each one to a GradientSink; it does
// not know whether they are kept, used at once, or compressed. Gradients does one of the three:
//   dense       keeps every gradient and updates all weights after the last micro-batch. Memory: all gradients.
//   fused       updates a weight the moment its gradient is complete (LOMO, arXiv 2306.09782). Memory: the largest
//               matrix, the vectors of one layer, the long-lived gradients. With several micro-batches the sums are
//               kept, in full or projected, and the update happens in the last one.
//   compressed  keeps sums in a random projection of rank r, r / min(n, m) of their size, fresh every step; after the
//               last micro-batch one parameter at a time is decompressed and updated. Costs a matmul of 2 r n m
//               operations per micro-batch and one to decompress (two with clipping, once for the norm).
// The global norm comes out of a pass over all gradients where it is needed before the first update, and else out of
// the updates, which read them anyway.
//
// Of several ranks each computes some of a step's micro-batches. Their sum is formed where a gradient is complete, in
// the last micro-batch, beside the backward pass that goes on: of what is kept (dense, compressed: the projected sums
// are all that travels) or of the gradient itself (fused, which therefore has two buffers in turn). Everything after
// it, the norm, the second moment and the update, comes from the sum, so that it has the same bits on every rank.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "flora/optimizers.h"
#include "flora/parameter.h"
#include "flora/projection.h"
#include "kernels/backend.h"
#include "kernels/memory_plan.h"
#include "parallel/communicator.h"

// Protocol of one micro-batch: target()... ready() for each parameter.
// target() may be called several times for one parameter before ready() (the head's chunks and the lookup of a tied
// embedding); the first call of a step says accumulate = false unless an earlier micro-batch's gradient is there.
// Between target(p) and ready(p) the gradients of 1-D parameters and of long_lived parameters may be open at the same
// time as p; two other matrices may not. ready() is called once per parameter and micro-batch; by then the model has
// computed everything it needs from the parameter's old value, so the weight may change.
// A matrix may come through from_rows() instead; one for which wants_blocks() must.
class GradientSink {
 public:
  struct Target {
    Tensor tensor;    // [rows, cols] (1-D: [cols]); padded_rows rows of the embedding and the head are writable
    bool accumulate;  // add to what is there instead of overwriting it
  };

  virtual ~GradientSink() = default;
  virtual Target target(const Parameter& parameter) = 0;
  virtual void ready(const Parameter& parameter) = 0;

  // loss[0] (fp32, device) is the step's so far, with this micro-batch; called before the first ready() of a
  // micro-batch. With several ranks it is made the loss of all of them in the last one.
  virtual void loss(Tensor /*loss*/) {}

  // rows(out, begin, accumulate): writes, or adds, rows [begin, begin + out.rows()) of a gradient to `out`. The sink
  // asks for the rows it wants, as often as it wants.
  using Rows = std::function<void(Tensor out, int64_t begin, bool accumulate)>;
  virtual bool wants_blocks(const Parameter&) const { return false; }
  virtual void from_rows(const Parameter& parameter, const Rows& rows) {
    const Target whole = target(parameter);
    rows(whole.tensor, 0, whole.accumulate);
    ready(parameter);
  }
};

enum class GradientMode : uint8_t { kDense, kFused, kCompressed };
inline constexpr std::pair<GradientMode, const char*> kGradientModeNames[] = {
    {GradientMode::kDense, "dense"}, {GradientMode::kFused, "fused"}, {GradientMode::kCompressed, "compressed"}};

struct GradientConfig {
  GradientMode kind = GradientMode::kFused;
  int micro_batches = 1;                   // per step, of one rank
  DType gradient_dtype = DType::kF32;      // of a gradient as the backward pass writes it
  DType accumulation_dtype = DType::kF32;  // of one summed over micro-batches: fp32, or bf16 rounded stochastically
  int64_t accumulation_rank = 0;           // > 0: sums are kept projected (fused and compressed)
  ProjectionKind projection = ProjectionKind::kCosine;  // of the accumulated gradient
  std::optional<DType> projection_dtype = {};           // gradient_dtype where it is not said
  bool compress_embeddings = false;
  float clip_norm = 0;  // 0: off. Fused: needs two backward passes, see needs_norm_pass()
  uint64_t seed = 0;    // the run's seed
  GradientBlocks blocks = GradientBlocks::kWhole;
  bool layer_by_layer = false;  // a layer's updates are made before the model lets go of it: its weights are streamed
  // Fused updates run on the backend's update stream, beside the backward pass that goes on: one rank, whole gradients,
  // nothing streamed. Costs a second buffer for matrices and one for a layer's vectors.
  bool beside = false;
};

struct StepContext {
  uint32_t step = 1;  // t
  float lr = 0;
  StepScalars* scalars = nullptr;  // device memory, filled through Backend::copy in begin_step
  bool norm_pass = false;          // gradients are measured, nothing is updated
};

class Gradients final : public GradientSink {
 public:
  // Throws std::invalid_argument for a configuration that cannot be meant.
  Gradients(const GradientConfig& config, Optimizer& optimizer, ParameterStore& store, Backend& backend,
            Communicator& communicator = alone());

  void declare(MemoryPlan& plan);

  // Of a step: begin_step, for each micro-batch begin_micro_batch and the gradients of all parameters, end_step.
  void begin_step(const StepContext& context);
  void begin_micro_batch(int index, bool is_last);
  Target target(const Parameter& parameter) override;
  void ready(const Parameter& parameter) override;
  void loss(Tensor loss) override;
  bool wants_blocks(const Parameter& parameter) const override { return block_rows(parameter) > 0; }
  void from_rows(const Parameter& parameter, const Rows& rows) override;
  void end_step();

  // Fused, with clipping: the norm has to be known before the first update, so that all micro-batches run twice, first
  // as a step with norm_pass.
  bool needs_norm_pass() const { return config_.kind == GradientMode::kFused && clips(); }

  // Which of several sequences of operations this step (or pass) issues: those with the same number issue the same
  // ones, micro-batch by micro-batch. Valid after begin_step().
  uint32_t variant() const { return 2 * optimizer_.variant() + (norm_pass_ ? 1 : 0); }

  // Device scalar (fp32): sum of squares of the whole gradient of the step, valid after end_step().
  const float* gradient_squares() const { return squares_.as<float>(); }

 private:
  // What is kept of a gradient from one micro-batch to the next.
  enum class Keep : uint8_t { kNothing, kSum, kProjectedSum };

  // The gradient of one parameter. The backward pass writes it straight into the sum of its step, or into a buffer
  // that is then used at once, added to the sum with stochastic rounding, or projected. Parameters take turns with
  // buffers: all matrices with one, the vectors of all layers, the vectors outside them; a long-lived gradient has its
  // own. Of a gradient in blocks the buffer holds one block: the matrices', or one that long-lived ones share.
  struct Entry {
    Parameter parameter;
    Keep keep = Keep::kNothing;
    bool buffered = false;
    int64_t vector_offset = 0;  // in the vectors of its layer
    Tensor buffer, sum;         // as declared: with padding rows; see buffer_of(), sum_of()
    bool buffer_written = false, sum_written = false;
    int turn = 0;  // which of the shared buffers it has
  };

  // A buffer whose gradient the update stream is using.
  struct InUse {
    int done_event = 0;
    bool busy = false;
  };

  // A gradient of the step, complete.
  struct Complete {
    Entry* entry;
    Tensor gradient;
  };

  // Gradients that are becoming the sum of all ranks; the updates come in this order.
  struct Travelling {
    std::vector<Complete> gradients;
    Communicator::Ticket ticket;
  };

  // What of a layer the last micro-batch has had. Its vectors travel and are updated together.
  struct LayerProgress {
    size_t parameters = 0, vectors = 0;  // in all, without those that come in blocks
    size_t ready = 0;
    std::vector<Complete> waiting;  // its vectors that are ready
  };

  Entry& entry(const Parameter& parameter) { return entries_.at(static_cast<size_t>(parameter.index)); }
  bool clips() const { return config_.clip_norm > 0; }
  int64_t block_rows(const Parameter& parameter) const { return gradient_block_rows(parameter, config_.blocks); }

  // Memory.
  Keep keep(const Parameter& parameter) const;
  DType sum_dtype(const Parameter& parameter) const;
  uint32_t sum_phases(const Parameter& parameter) const;
  uint32_t buffer_phases(const Parameter& parameter) const;
  void reserve_buffers();
  Tensor buffer_of(const Entry& e) const;
  Tensor sum_of(const Entry& e) const;

  // Sums.
  void add_to_sum(Entry& e);
  void add_rounded(Entry& e, Tensor added);
  Tensor complete(Entry& e);
  Tensor whole(Entry& e);
  void decode_sum(const Entry& e, Tensor out, bool accumulate);
  Tensor projection(const Entry& e);
  RandomKey projection_key(const Entry& e) const;
  CosineProjection cosine_projection(const Entry& e) const;
  void project(Entry& e, Tensor out, bool accumulate);
  Compression compression(const Entry& e) const { return {e.parameter, config_.accumulation_rank}; }

  // Ranks.
  bool shared() const { return communicator_.size() > 1; }
  Tensor shared_gradient(Entry& e);
  void share(Entry& e);
  void send(std::vector<Complete> gradients);
  void receive();
  void free_buffer(const Entry& e);

  // The update stream.
  bool two_buffers() const { return config_.kind == GradientMode::kFused && (shared() || config_.beside); }
  bool runs_beside() const { return config_.beside && !serial_; }
  InUse& in_use(const Entry& e) { return in_use_[e.parameter.matrix ? 0 : 1][e.turn]; }
  template <typename Work>
  void beside(const std::vector<Complete>& gradients, Work&& work);
  void join();

  // Norm, clipping, update.
  void use(const std::vector<Complete>& gradients);
  void add_squares(std::span<const Tensor> gradients);
  SquaresTarget measured(std::span<const Tensor> gradients);
  static std::vector<Tensor> tensors_of(const std::vector<Complete>& gradients);
  void gate_on_sums();
  void gate_and_clip();
  void clip(std::span<const Tensor> gradients);
  void update(const Parameter& parameter, const Gradient& gradient);
  void update_vectors(const std::vector<Complete>& vectors, SquaresTarget squares);

  GradientConfig config_;
  Optimizer& optimizer_;
  ParameterStore& store_;
  Backend& backend_;
  Communicator& communicator_;
  std::vector<Entry> entries_;        // by Parameter::index
  Scratch matrices_[2], vectors_[2];  // buffers; one of each does without ranks
  Scratch top_vectors_, rows_;
  std::vector<LayerProgress> layers_;  // by layer + 1
  std::deque<Travelling> travelling_;
  int last_turn_ = 0;   // of a matrix
  InUse in_use_[2][2];  // matrices_, vectors_
  int given_event_ = 0, updated_event_ = 0;
  bool updating_ = false;  // something was given to the update stream since the last join()
  size_t used_ = 0;        // parameters of the step that are complete
  bool serial_ = true;     // of the first step: what is measured in it has the device for itself
  bool stepped_ = false;
  Scratch projection_, projected_;  // of projected sums
  Tensor squares_, sum_squares_;    // [1] of gradients, and of what is kept when that is compressed
  StepScalars* scalars_ = nullptr;
  bool is_last_ = false, squares_written_ = false;
  bool norm_pass_ = false;  // this one; gradient_squares() of the one before are used in the next step
};
