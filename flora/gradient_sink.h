// gradient_sink.h: the seam "what happens to a gradient". The model computes gradients and hands each one to a sink; it
// does not know whether they are kept, used at once, or compressed.
//
// Protocol of one step:
//   begin_step, then for each micro-batch: begin_micro_batch, then for each parameter target()... ready(); end_step.
// target() may be called several times for one parameter before ready() (the head's chunks and the lookup of a tied
// embedding); the first call of a step says accumulate = false unless an earlier micro-batch's gradient is there.
// Between target(p) and ready(p) the gradients of 1-D parameters and of long_lived parameters may be open at the same
// time as p; two other matrices may not. ready() is called once per parameter and micro-batch; by then the model has
// computed everything it needs from the parameter's old value, so the sink may change the weight.
// A matrix may come through from_rows() instead, where the sink asks for the rows it wants, as often as it wants; one
// for which wants_blocks() must.
#pragma once

#include <cstdint>
#include <functional>

#include "flora/parameter.h"
#include "kernels/backend.h"
#include "kernels/memory_plan.h"
#include "kernels/tensor.h"

struct StepContext {
  uint32_t step = 1;  // t
  float lr = 0;
  int micro_batches = 1;
  StepScalars* scalars = nullptr;  // device memory; the sink fills it through Backend::copy in begin_step
};

class GradientSink {
 public:
  struct Target {
    Tensor tensor;    // [rows, cols] (1-D: [cols]); padded_rows rows are writable behind it for the padded embedding
    bool accumulate;  // add to what is there instead of overwriting it
  };

  virtual ~GradientSink() = default;
  virtual void declare(MemoryPlan& plan) const = 0;
  virtual void bind(Arena& arena) = 0;

  virtual void begin_step(const StepContext& context) = 0;
  virtual void begin_micro_batch(int index, bool is_last) = 0;
  virtual Target target(const Parameter& parameter) = 0;
  virtual void ready(const Parameter& parameter) = 0;

  // rows(out, begin, accumulate): writes, or adds, rows [begin, begin + out.rows()) of a gradient to `out`.
  using Rows = std::function<void(Tensor out, int64_t begin, bool accumulate)>;
  virtual bool wants_blocks(const Parameter&) const { return false; }
  virtual void from_rows(const Parameter& parameter, const Rows& rows) {
    const Target whole = target(parameter);
    rows(whole.tensor, 0, whole.accumulate);
    ready(parameter);
  }

  virtual void end_step() = 0;

  // Device scalar (fp32): sum of squares of the whole gradient of the step, valid after end_step().
  virtual const float* gradient_squares() const = 0;
};
