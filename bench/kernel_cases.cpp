// kernel_cases.cpp: see kernel_cases.h. Dtypes are those of a run in bf16: weights, activations, their gradients and
// momentum bf16; statistics, losses, second moments and the gradients of vectors and of the embedding fp32.
#include "bench/kernel_cases.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

namespace {

constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16;

const BenchModel kModels[] = {
    {.name = "124M",
     .batch = 16,
     .sequence = 1024,
     .channels = 768,
     .heads = 12,
     .wide_heads = 6,
     .vocabulary = 50257,
     .padded_vocabulary = 50304,
     .rank = 256,
     .attention_sequences = {1024, 2048, 4096},
     .head_chunks = {512, 4096}},
    {.name = "1558M",
     .batch = 16,
     .sequence = 1024,
     .channels = 1600,
     .heads = 25,
     .wide_heads = 12,
     .vocabulary = 50257,
     .padded_vocabulary = 50304,
     .rank = 256,
     .attention_sequences = {1024, 2048, 4096},
     .head_chunks = {512, 4096}},
    {.name = "toy",
     .batch = 4,
     .sequence = 16,
     .channels = 128,
     .heads = 2,
     .wide_heads = 1,
     .vocabulary = 257,
     .padded_vocabulary = 384,
     .rank = 16,
     .attention_sequences = {16, 32},
     .head_chunks = {16, 64}},
};

std::string dimensions(std::initializer_list<int64_t> shape) {
  std::string text;
  for (int64_t extent : shape) text += (text.empty() ? "" : "x") + std::to_string(extent);
  return text;
}

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

double bytes_of(const Tensor& tensor) { return static_cast<double>(tensor.bytes()); }

// Collects the cases of one model.
class Cases {
 public:
  explicit Cases(const BenchModel& model) : m_(model) {}

  std::vector<KernelCase> all() {
    matmuls();
    attention();
    norms_and_activations();
    embedding_and_head();
    elementwise();
    bookkeeping();
    const int64_t C = m_.channels;
    for (auto [rows, cols] : {std::pair{C, 3 * C}, {C, 4 * C}}) {
      updates(rows, cols, kBF16);
      flora(rows, cols);
    }
    flora(4 * C, C);
    updates(m_.vocabulary, C, kF32);
    projections();
    return std::move(cases_);
  }

 private:
  void add(std::string operation, std::string shape, std::function<Call(Inputs&)> prepare) {
    cases_.push_back({std::move(operation), m_.name, std::move(shape), std::move(prepare)});
  }

  // out [m,n] of the dtype given; the operands are bf16 unless a_dtype says otherwise.
  void matmul(const std::string& name, int64_t m, int64_t n, int64_t k, MatmulOptions options, DType out_dtype = kBF16,
              bool with_bias = false, bool with_gelu = false, DType a_dtype = kBF16) {
    add("matmul " + name, dimensions({m, n, k}) + " bf16", [=](Inputs& in) {
      const Tensor out = in.normal(out_dtype, {m, n});
      const Tensor a = options.transpose_a ? in.normal(a_dtype, {k, m}) : in.normal(a_dtype, {m, k});
      const Tensor b = options.transpose_b ? in.normal(kBF16, {n, k}) : in.normal(kBF16, {k, n});
      MatmulOptions all = options;
      if (with_bias) all.bias = in.normal(kBF16, {n});
      if (with_gelu) all.gelu_input = in.normal(kBF16, {m, n});
      Call call = {.run = [=, &in] { in.backend.matmul(out, a, b, all); }};
      if (with_gelu) call.bytes = bytes_of(a) + bytes_of(b) + bytes_of(out) + bytes_of(all.gelu_input);
      return call;
    });
  }

  // y [N, outputs] = x [N, inputs] w [inputs, outputs] + bias, and its two gradients.
  void linear(const std::string& name, int64_t inputs, int64_t outputs) {
    const int64_t N = m_.tokens();
    matmul(name + " forward", N, outputs, inputs, {}, kBF16, true);
    matmul(name + " input_gradient", N, inputs, outputs, {.transpose_b = true});
    matmul(name + " weight_gradient", inputs, outputs, N, {.transpose_a = true});
  }

  void matmuls() {
    const int64_t C = m_.channels, N = m_.tokens(), V = m_.vocabulary, Vp = m_.padded_vocabulary, r = m_.rank;
    linear("qkv", C, 3 * C);
    linear("proj", C, C);
    linear("fc", C, 4 * C);
    linear("mlp_proj", 4 * C, C);
    matmul("mlp_proj input_gradient_gelu", N, 4 * C, C, {.transpose_b = true}, kBF16, false, true);
    matmul("fc weight_gradient_accumulated", C, 4 * C, N, {.transpose_a = true, .accumulate = true}, kF32);
    for (int64_t chunk : m_.head_chunks) {
      matmul("head forward", chunk, Vp, C, {.transpose_b = true});
      matmul("head input_gradient", chunk, C, Vp, {});
      // The padding's columns of the logits are left out: rows of a view.
      add("matmul head weight_gradient", dimensions({V, C, chunk}) + " bf16", [=](Inputs& in) {
        const Tensor out = in.normal(kF32, {V, C}), x = in.normal(kBF16, {chunk, C});
        Tensor logits = in.normal(kBF16, {chunk, Vp});
        logits.shape[1] = V;
        return Call{[=, &in] { in.backend.matmul(out, logits, x, {.transpose_a = true, .accumulate = true}); }};
      });
    }
    matmul("transfer_square", r, r, C, {.transpose_b = true}, kF32);
    matmul("transfer_momentum", r, 4 * C, r, {}, kF32, false, false, kF32);
  }

  void attention() {
    const int64_t C = m_.channels, N = m_.tokens(), head_dim = C / m_.heads;
    for (auto [heads, dim] : {std::pair{m_.heads, head_dim}, {m_.wide_heads, 2 * head_dim}}) {
      for (int64_t T : m_.attention_sequences) {
        const int64_t B = N / T, width = heads * dim;
        const int NH = static_cast<int>(heads);
        const std::string shape = "B" + std::to_string(B) + " T" + std::to_string(T) + " NH" + std::to_string(heads) +
                                  " HD" + std::to_string(dim) + " bf16";
        add("attention_forward", shape, [=](Inputs& in) {
          const Tensor out = in.empty(kBF16, {B, T, width}), lse = in.empty(kF32, {B, heads, T});
          const Tensor qkv = in.normal(kBF16, {B, T, 3 * width});
          return Call{[=, &in] { in.backend.attention_forward(out, lse, qkv, NH); }};
        });
        add("attention_backward", shape, [=](Inputs& in) {
          const Tensor out = in.empty(kBF16, {B, T, width}), lse = in.empty(kF32, {B, heads, T});
          const Tensor qkv = in.normal(kBF16, {B, T, 3 * width}), dqkv = in.empty(kBF16, {B, T, 3 * width});
          const Tensor dout = in.normal(kBF16, {B, T, width});
          in.backend.attention_forward(out, lse, qkv, NH);
          return Call{[=, &in] { in.backend.attention_backward(dqkv, dout, out, lse, qkv, NH); }};
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
      return Call{.run = [=, &in] { in.backend.gelu_backward(d, x); },
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
    add("add", shape + " bf16", [=](Inputs& in) {
      const Tensor out = in.empty(kBF16, {N, C}), x = in.normal(kBF16, {N, C}), y = in.normal(kBF16, {N, C});
      return Call{[=, &in] { in.backend.add(out, x, y); }};
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

  // One parameter of the shape given, as every optimizer works on it.
  void updates(int64_t rows, int64_t cols, DType gradient) {
    const std::string shape = dimensions({rows, cols}) + " bf16";
    const RandomKey rounding = {1, RandomPurpose::kWeightRounding, 1, 0};
    const int64_t elements = rows * cols;
    add("accumulate fp32", shape, [=](Inputs& in) {
      const Tensor sum = in.normal(kF32, {rows, cols}), g = in.normal(kBF16, {rows, cols});
      const uint32_t* const counter = &in.scalars()->rounding_counter;
      return Call{[=, &in] { in.backend.accumulate(sum, g, rounding, counter); }};
    });
    add("accumulate bf16", shape, [=](Inputs& in) {
      const Tensor sum = in.normal(kBF16, {rows, cols}), g = in.normal(kBF16, {rows, cols});
      const uint32_t* const counter = &in.scalars()->rounding_counter;
      return Call{[=, &in] { in.backend.accumulate(sum, g, rounding, counter); }};
    });
    add("scale", shape, [=](Inputs& in) {
      const Tensor x = in.normal(gradient, {rows, cols});
      const float* const factor = in.number(-1.0f);
      return Call{[=, &in] { in.backend.scale(x, factor); }};
    });
    add("sum_squares", shape, [=](Inputs& in) {
      const Tensor out = in.empty(kF32, {1}), x = in.normal(gradient, {rows, cols});
      return Call{[=, &in] { in.backend.sum_squares(out, x, false); }};
    });
    add("sum", shape, [=](Inputs& in) {
      const Tensor out = in.empty(kF32, {1}), x = in.normal(gradient, {rows, cols});
      return Call{[=, &in] { in.backend.sum(out, x, 1.0f, false); }};
    });
    add("factored_second_moment", shape, [=](Inputs& in) {
      const Tensor row = in.normal(kF32, {rows}, 1, 0.1f), col = in.normal(kF32, {cols}, 1, 0.1f);
      const Tensor row_scale = in.empty(kF32, {rows}), col_scale = in.empty(kF32, {cols});
      const Tensor g = in.normal(gradient, {rows, cols});
      const StepScalars* const scalars = in.scalars();
      return Call{[=, &in] { in.backend.factored_second_moment(row, col, row_scale, col_scale, g, 1e-30f, scalars); }};
    });
    for (DType dtype : {kF32, DType::kU8}) {
      add(std::string("full_second_moment ") + dtype_name(dtype), shape, [=](Inputs& in) {
        const Tensor g = in.normal(gradient, {rows, cols});
        const Tensor v = state(in, dtype, rows, cols, 1, 0.1f);
        const StepScalars* const scalars = in.scalars();
        return Call{.run = [=, &in] { in.backend.full_second_moment(g, v, 1e-30f, scalars); },
                    .refresh =
                        [=, &in] {
                          in.backend.fill_normal(g, 0, 1, {1, RandomPurpose::kInit, 1, 0});
                        }};
      });
    }
    add("scale_rows_cols", shape, [=](Inputs& in) {
      const Tensor x = in.normal(gradient, {rows, cols}), row = in.empty(kF32, {rows}), col = in.empty(kF32, {cols});
      in.backend.fill_constant(row, -1.0f);
      in.backend.fill_constant(col, 1.0f);
      return Call{[=, &in] { in.backend.scale_rows_cols(x, x, row, col, 1.0f); }};
    });
    for (DType dtype : {kBF16, DType::kI8}) {
      add(std::string("momentum_update ") + dtype_name(dtype), shape, [=](Inputs& in) {
        const Tensor update = in.normal(gradient, {rows, cols}), m = state(in, dtype, rows, cols, 0, 1);
        const StepScalars* const scalars = in.scalars();
        return Call{[=, &in] { in.backend.momentum_update(update, m, 0.9f, scalars); }};
      });
    }
    for (bool master : {false, true}) {
      add(master ? "apply_update master" : "apply_update", shape, [=](Inputs& in) {
        const Tensor w = in.normal(kBF16, {rows, cols}, 0, 0.02f), update = in.normal(gradient, {rows, cols});
        const Tensor copy = master ? in.normal(kF32, {rows, cols}, 0, 0.02f) : Tensor{};
        const float* const squares = in.number(static_cast<float>(elements));
        const StepScalars* const scalars = in.scalars();
        return Call{[=, &in] {
          in.backend.apply_update(w, copy, update, {.weight_decay = 0.1f}, squares, nullptr, elements, rounding,
                                  scalars);
        }};
      });
    }
    const struct {
      const char* name;
      DType m, v;
      bool master;
    } adamw[] = {{"bf16", kBF16, kF32, false}, {"int8", DType::kI8, DType::kU8, false}, {"master", kF32, kF32, true}};
    for (const auto& kind : adamw) {
      add(std::string("adamw_update ") + kind.name, shape, [=](Inputs& in) {
        const Tensor w = in.normal(kBF16, {rows, cols}, 0, 0.02f), g = in.normal(gradient, {rows, cols});
        const Tensor m = state(in, kind.m, rows, cols, 0, 1), v = state(in, kind.v, rows, cols, 1, 0.1f);
        const Tensor master = kind.master ? in.normal(kF32, {rows, cols}, 0, 0.02f) : Tensor{};
        const StepScalars* const scalars = in.scalars();
        return Call{
            [=, &in] { in.backend.adamw_update(w, master, m, v, g, {.weight_decay = 0.1f}, rounding, scalars); }};
      });
    }
    for (bool momentum : {false, true}) {
      add(momentum ? "sgd_update momentum" : "sgd_update", shape, [=](Inputs& in) {
        const Tensor w = in.normal(kBF16, {rows, cols}, 0, 0.02f), g = in.normal(gradient, {rows, cols});
        const Tensor m = momentum ? in.normal(kBF16, {rows, cols}) : Tensor{};
        const SgdOptions options = {.beta1 = momentum ? 0.9f : 0.0f, .weight_decay = 0.1f};
        const StepScalars* const scalars = in.scalars();
        return Call{[=, &in] { in.backend.sgd_update(w, {}, m, g, options, rounding, scalars); }};
      });
    }
    for (DType dtype : {DType::kI8, DType::kU8}) {
      add(std::string("quantize ") + dtype_name(dtype), shape, [=](Inputs& in) {
        const float mean = dtype == DType::kU8 ? 1.0f : 0.0f, stddev = dtype == DType::kU8 ? 0.1f : 1.0f;
        const Tensor x = in.normal(kF32, {rows, cols}, mean, stddev);
        const Tensor out = in.quantized(dtype, {rows, cols}, mean, stddev);
        return Call{[=, &in] { in.backend.quantize(out, x); }};
      });
      add(std::string("dequantize ") + dtype_name(dtype), shape, [=](Inputs& in) {
        const Tensor out = in.empty(kBF16, {rows, cols}), x = in.quantized(dtype, {rows, cols}, 1, 0.1f);
        return Call{[=, &in] { in.backend.dequantize(out, x); }};
      });
    }
  }

  static Tensor state(Inputs& in, DType dtype, int64_t rows, int64_t cols, float mean, float stddev) {
    const bool narrow = dtype == DType::kI8 || dtype == DType::kU8;
    return narrow ? in.quantized(dtype, {rows, cols}, mean, stddev) : in.normal(dtype, {rows, cols}, mean, stddev);
  }

  // The compressed momentum of a parameter [n, m]: [r, m] when it is wide, [n, r] otherwise.
  void flora(int64_t n, int64_t m) {
    const int64_t r = m_.rank;
    const bool wide = n < m;
    if (wide) {
      matmul("down", r, m, n, {}, kF32);
      matmul("up", n, m, r, {.transpose_a = true, .accumulate = true, .alpha = 1e-3f});
    } else {
      matmul("down", n, r, m, {.transpose_b = true}, kF32);
      matmul("up", n, m, r, {.accumulate = true, .alpha = 1e-3f});
    }
    const int64_t rows = wide ? r : n, cols = wide ? m : r;
    const std::string shape = dimensions({rows, cols}) + " bf16";
    for (DType dtype : {kBF16, DType::kI8}) {
      add(std::string("ema ") + dtype_name(dtype), shape, [=](Inputs& in) {
        const Tensor momentum = state(in, dtype, rows, cols, 0, 1), s = in.normal(kF32, {rows, cols});
        const StepScalars* const scalars = in.scalars();
        return Call{[=, &in] { in.backend.ema(momentum, s, 0.9f, scalars); }};
      });
    }
    add("restore_norm", dimensions({rows, cols}) + " fp32", [=](Inputs& in) {
      const Tensor x = in.normal(kF32, {rows, cols});
      const float *const target = in.number(1.0f), *const current = in.number(1.0000002f);
      return Call{[=, &in] { in.backend.restore_norm(x, target, current); }};
    });
  }

  void projections() {
    const int64_t r = m_.rank, C = m_.channels;
    const std::string shape = dimensions({r, C}) + " bf16";
    const struct {
      const char* name;
      ProjectionKind kind;
    } kinds[] = {{"gaussian", ProjectionKind::kGaussian},
                 {"rademacher", ProjectionKind::kRademacher},
                 {"orthonormal", ProjectionKind::kOrthonormal}};
    for (const auto& kind : kinds) {
      add(std::string("generate_projection ") + kind.name, shape, [=](Inputs& in) {
        const Tensor p = in.empty(kBF16, {r, C});
        const uint32_t* const index = &in.scalars()->projection_index;
        return Call{[=, &in] {
          in.backend.generate_projection(p, kind.kind, {1, RandomPurpose::kProjection, 1, 0}, index);
        }};
      });
    }
    add("orthonormalize_rows", shape, [=](Inputs& in) {
      const Tensor p = in.normal(kBF16, {r, C}), factor = in.empty(kF32, {2 * r, r});  // r x r doubles
      StepScalars* const scalars = in.scalars();
      return Call{[=, &in] { in.backend.orthonormalize_rows(p, factor.data, scalars); }};
    });
  }

  const BenchModel& m_;
  std::vector<KernelCase> cases_;
};

}  // namespace

const BenchModel* find_bench_model(const std::string& name) {
  for (const BenchModel& model : kModels)
    if (model.name == name) return &model;
  return nullptr;
}

std::vector<KernelCase> kernel_cases(const BenchModel& model) { return Cases(model).all(); }

size_t bench_workspace_bytes(const Backend& backend, const BenchModel& model) {
  size_t bytes = 0;
  for (int64_t sequence : model.attention_sequences) {
    bytes = std::max(bytes, backend.workspace_bytes({.batch = model.tokens() / sequence,
                                                     .sequence = sequence,
                                                     .channels = model.channels,
                                                     .heads = model.heads,
                                                     .vocabulary = model.padded_vocabulary,
                                                     .any_bf16 = true}));
  }
  return bytes;
}

Inputs::~Inputs() {
  for (void* memory : memory_) backend.release(memory);
}

void* Inputs::allocate(size_t bytes) {
  memory_.push_back(backend.allocate(bytes));
  bytes_ += bytes;
  return memory_.back();
}

// Not zero either: what an operation overwrites is random bits before.
Tensor Inputs::empty(DType dtype, std::initializer_list<int64_t> shape) { return normal(dtype, shape); }

Tensor Inputs::normal(DType dtype, std::initializer_list<int64_t> shape, float mean, float stddev) {
  Tensor t = Tensor::of(nullptr, dtype, shape);
  t.data = allocate(t.bytes());
  backend.fill_normal(t, mean, stddev, {seed_, RandomPurpose::kInit, static_cast<uint32_t>(memory_.size()), 0});
  return t;
}

Tensor Inputs::quantized(DType dtype, std::initializer_list<int64_t> shape, float mean, float stddev) {
  Tensor t = Tensor::of(nullptr, dtype, shape);
  t.data = allocate(t.bytes());
  t.scales = static_cast<float*>(allocate(static_cast<size_t>(quant_blocks(t.elements())) * sizeof(float)));
  Inputs numbers(backend, seed_ + 1);
  backend.quantize(t, numbers.normal(DType::kF32, shape, mean, stddev));
  backend.synchronize();
  return t;
}

Tensor Inputs::indices(const std::vector<int32_t>& values, std::initializer_list<int64_t> shape) {
  Tensor t = Tensor::of(nullptr, DType::kI32, shape);
  t.data = allocate(t.bytes());
  backend.copy(t.data, values.data(), t.bytes());
  return t;
}

float* Inputs::number(float value) {
  float* const memory = static_cast<float*>(allocate(sizeof value));
  backend.copy(memory, &value, sizeof value);
  return memory;
}

StepScalars* Inputs::scalars() {
  const StepScalars values = {.lr = 1e-7f,
                              .beta2 = 0.95f,
                              .bias_correction1 = 0.5f,
                              .bias_correction2 = 0.5f,
                              .step = 7,
                              .projection_index = 1,
                              .next_projection_index = 2,
                              .rounding_counter = 3};
  scalars_ = static_cast<StepScalars*>(allocate(sizeof values));
  backend.copy(scalars_, &values, sizeof values);
  return scalars_;
}

bool Inputs::gate_is_open() const {
  if (!scalars_) return true;
  StepScalars values;
  backend.copy(&values, scalars_, sizeof values);
  backend.synchronize();
  return values.gate != 0;
}
