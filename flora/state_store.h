// state_store.h: the memory of an optimizer's states: on the device, or those of the blocks streamed from host memory,
// a few layers at a time, while the backward pass goes down the layers.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "flora/parameter.h"
#include "kernels/backend.h"
#include "kernels/layer_stream.h"
#include "kernels/memory_plan.h"

// A state as a checkpoint stores it, in its own dtype (int8 and uint8 with scales).
struct StateTensor {
  std::string name;  // "<parameter>.<what>", e.g. "h.0.mlp.c_fc.weight.momentum"
  int layer = -1;    // of the parameter
  Tensor tensor;     // dtype and shape; the memory is get()'s
};

class StateStore {
 public:
  // streamed_layers > 0: states of the blocks are in host memory, so many layers at a time on the device.
  StateStore(const std::vector<Parameter>& parameters, int streamed_layers, Backend& backend);
  ~StateStore();  // the memory may be gone, so nothing is written back

  // One more state: [rows, cols] of a matrix, else [rows * cols]. Returns its number.
  int add(const Parameter& parameter, const char* what, DType dtype, bool matrix, int64_t rows, int64_t cols);

  void declare(MemoryPlan& plan);
  void zero();  // all states, as they start

  // Makes the states of a layer valid for get(), until another layer is held. Layer -1 and states that are not streamed
  // are always valid.
  void hold(int layer, Access access);

  Tensor get(int number) const;  // an empty tensor for -1
  const std::vector<StateTensor>& list() const { return states_; }

 private:
  bool streamed(const StateTensor& state) const { return stream_ && state.layer >= 0; }

  Backend& backend_;
  std::vector<StateTensor> states_;
  std::vector<int> numbers_;  // in the stream
  std::unique_ptr<LayerStream> stream_;
  std::unique_ptr<HeldLayer<LayerStream>> held_;
};
