// activations.h: the buffers of a forward and backward pass, and which of them each recompute level keeps per layer.
//
// clang-format off
//   level       kept for every layer, in units of B*T*C elements                 recomputed in the backward pass
//   none        x 1, ln1 1, qkv 3, att 1, x2 1, ln2 1, fch 4, gelu 4     = 16    nothing
//   gelu        all but gelu                                             = 12    GELU
//   norms+gelu  all but gelu, ln1, ln2                                   = 10    both LayerNorms, too
//   attention   all but gelu, ln1, ln2, att                              =  9    attention's output, too
//   block       x                                                        =  1    the whole block but its last matmul
// clang-format on
//
// What is not kept exists once and is shared by all layers. x can be kept in host memory.
//
// To sample text only qkv is kept, of one sequence: its keys and values are those of the tokens so far, and a pass over
// the next token has rows of one token in everything else.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/layer_stream.h"
#include "kernels/memory_plan.h"
#include "kernels/tensor.h"
#include "model/config.h"

enum class Recompute : uint8_t { kNone, kGelu, kNormsGelu, kAttention, kBlock };
inline constexpr std::pair<Recompute, const char*> kRecomputeNames[] = {{Recompute::kNone, "none"},
                                                                        {Recompute::kGelu, "gelu"},
                                                                        {Recompute::kNormsGelu, "norms+gelu"},
                                                                        {Recompute::kAttention, "attention"},
                                                                        {Recompute::kBlock, "block"}};

struct ActivationShapes {
  int64_t batch = 1, sequence = 1;  // the micro-batch: B sequences of T tokens
  int64_t head_chunk = 1;           // tokens whose logits exist at a time
  DType dtype = DType::kF32;
  Recompute recompute = Recompute::kNone;
  bool training = true;      // false: forward passes only, nothing is kept
  bool sampling = false;     // (without training) every layer keeps qkv; all of it is alive in kPhaseSample
  bool head_blocks = false;  // the head's weight gets its gradient in blocks of rows, after the backward pass
  int streamed_layers = 0;   // > 0: x of all layers is in host memory, of one more than so many on the device
};

// One layer's tensors, for the B and T of the batch at hand (at most the planned ones).
struct LayerActivations {
  Tensor x;                  // [B,T,C] residual stream into the block
  Tensor ln1, mean1, rstd1;  // [B,T,C], [B*T], [B*T]
  Tensor qkv;                // [B,T,3C]; when sampling of all tokens so far
  Tensor att, lse;           // [B,T,C], [B,NH,T]
  Tensor x2;                 // [B,T,C] residual stream after attention
  Tensor ln2, mean2, rstd2;
  Tensor fch, gelu;  // [B,T,4C]
};

class Activations {
 public:
  Activations(const Gpt2Config& config, const ActivationShapes& shapes, Backend& backend);

  void declare(MemoryPlan& plan);
  // Makes all tensors those of B sequences of T tokens, which (only when sampling) come after `cached` others. Throws
  // std::logic_error when they are more than planned.
  void resize(int64_t batch, int64_t sequence, int64_t cached = 0);

  // x of a layer is valid between acquire() and release(), which nest; `kept`: it was written and is needed again.
  void acquire(int64_t index, Access access);
  void release(int64_t index, bool kept);

  // Whether each layer has its own of this buffer, so that it is there in the backward pass. Valid once there is
  // memory.
  bool keeps(Tensor LayerActivations::*buffer) const { return !(shared_.*buffer); }

  // The layer's x has to be acquired, here and in residual().
  LayerActivations layer(int64_t index) const;
  Tensor residual(int64_t index) const;       // x of layer `index`; index L: the stream after the last block
  Tensor final_norm, final_mean, final_rstd;  // [B,T,C], [B*T], [B*T]
  Tensor branch;                              // [B,T,C]: output of a projection; gradient of one's input
  Tensor d_residual;                          // [B,T,C]
  Tensor d_wide;                              // [B,T,4C]
  Tensor d_qkv;                               // [B,T,3C], the same memory as d_wide
  Tensor logits;                              // [head_chunk, Vp]
  Tensor losses;                              // [B*T] fp32
  Tensor head_lse;                            // [B*T] fp32, log-sum-exp of the logits; only with head_blocks

  // The logits' memory as [tokens, columns], as many tokens as fit.
  Tensor logits_block(int64_t columns) const;

 private:
  // How resize() gives a tensor the shape of the batch: [B,T,width], or [B*T] of width 1; [B,width,T]; or [B,T,width]
  // of all tokens so far.
  enum class Layout : uint8_t { kPerToken, kPerHead, kCache };
  struct Resized {
    Tensor* tensor;
    int64_t width;
    Layout layout;
  };
  uint32_t alive(uint32_t phases) const { return shapes_.sampling ? static_cast<uint32_t>(kPhaseSample) : phases; }
  std::string full_name(const std::string& name) const {
    return (shapes_.sampling ? "sample." : "activations.") + name;
  }
  void add(MemoryPlan& plan, Tensor* tensor, const std::string& name, int64_t width, DType dtype, uint32_t phases,
           Layout layout = Layout::kPerToken);

  Gpt2Config config_;
  ActivationShapes shapes_;
  std::vector<Tensor> residual_;        // x, of each layer and of the last one's output
  std::vector<LayerActivations> kept_;  // of each layer
  LayerActivations shared_;             // by all layers
  std::vector<Resized> resized_;
  std::unique_ptr<LayerStream> stream_;  // of x
  int64_t batch_ = 0, sequence_ = 0;
};
