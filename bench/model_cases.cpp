// model_cases.cpp: the operations of the forward and backward pass, and what happens once in a micro-batch.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

#include "bench/case_list.h"

namespace {

// Token ids that are distributed as in text: the k-th most frequent one with a probability of about 1/k.
std::vector<int32_t> text_tokens(int64_t count, int64_t vocabulary, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) {
    const double rank = std::pow(static_cast<double>(vocabulary + 1), uniform(random));
    // Frequent tokens lie anywhere in the vocabulary.
    token = static_cast<int32_t>(std::clamp<int64_t>(static_cast<int64_t>(rank) - 1, 0, vocabulary - 1) * 7919 %
                                 vocabulary);
  }
  return tokens;
}

struct GroupedTokens {
  std::vector<int32_t> ids, starts, positions;
  int64_t distinct = 0;
};

GroupedTokens group_tokens(const std::vector<int32_t>& tokens) {
  GroupedTokens groups;
  const size_t count = tokens.size();
  groups.ids.assign(count, -1);
  groups.starts.assign(count + 1, static_cast<int32_t>(count));
  groups.positions.resize(count);
  std::iota(groups.positions.begin(), groups.positions.end(), 0);
  std::stable_sort(groups.positions.begin(), groups.positions.end(),
                   [&](int32_t a, int32_t b) { return tokens[a] < tokens[b]; });
  for (size_t i = 0; i < count; ++i) {
    const int32_t token = tokens[groups.positions[i]];
    if (i > 0 && token == groups.ids[groups.distinct - 1]) continue;
    groups.ids[groups.distinct] = token;
    groups.starts[groups.distinct++] = static_cast<int32_t>(i);
  }
  return groups;
}

class ModelCases : CaseList {
 public:
  using CaseList::CaseList;

  void all() {
    matmuls();
    attention();
    norms_and_activations();
    embedding_and_head();
    elementwise();
    bookkeeping();
  }

 private:
  // y [N, outputs] = x [N, inputs] w [inputs, outputs] + bias, and its two gradients.
  void linear(const std::string& name, int64_t inputs, int64_t outputs) {
    const int64_t N = m_.tokens();
    matmul(name + " forward", N, outputs, inputs, {}, kBF16, true);
    matmul(name + " input_gradient", N, inputs, outputs, {.transpose_b = true});
    matmul(name + " weight_gradient", inputs, outputs, N, {.transpose_a = true});
  }

  void matmuls() {
    const int64_t C = m_.channels, N = m_.tokens(), Vp = m_.padded_vocabulary, r = m_.rank;
    linear("qkv", C, 3 * C);
    linear("proj", C, C);
    linear("fc", C, 4 * C);
    linear("mlp_proj", 4 * C, C);
    matmul("fc weight_gradient_accumulated", C, 4 * C, N, {.transpose_a = true, .accumulate = true}, kF32);
    for (int64_t chunk : m_.head_chunks) {
      matmul("head forward", chunk, Vp, C, {.transpose_b = true});
      matmul("head input_gradient", chunk, C, Vp, {});
      matmul("head weight_gradient", Vp, C, chunk, {.transpose_a = true, .accumulate = true}, kF32);
    }
    matmul("transfer_square", r, r, C, {.transpose_b = true}, kF32);
    matmul("transfer_momentum", r, 4 * C, r, {}, kF32, false, kF32);
  }

  void attention() {
    const int64_t C = m_.channels, N = m_.tokens(), head_dim = C / m_.heads;
    for (auto [heads, dim] : {std::pair{m_.heads, head_dim}, {m_.wide_heads, 2 * head_dim}}) {
      for (int64_t T : m_.attention_sequences) {
        const int64_t B = N / T, width = heads * dim;
        const int NH = static_cast<int>(heads);
        const std::string heads_of_shape = " NH" + std::to_string(heads) + " HD" + std::to_string(dim) + " bf16";
        const std::string shape = "B" + std::to_string(B) + " T" + std::to_string(T) + heads_of_shape;
        add("attention_forward", shape, [=](Inputs& in) {
          const Tensor out = in.empty(kBF16, {B, T, width}), lse = in.empty(kF32, {B, heads, T});
          const Tensor qkv = in.normal(kBF16, {B, T, 3 * width});
          return Call{[=, &in] { in.backend.attention_forward(out, lse, qkv, NH); }};
        });
        add("attention_decode", "T" + std::to_string(T) + heads_of_shape, [=](Inputs& in) {
          const Tensor out = in.empty(kBF16, {width}), qkv = in.normal(kBF16, {T, 3 * width});
          return Call{[=, &in] { in.backend.attention_decode(out, qkv, NH); }};
        });
        add("attention_backward", shape, [=](Inputs& in) {
          const Tensor out = in.empty(kBF16, {B, T, width}), lse = in.empty(kF32, {B, heads, T});
          const Tensor qkv = in.normal(kBF16, {B, T, 3 * width}), dqkv = in.empty(kBF16, {B, T, 3 * width});
          const Tensor dout = in.normal(kBF16, {B, T, width}), dbias = in.empty(kF32, {3 * width});
          in.backend.attention_forward(out, lse, qkv, NH);
          return Call{[=, &in] { in.backend.attention_backward(dqkv, dbias, dout, out, lse, qkv, NH, false); }};
        });
      }
    }
  }

  void norms_and_activations() {
    const int64_t C = m_.channels, N = m_.tokens();
    const std::string narrow = dimensions({N, C}) + " bf16", wide = dimensions({N, 4 * C}) + " bf16";
    add("layernorm_forward", narrow, [=](Inputs& in) {
      const Tensor out = in.empty(kBF16, {N, C}), mean = in.empty(kF32, {N}), rstd = in.empty(kF32, {N});
      const Tensor x = in.normal(kBF16, {N, C}), w = in.normal(kBF16, {C}, 1, 0.1f), b = in.normal(kBF16, {C});
      return Call{[=, &in] { in.backend.layernorm_forward(out, mean, rstd, x, w, b); }};
    });
    add("residual_layernorm_forward", narrow, [=](Inputs& in) {
      const Tensor out = in.empty(kBF16, {N, C}), mean = in.empty(kF32, {N}), rstd = in.empty(kF32, {N});
      const Tensor residual = in.empty(kBF16, {N, C}), x = in.normal(kBF16, {N, C}), y = in.normal(kBF16, {N, C});
      const Tensor w = in.normal(kBF16, {C}, 1, 0.1f), b = in.normal(kBF16, {C});
      return Call{[=, &in] { in.backend.residual_layernorm_forward(residual, out, mean, rstd, x, y, w, b); }};
    });
    add("layernorm_backward", narrow, [=](Inputs& in) {
      const Tensor out = in.empty(kBF16, {N, C}), mean = in.empty(kF32, {N}), rstd = in.empty(kF32, {N});
      const Tensor x = in.normal(kBF16, {N, C}), w = in.normal(kBF16, {C}, 1, 0.1f), b = in.normal(kBF16, {C});
      const Tensor din = in.normal(kBF16, {N, C}), dout = in.normal(kBF16, {N, C});
      const Tensor dw = in.empty(kF32, {C}), db = in.empty(kF32, {C});
      in.backend.layernorm_forward(out, mean, rstd, x, w, b);
      return Call{[=, &in] { in.backend.layernorm_backward(din, dw, db, false, dout, x, mean, rstd, w); }};
    });
    add("gelu_forward", wide, [=](Inputs& in) {
      const Tensor out = in.empty(kBF16, {N, 4 * C}), x = in.normal(kBF16, {N, 4 * C});
      return Call{[=, &in] { in.backend.gelu_forward(out, x); }};
    });
    add("gelu_backward", wide, [=](Inputs& in) {
      const Tensor d = in.normal(kBF16, {N, 4 * C}), x = in.normal(kBF16, {N, 4 * C});
      const Tensor dbias = in.empty(kF32, {4 * C});
      return Call{.run = [=, &in] { in.backend.gelu_backward(d, dbias, x, false); },
                  .refresh =
                      [=, &in] {
                        in.backend.fill_normal(d, 0, 1, {1, RandomPurpose::kInit, 1, 0});
                      }};
    });
    for (int64_t cols : {C, 3 * C, 4 * C}) {
      add("bias_backward", dimensions({N, cols}) + " bf16", [=](Inputs& in) {
        const Tensor dbias = in.empty(kF32, {cols}), dout = in.normal(kBF16, {N, cols});
        return Call{[=, &in] { in.backend.bias_backward(dbias, dout, false); }};
      });
    }
  }

  void embedding_and_head() {
    const int64_t B = m_.batch, T = m_.sequence, C = m_.channels, N = m_.tokens();
    const int64_t V = m_.vocabulary, Vp = m_.padded_vocabulary;
    const std::string shape = dimensions({N, C}) + " bf16";
    add("embedding_forward", shape, [=](Inputs& in) {
      const std::vector<int32_t> ids = text_tokens(N, V, 1);
      const Tensor tokens = in.indices(ids, {B, T}), out = in.empty(kBF16, {B, T, C});
      const Tensor wte = in.normal(kBF16, {Vp, C}), wpe = in.normal(kBF16, {T, C});
      const double rows = static_cast<double>(group_tokens(ids).distinct * C) * 2;
      return Call{.run = [=, &in] { in.backend.embedding_forward(out, tokens, wte, wpe); },
                  .bytes = bytes_of(out) + bytes_of(wpe) + rows};
    });
    // Onto the head's gradient, as with a tied embedding.
    add("embedding_backward", shape, [=](Inputs& in) {
      const GroupedTokens grouped = group_tokens(text_tokens(N, V, 1));
      const TokenGroups groups = {in.indices(grouped.ids, {N}), in.indices(grouped.starts, {N + 1}),
                                  in.indices(grouped.positions, {N})};
      const Tensor dwte = in.normal(kF32, {V, C}), dwpe = in.empty(kF32, {T, C}), dout = in.normal(kBF16, {B, T, C});
      const double rows = static_cast<double>(grouped.distinct * C) * 4;
      return Call{.run = [=, &in] { in.backend.embedding_backward(dwte, true, dwpe, false, dout, groups); },
                  .bytes = bytes_of(dout) + bytes_of(dwpe) + 2 * rows};
    });
    for (int64_t chunk : m_.head_chunks) {
      const std::string logits_shape = dimensions({chunk, Vp}) + " bf16";
      const auto prepare = [=](Inputs& in, bool gradient) {
        const Tensor losses = in.empty(kF32, {chunk}), logits = in.normal(kBF16, {chunk, Vp});
        const Tensor targets = in.indices(text_tokens(chunk, V, 2), {chunk});
        Call call = {.run = [=, &in] { in.backend.classifier(losses, logits, targets, V, 1e-3f, gradient); }};
        if (gradient)
          call.refresh = [=, &in] { in.backend.fill_normal(logits, 0, 1, {1, RandomPurpose::kInit, 1, 0}); };
        return call;
      };
      add("classifier loss", logits_shape, [=](Inputs& in) { return prepare(in, false); });
      add("classifier loss_and_gradient", logits_shape, [=](Inputs& in) { return prepare(in, true); });
      add("classifier_gradient", logits_shape, [=](Inputs& in) {
        const Tensor logits = in.normal(kBF16, {chunk, Vp}), lse = in.normal(kF32, {chunk}, 11, 0.1f);
        const Tensor targets = in.indices(text_tokens(chunk, V, 2), {chunk});
        return Call{.run = [=, &in] { in.backend.classifier_gradient(logits, targets, lse, 0, V, 1e-3f); },
                    .refresh =
                        [=, &in] {
                          in.backend.fill_normal(logits, 0, 1, {1, RandomPurpose::kInit, 1, 0});
                        }};
      });
    }
  }

  void elementwise() {
    const int64_t C = m_.channels, N = m_.tokens();
    const std::string shape = dimensions({N, C});
    add("copy", shape + " bf16", [=](Inputs& in) {
      const Tensor out = in.empty(kBF16, {N, C}), x = in.normal(kBF16, {N, C});
      return Call{.run = [=, &in] { in.backend.copy(out.data, x.data, x.bytes()); }, .bytes = 2 * bytes_of(x)};
    });
    add("fill", shape + " bf16", [=](Inputs& in) {
      const Tensor out = in.empty(kBF16, {N, C});
      return Call{.run = [=, &in] { in.backend.fill(out.data, 0, out.bytes()); }, .bytes = bytes_of(out)};
    });
    add("convert to_bf16", shape + " fp32", [=](Inputs& in) {
      const Tensor out = in.empty(kBF16, {N, C}), x = in.normal(kF32, {N, C});
      return Call{[=, &in] { in.backend.convert(out, x); }};
    });
    add("convert to_fp32", shape + " bf16", [=](Inputs& in) {
      const Tensor out = in.empty(kF32, {N, C}), x = in.normal(kBF16, {N, C});
      return Call{[=, &in] { in.backend.convert(out, x); }};
    });
    add("fill_constant", shape + " bf16", [=](Inputs& in) {
      const Tensor out = in.empty(kBF16, {N, C});
      return Call{[=, &in] { in.backend.fill_constant(out, 1.5f); }};
    });
    add("fill_normal", shape + " bf16", [=](Inputs& in) {
      const Tensor out = in.empty(kBF16, {N, C});
      return Call{[=, &in] { in.backend.fill_normal(out, 0, 1, {1, RandomPurpose::kInit, 1, 0}); }};
    });
  }

  // What happens once in a micro-batch or a step, on next to nothing: the time is that of a launch.
  void bookkeeping() {
    const int64_t N = m_.tokens();
    add("sum losses", dimensions({N}) + " fp32", [=](Inputs& in) {
      const Tensor out = in.empty(kF32, {1}), x = in.normal(kF32, {N});
      return Call{[=, &in] { in.backend.sum(out, x, 1e-3f, false); }};
    });
    add("gate_on_finite", "1 fp32", [](Inputs& in) {
      const Tensor value = in.normal(kF32, {1});
      StepScalars* const scalars = in.scalars();
      return Call{[=, &in] { in.backend.gate_on_finite(scalars, value); }};
    });
    add("clip_scale", "1 fp32", [](Inputs& in) {
      const float* const squares = in.number(2.0f);
      StepScalars* const scalars = in.scalars();
      return Call{[=, &in] { in.backend.clip_scale(scalars, squares, 1.0f); }};
    });
    add("increment", "1 uint32", [](Inputs& in) {
      uint32_t* const counter = &in.scalars()->rounding_counter;
      return Call{[=, &in] { in.backend.increment(counter); }};
    });
  }
};

}  // namespace

void add_model_cases(std::vector<KernelCase>& cases, const BenchModel& model) { ModelCases(cases, model).all(); }
