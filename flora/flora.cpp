// flora.cpp: the Flora update; see flora.h. The order within a step is the design's: S from the raw gradient, D in its
// place from the old momentum, the transfer, the new momentum.
#include "flora/flora.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "flora/optimizer_state.h"

namespace {

constexpr int64_t kSquares = 4;  // an element each: of the update, the weight, the momentum before and after a transfer

}  // namespace

Flora::Flora(const OptimizerConfig& config, const std::vector<Parameter>& parameters, DType gradient_dtype,
             Backend& backend)
    : config_(config),
      backend_(backend),
      row_scale_("flora.row_scale", DType::kF32),
      col_scale_("flora.col_scale", DType::kF32),
      projection_("flora.projection", gradient_dtype),
      projection2_("flora.scaled_projection", gradient_dtype),
      compressed_("flora.compressed_update", DType::kF32),
      decoded_momentum_("flora.decoded_momentum", gradient_dtype),
      moved_("flora.moved_momentum", DType::kF32),
      square_("flora.transfer", DType::kF32),
      factor_("flora.cholesky", DType::kF32) {
  require_indexed(parameters);
  if (config_.kappa == 0) throw std::invalid_argument("kappa must be at least 1");
  if (config_.kind == OptimizerKind::kAdafactor) config_.rank = 0;
  for (const Parameter& parameter : parameters) {
    Slot slot;
    slot.parameter = parameter;
    slot.factored = config_.factored && parameter.matrix;
    slot.compressed = slot.factored && has_momentum() &&
                      is_compressed(parameter, config_.rank, config_.compress_embeddings, config_.projection);
    if (slot.factored) {
      row_scale_.reserve(parameter.rows);
      col_scale_.reserve(parameter.cols);
    }
    if (slot.compressed) {
      const Compression shape = compression(slot);
      projection_.reserve(shape.projection_elements());
      projection2_.reserve(shape.projection_elements());
      compressed_.reserve(shape.compressed_elements());
      if (momentum_dtype(config_.state_dtype, slot.parameter) == DType::kI8)
        decoded_momentum_.reserve(shape.compressed_elements());
      if (config_.transfer != TransferKind::kRestart) {
        moved_.reserve(shape.compressed_elements());
        square_.reserve(shape.rank * shape.rank);
      }
      factor_.reserve(static_cast<int64_t>(factor_scratch_bytes(config_.projection, shape.rank) / sizeof(float)));
    }
    slots_.push_back(std::move(slot));
  }
}

ProjectionId Flora::projection(const Slot& slot, const uint32_t* index) const {
  return {config_.projection,
          {.seed = config_.seed, .purpose = RandomPurpose::kProjection, .tensor = slot.parameter.hash()},
          index};
}

void Flora::declare(MemoryPlan& plan) const {
  for (const Slot& slot : slots_) {
    const Parameter& p = slot.parameter;
    if (has_momentum())
      plan.add_tensor(p.name + ".momentum", Category::kOptimizerState,
                      momentum_dtype(config_.state_dtype, slot.parameter),
                      slot.compressed ? compression(slot).compressed_elements() : p.elements());
    if (slot.factored) {
      plan.add_tensor(p.name + ".row", Category::kOptimizerState, DType::kF32, p.rows);
      plan.add_tensor(p.name + ".col", Category::kOptimizerState, DType::kF32, p.cols);
    } else {
      plan.add_tensor(p.name + ".second_moment", Category::kOptimizerState, second_moment_dtype(config_.state_dtype, p),
                      p.elements());
    }
  }
  for (const Scratch* scratch : {&row_scale_, &col_scale_, &projection_, &projection2_, &compressed_,
                                 &decoded_momentum_, &moved_, &square_, &factor_})
    scratch->declare(plan, kUpdatePhases);
  plan.add_tensor("flora.squares", Category::kWorkspace, DType::kF32, kSquares);
}

void Flora::bind(Arena& arena) {
  for (Slot& slot : slots_) {
    const Parameter& p = slot.parameter;
    if (has_momentum()) {
      const Compression shape = compression(slot);
      const int64_t rows = slot.compressed ? shape.compressed_rows() : p.rows;
      const int64_t cols = slot.compressed ? shape.compressed_cols() : p.cols;
      slot.momentum = bind_state(arena, backend_, p.name + ".momentum",
                                 momentum_dtype(config_.state_dtype, slot.parameter), p.matrix, rows, cols);
    }
    if (slot.factored) {
      slot.row = bind_state(arena, backend_, p.name + ".row", DType::kF32, false, 1, p.rows);
      slot.col = bind_state(arena, backend_, p.name + ".col", DType::kF32, false, 1, p.cols);
    } else {
      slot.second_moment = bind_state(arena, backend_, p.name + ".second_moment",
                                      second_moment_dtype(config_.state_dtype, p), p.matrix, p.rows, p.cols);
    }
  }
  for (Scratch* scratch : {&row_scale_, &col_scale_, &projection_, &projection2_, &compressed_, &decoded_momentum_,
                           &moved_, &square_, &factor_})
    scratch->bind(arena);
  squares_ = arena.tensor("flora.squares", DType::kF32, {kSquares});
}

void Flora::begin_step(uint32_t step, StepScalars& scalars) {
  const double t = step;
  scalars.beta2 = static_cast<float>(1.0 - std::pow(t, static_cast<double>(config_.decay_rate)));
  scalars.projection_index = (step - 1) / config_.kappa;
  scalars.next_projection_index = step / config_.kappa;
  transfer_due_ = scalars.projection_index != scalars.next_projection_index;
  if (config_.relative_step) {
    const double start = config_.warmup_init ? 1e-6 * t : 1e-2;
    scalars.lr = static_cast<float>(std::min(start, 1.0 / std::sqrt(t)));
  }
}

void Flora::update(const Parameter& parameter, Tensor weight, Tensor master, Tensor gradient, StepScalars* scalars) {
  Slot& slot = slots_.at(static_cast<size_t>(parameter.index));
  if (slot.compressed) {
    compressed_momentum(slot, gradient, scalars);
  } else {
    normalise(slot, gradient, scalars);
    if (has_momentum()) backend_.momentum_update(gradient, slot.momentum, config_.beta1, scalars);
  }
  const Tensor update_squares = squares_.slice(0, 1), weight_squares = squares_.slice(1, 1);
  if (config_.clip > 0) backend_.sum_squares(update_squares, gradient, false);
  if (config_.scale_parameter) backend_.sum_squares(weight_squares, master.empty() ? weight : master, false);
  backend_.apply_update(weight, master, gradient,
                        {.weight_decay = parameter.decay ? config_.weight_decay : 0.0f,
                         .clip = config_.clip,
                         .scale_parameter = config_.scale_parameter,
                         .eps2 = config_.eps2},
                        update_squares.as<float>(), weight_squares.as<float>(), parameter.elements(),
                        rounding_key(config_.seed, parameter), scalars);
}

// gradient <- U.
void Flora::normalise(Slot& slot, Tensor gradient, StepScalars* scalars) {
  if (!slot.factored) {
    backend_.full_second_moment(gradient, slot.second_moment, config_.eps1, scalars);
    return;
  }
  const Tensor row_scale = row_scale_.tensor({gradient.rows()}), col_scale = col_scale_.tensor({gradient.cols()});
  backend_.factored_second_moment(slot.row, slot.col, row_scale, col_scale, gradient, config_.eps1, scalars);
  backend_.scale_rows_cols(gradient, gradient, row_scale, col_scale, 1.0f);
}

// gradient <- D = (1 - beta1) U + beta1 up(M); M <- beta1 M + (1 - beta1) down(U), in a new projection where that is
// due. U itself, the gradient scaled on both sides, is never stored.
void Flora::compressed_momentum(Slot& slot, Tensor gradient, StepScalars* scalars) {
  const Compression shape = compression(slot);
  const float beta1 = config_.beta1;
  const Tensor row_scale = row_scale_.tensor({shape.rows}), col_scale = col_scale_.tensor({shape.cols});
  backend_.factored_second_moment(slot.row, slot.col, row_scale, col_scale, gradient, config_.eps1, scalars);

  Tensor p = projection_.tensor({shape.rank, shape.dimension()});
  const Tensor p2 = projection2_.tensor({shape.rank, shape.dimension()});
  const Tensor s = compressed_.tensor({shape.compressed_rows(), shape.compressed_cols()});
  make_projection(backend_, p, projection(slot, &scalars->next_projection_index), factor_.data(), scalars);
  project_scaled(slot, s, gradient, p, p2, row_scale, col_scale);

  Tensor momentum = slot.momentum;
  if (momentum.dtype == DType::kI8) {
    momentum = decoded_momentum_.tensor({shape.compressed_rows(), shape.compressed_cols()});
    backend_.dequantize(momentum, slot.momentum);
  }
  Tensor p_old = p;
  if (transfer_due_) {
    p_old = p2;
    make_projection(backend_, p_old, projection(slot, &scalars->projection_index), factor_.data(), scalars);
  }
  backend_.scale_rows_cols(gradient, gradient, row_scale, col_scale, 1.0f - beta1);
  project_up(backend_, gradient, momentum, p_old, shape, beta1, true);

  if (transfer_due_) change_projection(slot, momentum, p_old, p);
  backend_.ema(slot.momentum, s, beta1, scalars);
}

// out = down(U) from the raw gradient: the diagonal on the projection's side scales the projection, the other one the
// small result.
void Flora::project_scaled(const Slot& slot, Tensor out, Tensor gradient, Tensor p, Tensor scaled, Tensor row_scale,
                           Tensor col_scale) {
  const Compression shape = compression(slot);
  backend_.scale_rows_cols(scaled, p, {}, shape.wide() ? row_scale : col_scale, 1.0f);
  project_down(backend_, out, gradient, scaled, shape, false);
  backend_.scale_rows_cols(out, out, shape.wide() ? Tensor{} : row_scale, shape.wide() ? col_scale : Tensor{}, 1.0f);
}

// The stored momentum, whose numbers are in `momentum`, moves from p_old to p_new. This happens whatever the gate says,
// because the next step decodes with p_new.
void Flora::change_projection(Slot& slot, Tensor momentum, Tensor p_old, Tensor p_new) {
  const Compression shape = compression(slot);
  if (config_.transfer == TransferKind::kRestart) {
    zero_state(backend_, slot.momentum);
    return;
  }
  const Tensor moved = moved_.tensor({shape.compressed_rows(), shape.compressed_cols()});
  transfer(backend_, moved, momentum, p_old, p_new, square_.tensor({shape.rank, shape.rank}), shape);
  if (config_.transfer == TransferKind::kRescale) {
    const Tensor before = squares_.slice(2, 1), after = squares_.slice(3, 1);
    backend_.sum_squares(before, momentum, false);
    backend_.sum_squares(after, moved, false);
    backend_.restore_norm(moved, before.as<float>(), after.as<float>());
  }
  if (slot.momentum.dtype == DType::kI8) {
    backend_.quantize(slot.momentum, moved);
  } else {
    backend_.convert(slot.momentum, moved);
  }
}

std::vector<StateTensor> Flora::state() const {
  std::vector<StateTensor> tensors;
  for (const Slot& slot : slots_) {
    const auto add = [&](const char* what, const Tensor& tensor) {
      if (tensor) tensors.push_back({slot.parameter.name + "." + what, tensor});
    };
    add("momentum", slot.momentum);
    add("row", slot.row);
    add("col", slot.col);
    add("second_moment", slot.second_moment);
  }
  return tensors;
}

std::vector<std::string> Flora::compressed_parameters() const {
  std::vector<std::string> names;
  for (const Slot& slot : slots_)
    if (slot.compressed) names.push_back(slot.parameter.name);
  return names;
}
