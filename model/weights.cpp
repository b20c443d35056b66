// weights.cpp: see weights.h. An 8-bit matrix is decoded each time it is used: three times per micro-batch with
// block recomputation, a pass of 3 bytes per element each.
#include "model/weights.h"

#include <algorithm>
#include <utility>

#include "parallel/communicator.h"
#include "parallel/part.h"

WeightStore::WeightStore(std::vector<Parameter> parameters, const WeightStoreConfig& config, Backend& backend)
    : parameters_(std::move(parameters)), config_(config), backend_(backend), places_(parameters_.size()) {
  config_.master_weights = config.master_weights && config.dtype == DType::kBF16;
  int layers = 0;
  for (const Parameter& p : parameters_) {
    layers = std::max(layers, p.layer + 1);
    if (!p.quantized) continue;
    const int64_t fp32_elements =
        quant_rows(p.cols) * p.cols * static_cast<int64_t>(sizeof(float) / dtype_size(config_.plain_dtype));
    decoded_elements_ = std::max({decoded_elements_, p.elements(), fp32_elements});
  }
  if (config_.blocks.streamed_layers > 0)
    stream_ = std::make_unique<LayerStream>("weights", Category::kWeights, layers, config_.blocks.streamed_layers,
                                            LayerStream::Order::kUpAndDown, backend, config_.blocks.peers);
  if (config_.blocks.peers && config_.master_weights) {
    masters_ = std::make_unique<LayerStream>("masters", Category::kWeights, config_.blocks.parts ? 1 : layers,
                                             config_.blocks.parts ? 1 : 2, LayerStream::Order::kDownAgain, backend,
                                             config_.blocks.peers);
    held_masters_ = std::make_unique<HeldLayer<LayerStream>>(*masters_);
  }
  int alone = 0;
  for (const Parameter& p : parameters_) {
    if (!streamed(p)) continue;
    Place& at = place(p);
    at.streamed_weight = stream_->add(p.layer, p.tensor(nullptr, stored_dtype(p)));
    if (!config_.master_weights) continue;
    at.master_layer = config_.blocks.parts ? alone++ : p.layer;
    at.streamed_master = (masters_ ? *masters_ : *stream_).add(at.master_layer, p.tensor(nullptr, DType::kF32));
  }
}

WeightStore::~WeightStore() {
  if (held_masters_) held_masters_->forget();
}

DType WeightStore::stored_dtype(const Parameter& p) const {
  if (config_.dtype != DType::kI8) return config_.dtype;
  return p.quantized ? DType::kI8 : config_.plain_dtype;
}

void WeightStore::declare(MemoryPlan& plan) {
  for (const Parameter& p : parameters_) {
    if (streamed(p)) continue;
    plan.add(&place(p).weight, p.name, Category::kWeights, stored_dtype(p), {p.padded_rows, p.cols});
    if (config_.master_weights)
      plan.add(&place(p).master, p.name + ".master", Category::kWeights, p.tensor(nullptr, DType::kF32));
  }
  if (stream_) stream_->declare(plan, kPhaseAlways);
  // In parts nobody needs a whole master copy in a step, but checkpoints do between two.
  if (masters_) masters_->declare(plan, config_.blocks.parts ? kPhaseSample : kPhaseAlways);
  if (decoded_elements_ > 0)
    plan.add(&decoded_, "weights.decoded", Category::kWorkspace, config_.plain_dtype, {decoded_elements_},
             kPhaseForward | kPhaseBackward | kPhaseSample);
}

void WeightStore::zero_padding() {
  for (const Parameter& p : parameters_) {
    if (p.padded_rows == p.rows) continue;
    const Tensor padding = place(p).weight.slice(p.rows, p.padded_rows - p.rows);
    backend_.fill(padding.data, 0, padding.bytes());
  }
}

void WeightStore::acquire(int layer, Access access) {
  if (stream_ && layer >= 0) stream_->acquire(layer, access);
}

void WeightStore::release(int layer, bool changed) {
  if (!stream_ || layer < 0) return;
  stream_->release(layer, changed);
  if (masters_ && config_.blocks.parts) held_masters_->release();  // a step has other things in that memory
}

Tensor WeightStore::stored(const Parameter& parameter) {
  const Place& at = place(parameter);
  return streamed(parameter) ? stream_->tensor(parameter.layer, at.streamed_weight) : parameter.tensor(at.weight);
}

Tensor WeightStore::weight(const Parameter& parameter) {
  const Tensor kept = stored(parameter);
  if (!parameter.quantized) return kept;
  const Tensor decoded = parameter.tensor(decoded_.data, config_.plain_dtype);
  backend_.dequantize_weight(decoded, kept);
  return decoded;
}

Tensor WeightStore::padded_weight(const Parameter& parameter) { return parameter.padded(weight(parameter)); }

// Pieces are fp32 in the memory of decoded matrices.
void WeightStore::assign(const Parameter& p, const std::function<void(Tensor, int64_t)>& fill) {
  const Tensor kept = stored(p);
  if (!p.quantized) {
    fill(kept, 0);
    return;
  }
  const int64_t room = decoded_elements_ * static_cast<int64_t>(dtype_size(config_.plain_dtype) / 2) / 2;
  const int64_t step = std::max<int64_t>(room / (p.cols * quant_rows(p.cols)), 1) * quant_rows(p.cols);
  for (int64_t begin = 0; begin < p.rows; begin += step) {
    const int64_t rows = std::min(step, p.rows - begin);
    const Tensor piece = Tensor::of(decoded_.data, DType::kF32, {rows, p.cols});
    fill(piece, begin);
    backend_.quantize_weight(kept.slice(begin, rows), piece, {}, nullptr);
  }
}

Tensor WeightStore::master(const Parameter& parameter) {
  const Place& at = place(parameter);
  if (at.streamed_master < 0) return at.master;
  if (!masters_) return stream_->tensor(parameter.layer, at.streamed_master);
  held_masters_->hold(at.master_layer, Access::kUpdate);
  return masters_->tensor(at.master_layer, at.streamed_master);
}

ParameterStore::Kept WeightStore::part(const Parameter& parameter) {
  const Place& at = place(parameter);
  const Communicator& peers = *config_.blocks.peers;
  Kept kept{.weight = stream_->part(parameter.layer, at.streamed_weight),
            .begin = part_of(parameter.elements(), peers.rank(), peers.size()).begin};
  if (masters_) {
    held_masters_->release();
    kept.master = masters_->part(at.master_layer, at.streamed_master);
  }
  return kept;
}

void WeightStore::part_changed(const Parameter& parameter) {
  stream_->part_changed(parameter.layer);
  if (masters_) masters_->part_changed(place(parameter).master_layer);
}
