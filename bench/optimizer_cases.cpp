// optimizer_cases.cpp: what the optimizers do to gradients, states and weights, and Flora's projections.
#include <utility>
#include <vector>

#include "bench/case_list.h"

namespace {

class OptimizerCases : CaseList {
 public:
  using CaseList::CaseList;

  void all() {
    const int64_t C = m_.channels;
    for (auto [rows, cols] : {std::pair{C, 3 * C}, {C, 4 * C}}) {
      updates(rows, cols, kBF16);
      flora(rows, cols);
    }
    flora(4 * C, C);
    vectors();
    updates(m_.vocabulary, C, kF32);
    projections();
  }

 private:
  // The eight vectors of a layer, updated together.
  void vectors() {
    const int64_t C = m_.channels;
    const std::vector<int64_t> sizes = {C, C, 3 * C, C, C, C, 4 * C, C};
    add("unfactored_update", dimensions({13 * C}) + " bf16", [=](Inputs& in) {
      std::vector<ParameterUpdate> updates;
      for (int64_t n : sizes)
        updates.push_back({.weight = in.normal(kBF16, {n}, 0, 0.02f),
                           .momentum = in.normal(kBF16, {n}),
                           .second_moment = in.normal(kF32, {n}, 1, 0.1f),
                           .grad = in.normal(kBF16, {n})});
      const SquaresTarget squares{in.number(0.0f), false};
      const StepScalars* const scalars = in.scalars();
      return Call{[=, &in] { in.backend.unfactored_update(updates, {.beta1 = 0.9f}, scalars, squares); }};
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
    add("factored_squares", shape, [=](Inputs& in) {
      const Tensor row = in.empty(kF32, {rows}), col = in.empty(kF32, {cols}), g = in.normal(gradient, {rows, cols});
      return Call{[=, &in] { in.backend.factored_squares(row, col, g, 1e-30f, false); }};
    });
    add("factored_scales", shape, [=](Inputs& in) {
      const Tensor row = in.normal(kF32, {rows}, 1, 0.1f), col = in.normal(kF32, {cols}, 1, 0.1f);
      const Tensor row_scale = in.normal(kF32, {rows}, 1, 0.1f), col_scale = in.normal(kF32, {cols}, 1, 0.1f);
      const StepScalars* const scalars = in.scalars();
      return Call{[=, &in] { in.backend.factored_scales(row, col, row_scale, col_scale, scalars); }};
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
      return Call{[=, &in] { in.backend.scale_rows_cols({x, x, row, col}); }};
    });
    for (DType dtype : {kBF16, DType::kI8}) {
      add(std::string("momentum_update ") + dtype_name(dtype), shape, [=](Inputs& in) {
        const Tensor update = in.normal(gradient, {rows, cols}), m = state(in, dtype, rows, cols, 0, 1);
        const StepScalars* const scalars = in.scalars();
        return Call{[=, &in] { in.backend.momentum_update(update, m, 0.9f, scalars); }};
      });
    }
    add("scaled_momentum_update bf16", shape, [=](Inputs& in) {
      const Tensor update = in.normal(gradient, {rows, cols}), m = state(in, kBF16, rows, cols, 0, 1);
      const Tensor row = in.empty(kF32, {rows}), col = in.empty(kF32, {cols});
      in.backend.fill_constant(row, -1.0f);
      in.backend.fill_constant(col, 1.0f);
      const SquaresTarget squares{in.number(0.0f), false};
      const StepScalars* const scalars = in.scalars();
      return Call{[=, &in] { in.backend.scaled_momentum_update(update, m, row, col, 0.9f, scalars, squares); }};
    });
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
        const ParameterUpdate update = {.weight = w,
                                        .master = master,
                                        .momentum = m,
                                        .second_moment = v,
                                        .grad = g,
                                        .weight_decay = 0.1f,
                                        .key = rounding};
        return Call{[=, &in] { in.backend.adamw_update(update, {}, scalars); }};
      });
    }
    for (bool momentum : {false, true}) {
      add(momentum ? "sgd_update momentum" : "sgd_update", shape, [=](Inputs& in) {
        const Tensor w = in.normal(kBF16, {rows, cols}, 0, 0.02f), g = in.normal(gradient, {rows, cols});
        const Tensor m = momentum ? in.normal(kBF16, {rows, cols}) : Tensor{};
        const ParameterUpdate update = {.weight = w, .momentum = m, .grad = g, .weight_decay = 0.1f, .key = rounding};
        const float beta1 = momentum ? 0.9f : 0.0f;
        const StepScalars* const scalars = in.scalars();
        return Call{[=, &in] { in.backend.sgd_update(update, beta1, scalars); }};
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
    add("quantize_weight", shape, [=](Inputs& in) {
      const Tensor x = in.normal(kF32, {rows, cols}, 0, 0.02f), out = in.quantized(DType::kI8, {rows, cols}, 0, 0.02f);
      const StepScalars* const scalars = in.scalars();
      return Call{[=, &in] { in.backend.quantize_weight(out, x, rounding, scalars); }};
    });
    add("dequantize_weight", shape, [=](Inputs& in) {
      const Tensor out = in.empty(kBF16, {rows, cols}), x = in.quantized(DType::kI8, {rows, cols}, 0, 0.02f);
      return Call{[=, &in] { in.backend.dequantize_weight(out, x); }};
    });
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
        return Call{[=, &in] { in.backend.ema({.momentum = momentum, .in = s, .beta1 = 0.9f}, scalars); }};
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
                 {"cosine", ProjectionKind::kCosine}};
    for (const auto& kind : kinds) {
      add(std::string("generate_projection ") + kind.name, shape, [=](Inputs& in) {
        const Tensor p = in.empty(kBF16, {r, C});
        const uint32_t* const index = &in.scalars()->projection_index;
        return Call{[=, &in] {
          in.backend.generate_projection(p, kind.kind, {1, RandomPurpose::kProjection, 1, 0}, index);
        }};
      });
    }
  }
};

}  // namespace

void add_optimizer_cases(std::vector<KernelCase>& cases, const BenchModel& model) {
  OptimizerCases(cases, model).all();
}
