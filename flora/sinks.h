// sinks.h: the three things that can happen to a gradient (dense, fused, compressed) and how one is chosen.
#pragma once

#include <memory>
#include <vector>

#include "flora/blocked_gradient.h"
#include "flora/gradient_sink.h"
#include "flora/optimizer.h"
#include "flora/parameter_store.h"

enum class SinkKind : uint8_t { kDense, kFused, kCompressed };

struct SinkConfig {
  SinkKind kind = SinkKind::kFused;
  int micro_batches = 1;                   // per step
  DType gradient_dtype = DType::kF32;      // of a gradient as the backward pass writes it
  DType accumulation_dtype = DType::kF32;  // of one summed over micro-batches: fp32, or bf16 rounded stochastically
  int64_t accumulation_rank = 0;           // > 0: sums are kept projected (fused and compressed sinks)
  ProjectionKind projection = ProjectionKind::kGaussian;  // of the accumulated gradient
  bool compress_embeddings = false;
  float clip_norm = 0;  // 0: off. Fused: needs two backward passes, see needs_norm_pass()
  uint64_t seed = 0;    // the run's seed
  GradientBlocks blocks = GradientBlocks::kWhole;
};

// A sink that also reports what the trainer needs to know.
class UpdatingSink : public GradientSink {
 public:
  // Fused sinks with clipping: the trainer runs every micro-batch of the step twice, first after set_norm_pass(true)
  // (gradients are measured, nothing is updated), then after set_norm_pass(false).
  virtual bool needs_norm_pass() const { return false; }
  virtual void set_norm_pass(bool) {}
  // Which of several sequences of operations this step (or pass) issues: those with the same number issue the same
  // ones, micro-batch by micro-batch. Valid after begin_step().
  virtual uint32_t variant() const = 0;
};

std::unique_ptr<UpdatingSink> make_sink(const SinkConfig& config, Optimizer& optimizer, ParameterStore& store,
                                        Backend& backend);
