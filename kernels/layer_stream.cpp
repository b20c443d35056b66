// layer_stream.cpp: see layer_stream.h. Events keep the two streams apart: a slot is copied into or out of only after
// the compute stream has used it, and used only after the copy that fills it.
#include "kernels/layer_stream.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

LayerStream::LayerStream(std::string name, Category category, int layers, int slots, Order order, Backend& backend)
    : name_(std::move(name)),
      category_(category),
      order_(order),
      backend_(backend),
      layers_(static_cast<size_t>(layers)),
      slots_(static_cast<size_t>(std::min(slots, layers))) {
  if (slots < 2) throw std::invalid_argument(name_ + ": at least two layers are on the device");
}

int LayerStream::add(int layer, const Tensor& shape) {
  Layer& to = layers_.at(static_cast<size_t>(layer));
  Member member{shape, to.bytes, 0};
  to.bytes += MemoryPlan::aligned(shape.bytes());
  if (shape.dtype == DType::kI8 || shape.dtype == DType::kU8) {
    member.scales_offset = to.bytes;
    to.bytes += MemoryPlan::aligned(static_cast<size_t>(quant_blocks(shape.elements())) * sizeof(float));
  }
  to.members.push_back(member);
  return static_cast<int>(to.members.size()) - 1;
}

void LayerStream::declare(MemoryPlan& plan, uint32_t phases) {
  size_t largest = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    largest = std::max(largest, layers_[i].bytes);
    plan.add(&layers_[i].host, name_ + "." + std::to_string(i) + ".host", category_, layers_[i].bytes, kPhaseAlways,
             true);
  }
  for (size_t i = 0; i < slots_.size(); ++i)
    plan.add(&slots_[i].memory, name_ + ".slot." + std::to_string(i), category_, largest, phases);
}

void LayerStream::create_events(Slot& slot) {
  slot.used_event = backend_.create_event();
  slot.loaded_event = backend_.create_event();
  slot.stored_event = backend_.create_event();
  backend_.record(slot.used_event, Stream::kCompute);
  slot.has_events = true;
}

// The layer that will be asked for after `layer`, or -1.
int LayerStream::next_after(int layer) {
  if (order_ == Order::kUpAndDown) {
    if (layer != previous_) direction_ = layer > previous_ ? 1 : -1;
    previous_ = layer;
    const int next = layer + direction_;
    return next < static_cast<int>(layers_.size()) ? next : -1;
  }
  return layer > 0 || order_ == Order::kDown ? layer - 1 : static_cast<int>(layers_.size()) - 1;
}

// The slot that is free for the longest time; null when all are in use.
LayerStream::Slot* LayerStream::free_slot() {
  Slot* found = nullptr;
  for (Slot& slot : slots_)
    if (slot.acquired == 0 && (!found || slot.last_use < found->last_use)) found = &slot;
  return found;
}

void LayerStream::load(Slot& slot, int layer, bool copy) {
  if (!slot.has_events) create_events(slot);
  if (slot.layer >= 0) layers_[static_cast<size_t>(slot.layer)].slot = -1;
  Layer& to = layers_[static_cast<size_t>(layer)];
  slot.layer = layer;
  slot.last_use = ++clock_;
  to.slot = static_cast<int>(&slot - slots_.data());
  if (!copy) return;
  backend_.wait(slot.used_event, Stream::kCopy);
  backend_.copy(slot.memory, to.host, to.bytes, Stream::kCopy);
  backend_.record(slot.loaded_event, Stream::kCopy);
  slot.loading = true;
}

void LayerStream::store(Slot& slot) {
  const Layer& from = layers_[static_cast<size_t>(slot.layer)];
  backend_.wait(slot.used_event, Stream::kCopy);
  backend_.copy(from.host, slot.memory, from.bytes, Stream::kCopy);
  backend_.record(slot.stored_event, Stream::kCopy);
  slot.storing = true;
  slot.changed = false;
}

void LayerStream::acquire(int layer, Access access) {
  const Layer& wanted = layers_.at(static_cast<size_t>(layer));
  if (wanted.slot < 0) {
    Slot* const slot = free_slot();
    if (!slot) throw std::logic_error(name_ + ": more layers are acquired than there are slots");
    load(*slot, layer, access != Access::kOverwrite);
  }
  Slot& slot = slots_[static_cast<size_t>(wanted.slot)];
  ++slot.acquired;
  slot.last_use = ++clock_;
  if (slot.loading) backend_.wait(slot.loaded_event, Stream::kCompute);
  slot.loading = false;
  if (slot.storing && access != Access::kRead) {
    backend_.wait(slot.stored_event, Stream::kCompute);
    slot.storing = false;
  }
  const int next = next_after(layer);
  if (access == Access::kOverwrite || next < 0 || layers_[static_cast<size_t>(next)].slot >= 0) return;
  if (Slot* const ahead = free_slot()) load(*ahead, next, true);
}

void LayerStream::release(int layer, bool changed) {
  Slot& slot = slots_.at(static_cast<size_t>(layers_.at(static_cast<size_t>(layer)).slot));
  if (slot.acquired == 0) throw std::logic_error(name_ + ": a layer is released that was not acquired");
  slot.changed = slot.changed || changed;
  if (--slot.acquired > 0) return;
  backend_.record(slot.used_event, Stream::kCompute);
  if (slot.changed) store(slot);
}

Tensor LayerStream::tensor(int layer, int number) const {
  const Layer& from = layers_.at(static_cast<size_t>(layer));
  if (from.slot < 0 || slots_[static_cast<size_t>(from.slot)].acquired == 0)
    throw std::logic_error(name_ + ": layer " + std::to_string(layer) + " is used without acquire()");
  const Member& member = from.members.at(static_cast<size_t>(number));
  char* const base = slots_[static_cast<size_t>(from.slot)].memory;
  Tensor tensor = member.shape;
  tensor.data = base + member.offset;
  if (tensor.dtype == DType::kI8 || tensor.dtype == DType::kU8)
    tensor.scales = reinterpret_cast<float*>(base + member.scales_offset);
  return tensor;
}
