// states.cpp: see states.h.
#include "flora/states.h"

#include <algorithm>

void zero_state(Backend& backend, const Tensor& state) {
  backend.fill(state.data, 0, state.bytes());
  if (state.scales) backend.fill(state.scales, 0, static_cast<size_t>(quant_blocks(state.elements())) * sizeof(float));
}

StateStore::StateStore(const std::vector<Parameter>& parameters, const LayerPlace& place, Backend& backend)
    : place_(place), backend_(backend) {
  if (place.streamed_layers == 0) return;
  int layers = 0;
  for (const Parameter& parameter : parameters) layers = std::max(layers, parameter.layer + 1);
  stream_ = std::make_unique<LayerStream>("state", Category::kOptimizerState, place.parts ? 1 : layers,
                                          place.parts ? 1 : place.streamed_layers, LayerStream::Order::kDownAgain,
                                          backend, place.peers);
  held_ = std::make_unique<HeldLayer<LayerStream>>(*stream_);
}

StateStore::~StateStore() {
  if (held_) held_->forget();
}

int StateStore::add(const Parameter& parameter, const char* what, const Tensor& shape) {
  states_.push_back({parameter.name + "." + what, parameter.layer, shape});
  Where where;
  if (streamed(states_.back())) {
    where.layer = place_.parts ? spread_++ : parameter.layer;
    where.number = stream_->add(where.layer, shape);
  }
  where_.push_back(where);
  return static_cast<int>(states_.size()) - 1;
}

void StateStore::declare(MemoryPlan& plan) {
  for (StateTensor& state : states_)
    if (!streamed(state)) plan.add(&state.tensor, state.name, Category::kOptimizerState, state.tensor);
  // In parts nobody needs a whole state in a step, but checkpoints do between two.
  if (stream_) stream_->declare(plan, place_.parts ? kPhaseSample : kPhaseAlways);
}

void StateStore::zero() {
  for (size_t i = 0; i < states_.size(); ++i) {
    hold(states_[i].layer, Access::kOverwrite);
    zero_state(backend_, get(static_cast<int>(i)));
  }
  if (held_) held_->release();
}

void StateStore::hold(int layer, Access access) {
  if (!held_) return;
  access_ = access;
  if (layer >= 0 && place_.parts) return;
  if (layer >= 0) {
    held_->hold(layer, access);
  } else {
    held_->release();
  }
}

Tensor StateStore::get(int number) const {
  if (number < 0) return {};
  const Where& where = where_.at(static_cast<size_t>(number));
  if (where.layer < 0) return states_[static_cast<size_t>(number)].tensor;
  if (place_.parts) held_->hold(where.layer, access_);
  return stream_->tensor(where.layer, where.number);
}

Tensor StateStore::part(int number) {
  if (number < 0) return {};
  held_->release();
  const Where& where = where_.at(static_cast<size_t>(number));
  return stream_->part(where.layer, where.number);
}

void StateStore::part_changed(int number) {
  if (number >= 0) stream_->part_changed(where_.at(static_cast<size_t>(number)).layer);
}
