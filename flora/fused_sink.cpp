// fused_sink.cpp: updates a weight the moment its gradient is complete (LOMO, arXiv 2306.09782). With one micro-batch
// the gradient memory is the largest matrix, one layer's vectors and the long-lived gradients; with several the sums
// are kept, in full or compressed, and the update happens in the last one.
//
// A gradient in blocks of rows is computed once for each pass that its update needs, and never kept.
//
// Clipping needs the norm before the first update: a first pass over the micro-batches (set_norm_pass) measures it, the
// second updates.
#include "flora/sink_base.h"

namespace {

using Keep = GradientStorage::Keep;

std::vector<Keep> kept_by_fused(const SinkConfig& config, const std::vector<Parameter>& parameters) {
  if (config.micro_batches == 1) return std::vector<Keep>(parameters.size(), Keep::kSlot);
  if (config.accumulation_rank == 0) return std::vector<Keep>(parameters.size(), Keep::kFull);
  return keep_compressed(config, parameters, Keep::kFull);
}

class FusedSink final : public SinkBase {
 public:
  FusedSink(const SinkConfig& config, Optimizer& optimizer, ParameterStore& store, Backend& backend)
      : SinkBase(config, optimizer, store, backend, kept_by_fused(config, store.parameters()), 0) {}

  bool needs_norm_pass() const override { return clips(); }
  uint32_t variant() const override { return 2 * SinkBase::variant() + (norm_pass_ ? 1 : 0); }

  void set_norm_pass(bool on) override {
    norm_known_ = norm_pass_ && !on;
    norm_pass_ = on;
    if (norm_known_) judge_norm();
  }

  // A step that begins again for its second pass writes the scalars again, so the verdict is repeated.
  void begin_step(const StepContext& context) override {
    SinkBase::begin_step(context);
    if (norm_known_) judge_norm();
    norm_known_ = false;
  }

  void ready(const Parameter& parameter) override {
    if (!is_last_) {
      storage_.add(parameter);
      return;
    }
    const Tensor gradient = storage_.finish(parameter);
    if (norm_pass_ || !clips()) add_squares(gradient);
    if (norm_pass_) return;
    clip(gradient);
    update(parameter, gradient);
  }

  bool wants_blocks(const Parameter& parameter) const override { return storage_.block_rows(parameter) > 0; }

  void from_rows(const Parameter& parameter, const Rows& rows) override {
    if (!wants_blocks(parameter)) {
      SinkBase::from_rows(parameter, rows);
      return;
    }
    bool first_pass = norm_pass_ || !clips();
    const BlockedGradient gradient(parameter.rows, storage_.block_rows(parameter), [&](int64_t begin, int64_t count) {
      const Tensor block = storage_.block(parameter, count);
      rows(block, begin, false);
      if (first_pass) add_squares(block);
      if (begin + count == parameter.rows) first_pass = false;
      if (!norm_pass_) clip(block);
      return block;
    });
    if (norm_pass_) {
      gradient.pass([](int64_t, const Tensor&) {});
    } else {
      update(parameter, gradient);
    }
  }

  void end_step() override {}

 private:
  bool norm_pass_ = false;
  bool norm_known_ = false;  // gradient_squares() are those of the norm pass
};

}  // namespace

std::unique_ptr<UpdatingSink> make_fused_sink(const SinkConfig& config, Optimizer& optimizer, ParameterStore& store,
                                              Backend& backend) {
  return std::make_unique<FusedSink>(config, optimizer, store, backend);
}
