// layer_stream.cpp: see layer_stream.h. Events keep the streams apart: a slot is copied into or out of only after
// the compute stream has used it, and used only after the copy that fills it; what is copied in comes after what the
// slot's last layer was copied back by, so that neither the slot nor a layer in host memory is read and written at the
// same time. Between ranks the communicator does both,
// and what a rank copies between its part and a slot is on the compute stream.
#include "kernels/layer_stream.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "parallel/communicator.h"
#include "parallel/part.h"

namespace {

bool has_scales(const Tensor& tensor) { return tensor.dtype == DType::kI8 || tensor.dtype == DType::kU8; }

}  // namespace

LayerStream::LayerStream(std::string name, Category category, int layers, int slots, Order order, Backend& backend,
                         Communicator* peers)
    : name_(std::move(name)),
      category_(category),
      order_(order),
      backend_(backend),
      peers_(peers),
      layers_(static_cast<size_t>(layers)),
      slots_(static_cast<size_t>(std::min(slots, layers))) {
  if (slots < 1) throw std::invalid_argument(name_ + ": at least one layer is on the device");
}

int LayerStream::ranks() const { return peers_ ? peers_->size() : 1; }

// Room for a piece of which so many bytes are kept here.
LayerStream::Piece LayerStream::add_piece(Layer& layer, size_t kept_bytes) const {
  const Piece piece{layer.bytes, layer.kept_bytes, kept_bytes};
  layer.bytes += MemoryPlan::aligned(static_cast<size_t>(ranks()) * kept_bytes);
  layer.kept_bytes += MemoryPlan::aligned(kept_bytes);
  layer.pieces.push_back(piece);
  return piece;
}

int LayerStream::add(int layer, const Tensor& shape) {
  if (layer == static_cast<int>(layers_.size())) layers_.emplace_back();
  Layer& to = layers_.at(static_cast<size_t>(layer));
  const int64_t kept = peers_ ? part_elements(shape.elements(), ranks()) : shape.elements();
  Member member{shape, add_piece(to, static_cast<size_t>(kept) * dtype_size(shape.dtype)), {}};
  if (has_scales(shape)) member.scales = add_piece(to, static_cast<size_t>(quant_blocks(kept)) * sizeof(float));
  to.members.push_back(member);
  return static_cast<int>(to.members.size()) - 1;
}

void LayerStream::declare(MemoryPlan& plan, uint32_t phases) {
  size_t largest = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    largest = std::max(largest, layers_[i].bytes);
    plan.add(&layers_[i].kept, name_ + "." + std::to_string(i) + (peers_ ? ".part" : ".host"), category_,
             layers_[i].kept_bytes, kPhaseAlways, !peers_);
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
  if (!peers_ && !slot.has_events) create_events(slot);
  if (slot.stored_beside) backend_.wait(slot.stored_event, Stream::kCopy);
  slot.stored_beside = false;
  if (slot.layer >= 0) forget(slot);
  Layer& to = layers_[static_cast<size_t>(layer)];
  slot.layer = layer;
  slot.last_use = ++clock_;
  to.slot = static_cast<int>(&slot - slots_.data());
  if (!copy) return;
  if (peers_) {
    gather(slot);
    return;
  }
  backend_.wait(slot.used_event, Stream::kCopy);
  backend_.copy(slot.memory, to.kept, to.bytes, Stream::kCopy);
  backend_.record(slot.loaded_event, Stream::kCopy);
  slot.loading = true;
}

// The part goes to its place, and the others' come to theirs beside what the compute stream is given next.
void LayerStream::gather(Slot& slot) {
  arrive(slot);  // of another layer, fetched ahead and never asked for
  const Layer& to = layers_[static_cast<size_t>(slot.layer)];
  for (const Piece& piece : to.pieces) {
    backend_.copy(slot.memory + piece.offset + static_cast<size_t>(peers_->rank()) * piece.kept_bytes,
                  to.kept + piece.kept, piece.kept_bytes);
  }
  for (const Piece& piece : to.pieces) slot.ticket = peers_->all_gather(slot.memory + piece.offset, piece.kept_bytes);
  slot.loading = true;
}

// What the compute stream is given from now on comes after what fills the slot.
void LayerStream::arrive(Slot& slot) {
  if (!slot.loading) return;
  if (peers_) {
    peers_->wait(slot.ticket);
  } else {
    backend_.wait(slot.loaded_event, Stream::kCompute);
  }
  slot.loading = false;
}

void LayerStream::store(Slot& slot) {
  const Layer& from = layers_[static_cast<size_t>(slot.layer)];
  const Stream back = copy_back();
  backend_.wait(slot.used_event, back);
  backend_.copy(from.kept, slot.memory, from.bytes, back);
  backend_.record(slot.stored_event, back);
  slot.storing = true;
  slot.stored_beside = back != Stream::kCopy;
  slot.changed = false;
}

void LayerStream::keep_part(Slot& slot) {
  const Layer& from = layers_[static_cast<size_t>(slot.layer)];
  for (const Piece& piece : from.pieces) {
    backend_.copy(from.kept + piece.kept,
                  slot.memory + piece.offset + static_cast<size_t>(peers_->rank()) * piece.kept_bytes,
                  piece.kept_bytes);
  }
  slot.changed = false;
}

void LayerStream::forget(Slot& slot) {
  layers_[static_cast<size_t>(slot.layer)].slot = -1;
  slot.layer = -1;
  slot.old = false;
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
  arrive(slot);
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
  if (peers_) {
    if (slot.changed) keep_part(slot);
    if (slot.old) forget(slot);
    return;
  }
  backend_.record(slot.used_event, Stream::kCompute);
  if (slot.changed) store(slot);
}

Tensor LayerStream::member_tensor(const Member& member, char* base, size_t Piece::*offset) const {
  Tensor tensor = member.shape;
  tensor.data = base + member.elements.*offset;
  if (has_scales(tensor)) tensor.scales = reinterpret_cast<float*>(base + member.scales.*offset);
  return tensor;
}

Tensor LayerStream::tensor(int layer, int number) const {
  const Layer& from = layers_.at(static_cast<size_t>(layer));
  if (from.slot < 0 || slots_[static_cast<size_t>(from.slot)].acquired == 0)
    throw std::logic_error(name_ + ": layer " + std::to_string(layer) + " is used without acquire()");
  return member_tensor(from.members.at(static_cast<size_t>(number)), slots_[static_cast<size_t>(from.slot)].memory,
                       &Piece::offset);
}

Tensor LayerStream::part(int layer, int number) const {
  if (!peers_) throw std::logic_error(name_ + ": no rank keeps a part");
  const Layer& from = layers_.at(static_cast<size_t>(layer));
  const Member& member = from.members.at(static_cast<size_t>(number));
  const Tensor kept = member_tensor(member, from.kept, &Piece::kept);
  const Part part = part_of(kept.elements(), peers_->rank(), peers_->size());
  return Tensor::of(kept.data, kept.dtype, {part.count}, kept.scales);
}

void LayerStream::part_changed(int layer) {
  const int at = layers_.at(static_cast<size_t>(layer)).slot;
  if (at < 0) return;
  Slot& slot = slots_[static_cast<size_t>(at)];
  slot.old = true;
  if (slot.acquired == 0) forget(slot);
}
