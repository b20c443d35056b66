// activations.cpp: see activations.h.
#include "model/activations.h"

#include <algorithm>
#include <stdexcept>
#include <string>

Activations::Activations(const Gpt2Config& config, const ActivationShapes& shapes, Backend& backend)
    : config_(config), shapes_(shapes) {
  const int64_t C = config.channels, L = config.layers;
  const Recompute level = shapes.training ? shapes.recompute : Recompute::kBlock;
  // Kept activations live until the backward pass has used them; shared ones are dead while the head runs.
  const uint32_t kept = kPhaseForward | kPhaseHead | kPhaseBackward;
  const uint32_t shared = kPhaseForward | kPhaseBackward;
  const DType act = shapes.dtype, f32 = DType::kF32;
  buffers_.resize(kSlots);
  const auto per_layer = [&](Slot slot, const char* name, int64_t width, DType dtype, bool keep) {
    buffers_[slot] = {name, width, dtype, keep ? kept : shared, keep ? L : 1, {}};
  };
  const auto single = [&](Slot slot, const char* name, int64_t width, DType dtype, uint32_t phases) {
    buffers_[slot] = {name, width, dtype, phases, 1, {}};
  };
  // Without a backward pass the residual stream alternates between two buffers.
  buffers_[kX] = {"residual", C, act, kept, shapes.training ? L + 1 : 2, {}};
  if (shapes.training && shapes.streamed_layers > 0) {
    buffers_[kX].width = 0;
    const int count = static_cast<int>(L + 1);
    stream_ = std::make_unique<LayerStream>("activations.residual", Category::kActivations, count,
                                            std::min(shapes.streamed_layers, count - 1) + 1, LayerStream::Order::kDown,
                                            backend);
    for (int l = 0; l < count; ++l) stream_->add(l, Tensor::of(nullptr, act, {shapes.batch * shapes.sequence, C}));
  }
  per_layer(kLn1, "ln_1", C, act, level < Recompute::kNormsGelu);
  per_layer(kMean1, "ln_1.mean", 1, f32, level < Recompute::kNormsGelu);
  per_layer(kRstd1, "ln_1.rstd", 1, f32, level < Recompute::kNormsGelu);
  per_layer(kQkv, "qkv", 3 * C, act, level < Recompute::kBlock);
  per_layer(kAtt, "attention", C, act, level < Recompute::kAttention);
  per_layer(kLse, "attention.lse", config.heads, f32, level < Recompute::kAttention);
  per_layer(kX2, "residual_mid", C, act, level < Recompute::kBlock);
  per_layer(kLn2, "ln_2", C, act, level < Recompute::kNormsGelu);
  per_layer(kMean2, "ln_2.mean", 1, f32, level < Recompute::kNormsGelu);
  per_layer(kRstd2, "ln_2.rstd", 1, f32, level < Recompute::kNormsGelu);
  per_layer(kFch, "mlp.hidden", 4 * C, act, level < Recompute::kBlock);
  per_layer(kGelu, "mlp.gelu", 4 * C, act, level < Recompute::kGelu);
  const uint32_t until_blocks = shapes.head_blocks ? static_cast<uint32_t>(kPhaseBackward) : 0;
  single(kFinalNorm, "ln_f", C, act, kPhaseForward | kPhaseHead | until_blocks);
  single(kFinalMean, "ln_f.mean", 1, f32, kept);
  single(kFinalRstd, "ln_f.rstd", 1, f32, kept);
  single(kBranch, "branch", C, act, kept);
  single(kDResidual, "d_residual", shapes.training ? C : 0, act, kPhaseHead | kPhaseBackward);
  single(kDWide, "d_wide", shapes.training ? 4 * C : 0, act, kPhaseBackward);
  single(kLosses, "losses", 1, f32, kPhaseHead);
  single(kHeadLse, "head.lse", shapes.head_blocks ? 1 : 0, f32, kPhaseHead | kPhaseBackward);
}

namespace {

std::string allocation_name(const char* name, int64_t copies, int64_t index) {
  const std::string base = std::string("activations.") + name;
  return copies == 1 ? base : base + "." + std::to_string(index);
}

}  // namespace

void Activations::declare(MemoryPlan& plan) const {
  const int64_t tokens = shapes_.batch * shapes_.sequence;
  for (const Buffer& buffer : buffers_) {
    if (buffer.width == 0) continue;
    for (int64_t i = 0; i < buffer.copies; ++i) {
      plan.add_tensor(allocation_name(buffer.name, buffer.copies, i), Category::kActivations, buffer.dtype,
                      tokens * buffer.width, buffer.phases);
    }
  }
  plan.add_tensor("activations.logits", Category::kActivations, shapes_.dtype,
                  shapes_.head_chunk * config_.padded_vocabulary(),
                  shapes_.head_blocks ? kPhaseHead | kPhaseBackward : static_cast<uint32_t>(kPhaseHead));
  if (stream_) stream_->declare(plan, kPhaseForward | kPhaseHead | kPhaseBackward);
}

void Activations::bind(Arena& arena) {
  const int64_t tokens = shapes_.batch * shapes_.sequence;
  for (Buffer& buffer : buffers_) {
    if (buffer.width == 0) continue;
    for (int64_t i = 0; i < buffer.copies; ++i) {
      const std::string name = allocation_name(buffer.name, buffer.copies, i);
      buffer.memory.push_back(arena.tensor(name, buffer.dtype, {tokens * buffer.width}).data);
    }
  }
  logits_memory_ =
      arena.tensor("activations.logits", shapes_.dtype, {shapes_.head_chunk, config_.padded_vocabulary()}).data;
  if (stream_) stream_->bind(arena);
  resize(shapes_.batch, shapes_.sequence);
}

Tensor Activations::at(Slot slot, int64_t index) const {
  const Buffer& buffer = buffers_[slot];
  void* memory = buffer.memory[index % buffer.copies];
  if (slot == kLse) return Tensor::of(memory, buffer.dtype, {batch_, config_.heads, sequence_});
  if (buffer.width == 1) return Tensor::of(memory, buffer.dtype, {batch_ * sequence_});
  return Tensor::of(memory, buffer.dtype, {batch_, sequence_, buffer.width});
}

void Activations::resize(int64_t batch, int64_t sequence) {
  if (batch * sequence > shapes_.batch * shapes_.sequence) throw std::logic_error("more tokens than were planned for");
  batch_ = batch;
  sequence_ = sequence;
  final_norm = at(kFinalNorm, 0);
  final_mean = at(kFinalMean, 0);
  final_rstd = at(kFinalRstd, 0);
  branch = at(kBranch, 0);
  losses = at(kLosses, 0);
  if (shapes_.training) {
    d_residual = at(kDResidual, 0);
    d_wide = at(kDWide, 0);
    d_qkv = Tensor::of(d_wide.data, d_wide.dtype, {batch, sequence, 3 * config_.channels});
  }
  if (shapes_.head_blocks) head_lse = at(kHeadLse, 0);
  logits = Tensor::of(logits_memory_, shapes_.dtype, {shapes_.head_chunk, config_.padded_vocabulary()});
}

Tensor Activations::logits_block(int64_t columns) const {
  return Tensor::of(logits_memory_, shapes_.dtype, {logits.elements() / columns, columns});
}

void Activations::acquire(int64_t index, Access access) {
  if (stream_) stream_->acquire(static_cast<int>(index), access);
}

void Activations::release(int64_t index, bool kept) {
  if (stream_) stream_->release(static_cast<int>(index), kept);
}

Tensor Activations::residual(int64_t index) const {
  if (!stream_) return at(kX, index);
  const Tensor x = stream_->tensor(static_cast<int>(index), 0);
  return Tensor::of(x.data, x.dtype, {batch_, sequence_, config_.channels});
}

LayerActivations Activations::layer(int64_t index) const {
  return {residual(index),   at(kLn1, index), at(kMean1, index), at(kRstd1, index), at(kQkv, index),
          at(kAtt, index),   at(kLse, index), at(kX2, index),    at(kLn2, index),   at(kMean2, index),
          at(kRstd2, index), at(kFch, index), at(kGelu, index)};
}
