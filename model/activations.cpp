// activations.cpp: see activations.h.
#include "model/activations.h"

#include <algorithm>
#include <stdexcept>

namespace {

// Kept activations live until the backward pass has used them; shared ones are dead while the head runs.
constexpr uint32_t kKept = kPhaseForward | kPhaseHead | kPhaseBackward, kShared = kPhaseForward | kPhaseBackward;

// A buffer of a block: elements per token, and the recompute level from which on it is not kept.
struct BlockBuffer {
  Tensor LayerActivations::*tensor;
  const char* name;
  int64_t width;
  DType dtype;
  Recompute recomputed_from;
  bool per_head = false;
};

std::vector<BlockBuffer> block_buffers(const Gpt2Config& config, DType act) {
  using A = LayerActivations;
  const int64_t C = config.channels;
  const DType f32 = DType::kF32;
  return {{&A::ln1, "ln_1", C, act, Recompute::kNormsGelu},
          {&A::mean1, "ln_1.mean", 1, f32, Recompute::kNormsGelu},
          {&A::rstd1, "ln_1.rstd", 1, f32, Recompute::kNormsGelu},
          {&A::qkv, "qkv", 3 * C, act, Recompute::kBlock},
          {&A::att, "attention", C, act, Recompute::kAttention},
          {&A::lse, "attention.lse", config.heads, f32, Recompute::kAttention, true},
          {&A::x2, "residual_mid", C, act, Recompute::kBlock},
          {&A::ln2, "ln_2", C, act, Recompute::kNormsGelu},
          {&A::mean2, "ln_2.mean", 1, f32, Recompute::kNormsGelu},
          {&A::rstd2, "ln_2.rstd", 1, f32, Recompute::kNormsGelu},
          {&A::fch, "mlp.hidden", 4 * C, act, Recompute::kBlock},
          {&A::gelu, "mlp.gelu", 4 * C, act, Recompute::kGelu}};
}

}  // namespace

Activations::Activations(const Gpt2Config& config, const ActivationShapes& shapes, Backend& backend)
    : config_(config), shapes_(shapes), kept_(static_cast<size_t>(config.layers)) {
  const int count = static_cast<int>(config.layers + 1);
  if (!shapes.training || shapes.streamed_layers == 0) {
    // Without a backward pass the residual stream alternates between two buffers.
    residual_.resize(shapes.training ? static_cast<size_t>(count) : 2);
    return;
  }
  stream_ = std::make_unique<LayerStream>("activations.residual", Category::kActivations, count,
                                          std::min(shapes.streamed_layers, count - 1) + 1, LayerStream::Order::kDown,
                                          backend);
  const Tensor x = Tensor::of(nullptr, shapes.dtype, {shapes.batch * shapes.sequence, config.channels});
  for (int l = 0; l < count; ++l) stream_->add(l, x);
}

void Activations::add(MemoryPlan& plan, Tensor* tensor, const std::string& name, int64_t width, DType dtype,
                      uint32_t phases, Layout layout) {
  plan.add(tensor, full_name(name), Category::kActivations, dtype, {shapes_.batch * shapes_.sequence, width},
           alive(phases));
  resized_.push_back({tensor, width, layout});
}

void Activations::declare(MemoryPlan& plan) {
  const int64_t C = config_.channels;
  const DType act = shapes_.dtype, f32 = DType::kF32;
  const Recompute level = shapes_.training ? shapes_.recompute : Recompute::kBlock;
  for (size_t i = 0; i < residual_.size(); ++i)
    add(plan, &residual_[i], "residual." + std::to_string(i), C, act, kKept);
  for (const BlockBuffer& b : block_buffers(config_, act)) {
    const bool cache = shapes_.sampling && b.tensor == &LayerActivations::qkv;
    const Layout layout = cache ? Layout::kCache : b.per_head ? Layout::kPerHead : Layout::kPerToken;
    if (level >= b.recomputed_from && !cache) {
      add(plan, &(shared_.*b.tensor), b.name, b.width, b.dtype, kShared, layout);
      continue;
    }
    for (size_t l = 0; l < kept_.size(); ++l) {
      const std::string name = std::string(b.name) + "." + std::to_string(l);
      add(plan, &(kept_[l].*b.tensor), name, b.width, b.dtype, kKept, layout);
    }
  }
  const uint32_t until_blocks = shapes_.head_blocks ? static_cast<uint32_t>(kPhaseBackward) : 0;
  add(plan, &final_norm, "ln_f", C, act, kPhaseForward | kPhaseHead | until_blocks);
  add(plan, &final_mean, "ln_f.mean", 1, f32, kKept);
  add(plan, &final_rstd, "ln_f.rstd", 1, f32, kKept);
  add(plan, &branch, "branch", C, act, kKept);
  if (shapes_.training) {
    add(plan, &d_residual, "d_residual", C, act, kPhaseHead | kPhaseBackward);
    add(plan, &d_wide, "d_wide", 4 * C, act, kPhaseBackward);
  }
  add(plan, &losses, "losses", 1, f32, kPhaseHead);
  if (shapes_.head_blocks) add(plan, &head_lse, "head.lse", 1, f32, kPhaseHead | kPhaseBackward);
  plan.add(&logits, full_name("logits"), Category::kActivations, act, {shapes_.head_chunk, config_.padded_vocabulary()},
           alive(kPhaseHead | until_blocks));
  // After a forward pass without a backward pass a layer that was fetched ahead may still be on its way.
  if (stream_) stream_->declare(plan, kKept | kPhaseSample);
}

void Activations::resize(int64_t batch, int64_t sequence, int64_t cached) {
  if (batch * (cached + sequence) > shapes_.batch * shapes_.sequence)
    throw std::logic_error("more tokens than were planned for");
  if (cached > 0 && !shapes_.sampling) throw std::logic_error("nothing is kept of tokens before");
  batch_ = batch;
  sequence_ = sequence;
  for (const Resized& r : resized_) {
    Tensor& t = *r.tensor;
    if (r.layout == Layout::kPerHead) {
      t = Tensor::of(t.data, t.dtype, {batch, r.width, sequence});
    } else if (r.layout == Layout::kCache) {
      t = Tensor::of(t.data, t.dtype, {batch, cached + sequence, r.width});
    } else if (r.width == 1) {
      t = Tensor::of(t.data, t.dtype, {batch * sequence});
    } else {
      t = Tensor::of(t.data, t.dtype, {batch, sequence, r.width});
    }
  }
  if (shapes_.training) d_qkv = Tensor::of(d_wide.data, d_wide.dtype, {batch, sequence, 3 * config_.channels});
}

Tensor Activations::logits_block(int64_t columns) const {
  return Tensor::of(logits.data, logits.dtype, {logits.elements() / columns, columns});
}

void Activations::acquire(int64_t index, Access access) {
  if (stream_) stream_->acquire(static_cast<int>(index), access);
}

void Activations::release(int64_t index, bool kept) {
  if (stream_) stream_->release(static_cast<int>(index), kept);
}

Tensor Activations::residual(int64_t index) const {
  if (!stream_) return residual_[static_cast<size_t>(index) % residual_.size()];
  const Tensor x = stream_->tensor(static_cast<int>(index), 0);
  return Tensor::of(x.data, x.dtype, {batch_, sequence_, config_.channels});
}

LayerActivations Activations::layer(int64_t index) const {
  LayerActivations a = kept_[static_cast<size_t>(index)];
  for (const BlockBuffer& b : block_buffers(config_, shapes_.dtype))
    if (shared_.*b.tensor) a.*b.tensor = shared_.*b.tensor;
  a.x = residual(index);
  return a;
}
