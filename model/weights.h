// weights.h: the weights of a model: on the device, those of the blocks streamed from host memory, or their matrices
// spread over the ranks of a run; as numbers, or those of the blocks' matrices as 8-bit codes (Q-GaLore, arXiv
// 2407.08296); with or without fp32 master copies.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "flora/parameter.h"
#include "kernels/backend.h"
#include "kernels/layer_stream.h"
#include "kernels/memory_plan.h"

struct WeightStoreConfig {
  DType dtype = DType::kF32;        // kF32, kBF16, or kI8: quantized parameters as codes, the rest in plain_dtype
  DType plain_dtype = DType::kF32;  // with kI8: of what is not quantized, and of decoded matrices
  bool master_weights = false;      // beside bf16
  LayerPlace blocks = {};
};

class WeightStore final : public ParameterStore {
 public:
  WeightStore(std::vector<Parameter> parameters, const WeightStoreConfig& config, Backend& backend);
  ~WeightStore() override;  // the memory may be gone, so nothing is written back

  void declare(MemoryPlan& plan);
  void zero_padding();  // of all weights; the rest is undefined before it is assigned

  const std::vector<Parameter>& parameters() const override { return parameters_; }
  void acquire(int layer, Access access) override;
  void release(int layer, bool changed) override;
  DType dtype(const Parameter&) const override {
    return config_.dtype == DType::kI8 ? config_.plain_dtype : config_.dtype;
  }
  Tensor weight(const Parameter& parameter) override;
  Tensor padded_weight(const Parameter& parameter) override;
  Tensor stored(const Parameter& parameter) override;
  Tensor master(const Parameter& parameter) override;
  void assign(const Parameter& parameter, const std::function<void(Tensor, int64_t)>& fill) override;
  bool spread(const Parameter& p) const override { return config_.blocks.peers && p.layer >= 0 && p.matrix; }
  Kept part(const Parameter& parameter) override;
  void part_changed(const Parameter& parameter) override;

 private:
  // Where one parameter is: in resident memory, or in the stream under these numbers.
  struct Place {
    Tensor weight, master;  // [padded_rows, cols], [rows, cols]
    int streamed_weight = -1, streamed_master = -1;
    int master_layer = -1;  // in the stream of master copies; in parts each is a layer of its own
  };

  DType stored_dtype(const Parameter& p) const;
  bool streamed(const Parameter& p) const { return stream_ && p.layer >= 0 && (p.matrix || !config_.blocks.peers); }
  Place& place(const Parameter& p) { return places_[static_cast<size_t>(p.index)]; }

  std::vector<Parameter> parameters_;
  WeightStoreConfig config_;
  Backend& backend_;
  std::vector<Place> places_;  // by Parameter::index
  std::unique_ptr<LayerStream> stream_;
  // Master copies that ranks keep: whole only where somebody asks for one.
  std::unique_ptr<LayerStream> masters_;
  std::unique_ptr<HeldLayer<LayerStream>> held_masters_;
  int64_t decoded_elements_ = 0;  // as many as the largest 8-bit matrix needs
  Tensor decoded_;
};
