// flora.cpp: the Flora update; see flora.h. The order within a step is the design's: S from the raw gradient, D in its
// place from the old momentum, the transfer, the new momentum.
#include "flora/flora.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "flora/optimizer_state.h"

namespace {

OptimizerConfig checked(OptimizerConfig config) {
  if (config.kappa == 0) throw std::invalid_argument("kappa must be at least 1");
  if (config.kind == OptimizerKind::kAdafactor) config.rank = 0;
  return config;
}

// Whether the momentum of a parameter is kept in a projection.
bool compresses_momentum(const OptimizerConfig& config, const Parameter& parameter) {
  return config.factored && parameter.matrix && config.beta1 > 0 &&
         is_compressed(parameter, config.rank, config.compress_embeddings, config.projection);
}

}  // namespace

double transfer_growth(const OptimizerConfig& config, const std::vector<Parameter>& parameters) {
  const bool inflates = config.transfer == TransferKind::kReencode && config.projection != ProjectionKind::kOrthonormal;
  if (config.kind != OptimizerKind::kFlora || !inflates) return 0;
  int64_t largest = 0;
  for (const Parameter& parameter : parameters)
    if (compresses_momentum(config, parameter))
      largest = std::max(largest, Compression(parameter, config.rank).dimension());
  if (largest == 0) return 0;
  const double others = static_cast<double>(largest) + (config.projection == ProjectionKind::kGaussian ? 1 : -1);
  return std::pow(static_cast<double>(config.beta1), config.kappa) *
         std::sqrt(1 + others / static_cast<double>(config.rank));
}

TransferKind bounded_transfer(OptimizerConfig config, const std::vector<Parameter>& parameters) {
  config.transfer = TransferKind::kReencode;
  return transfer_growth(config, parameters) < 1 ? TransferKind::kReencode : TransferKind::kRescale;
}

Flora::Flora(const OptimizerConfig& config, const std::vector<Parameter>& parameters, DType gradient_dtype,
             Backend& backend)
    : Optimizer(checked(config), parameters, backend),
      row_scale_("flora.row_scale", DType::kF32, kUpdatePhases),
      col_scale_("flora.col_scale", DType::kF32, kUpdatePhases),
      projection_("flora.projection", gradient_dtype, kUpdatePhases),
      projection2_("flora.scaled_projection", gradient_dtype, kUpdatePhases),
      compressed_("flora.compressed_update", DType::kF32, kUpdatePhases),
      decoded_momentum_("flora.decoded_momentum", gradient_dtype, kUpdatePhases),
      moved_("flora.moved_momentum", DType::kF32, kUpdatePhases),
      square_("flora.transfer", DType::kF32, kUpdatePhases),
      factor_("flora.cholesky", DType::kF32, kUpdatePhases),
      copied_momentum_("flora.copied_momentum", config.state_dtype, kUpdatePhases) {
  for (const Parameter& parameter : parameters) {
    Slot slot;
    slot.parameter = parameter;
    slot.factored = config_.factored && parameter.matrix;
    slot.compressed = compresses_momentum(config_, parameter);
    if (in_blocks(parameter) && !slot.factored)
      throw std::invalid_argument("a gradient in blocks needs a factored second moment");
    add_states(slot);
    reserve_scratch(slot);
    slots_.push_back(slot);
  }
}

void Flora::add_states(Slot& slot) {
  const Parameter& p = slot.parameter;
  const Compression shape = compression(slot);
  if (has_momentum())
    slot.momentum = states_.add(p, "momentum", momentum_dtype(config_.state_dtype, p), p.matrix,
                                slot.compressed ? shape.compressed_rows() : p.rows,
                                slot.compressed ? shape.compressed_cols() : p.cols);
  if (slot.factored) {
    slot.row = states_.add(p, "row", DType::kF32, false, 1, p.rows);
    slot.col = states_.add(p, "col", DType::kF32, false, 1, p.cols);
  } else {
    slot.second_moment =
        states_.add(p, "second_moment", second_moment_dtype(config_.state_dtype, p), p.matrix, p.rows, p.cols);
  }
}

void Flora::reserve_scratch(const Slot& slot) {
  const Parameter& p = slot.parameter;
  if (slot.factored) {
    row_scale_.reserve(p.rows);
    col_scale_.reserve(p.cols);
  }
  if (!slot.compressed) {
    if (has_momentum() && config_.clip > 0 && in_blocks(p))
      copied_momentum_.reserve(gradient_block_rows(p, config_.blocks) * p.cols);
    return;
  }
  const Compression shape = compression(slot);
  projection_.reserve(shape.projection_elements());
  projection2_.reserve(shape.projection_elements());
  compressed_.reserve(shape.compressed_elements());
  if (config_.state_dtype == DType::kI8) decoded_momentum_.reserve(shape.compressed_elements());
  if (config_.transfer != TransferKind::kRestart) {
    moved_.reserve(shape.compressed_elements());
    square_.reserve(shape.rank * shape.rank);
  }
  factor_.reserve(static_cast<int64_t>(factor_scratch_bytes(config_.projection, shape.rank) / sizeof(float)));
}

void Flora::declare(MemoryPlan& plan) {
  Optimizer::declare(plan);
  for (Scratch* scratch : {&row_scale_, &col_scale_, &projection_, &projection2_, &compressed_, &decoded_momentum_,
                           &moved_, &square_, &factor_, &copied_momentum_})
    scratch->declare(plan);
  plan.add(&squares_, "flora.squares", Category::kWorkspace, DType::kF32, {4});
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

void Flora::update(const Parameter& parameter, Tensor weight, Tensor master, const Gradient& gradient,
                   StepScalars* scalars) {
  states_.hold(parameter.layer, Access::kUpdate);
  const Slot& slot = slots_.at(static_cast<size_t>(parameter.index));
  if (gradient.whole()) {
    update_whole(slot, weight, master, gradient.whole(), scalars);
  } else {
    update_in_blocks(slot, weight, master, gradient, scalars);
  }
}

void Flora::update_whole(const Slot& slot, Tensor weight, Tensor master, Tensor gradient, StepScalars* scalars) {
  if (slot.compressed) {
    compressed_momentum(slot, gradient, scalars);
  } else {
    normalise(slot, gradient, scalars);
    if (has_momentum()) backend_.momentum_update(gradient, states_.get(slot.momentum), config_.beta1, scalars);
  }
  if (config_.clip > 0) backend_.sum_squares(squares_.slice(0, 1), gradient, false);
  apply(slot, weight, master, gradient, {}, scalars);
}

// Three passes over the gradient: its squares; with the scales, the squares of the update (not without clipping); the
// update itself.
void Flora::update_in_blocks(const Slot& slot, Tensor weight, Tensor master, const Gradient& gradient,
                             StepScalars* scalars) {
  const Parameter& p = slot.parameter;
  const Tensor row_scale = row_scale_.tensor({p.rows}), col_scale = col_scale_.tensor({p.cols});
  gradient.pass([&](const RowRange& range, const Tensor& rows) {
    backend_.factored_squares(range.of(row_scale), col_scale, rows, config_.eps1, range.begin > 0);
  });
  backend_.factored_scales(states_.get(slot.row), states_.get(slot.col), row_scale, col_scale, scalars);
  if (slot.compressed) prepare_compressed(slot, scalars);

  const bool measure = config_.clip > 0;
  const auto compress = [&](int64_t begin, Tensor rows) {
    if (!slot.compressed) return;
    const Compression shape = compression(slot);
    project_rows_down(backend_, compressed_of(slot, compressed_), rows, projection_of(slot, projection_), shape, begin);
  };
  if (measure) {
    gradient.pass([&](const RowRange& range, const Tensor& rows) {
      compress(range.begin, rows);
      to_update(slot, rows, range.begin, true, scalars);
      backend_.sum_squares(squares_.slice(0, 1), rows, range.begin > 0);
    });
  }
  gradient.pass([&](const RowRange& range, const Tensor& rows) {
    if (!measure) compress(range.begin, rows);
    to_update(slot, rows, range.begin, false, scalars);
    apply(slot, weight, master, rows, range, scalars);
  });
  if (slot.compressed) finish_compressed(slot, scalars);
}

// W <- W - ... D, whose squares are known; `update` holds these rows only.
void Flora::apply(const Slot& slot, Tensor weight, Tensor master, Tensor update, const RowRange& rows,
                  StepScalars* scalars) {
  const Parameter& p = slot.parameter;
  const Tensor weight_squares = squares_.slice(1, 1);
  if (config_.scale_parameter && rows.begin == 0)
    pieces_.sum_squares(p, weight_squares, master.empty() ? weight : master);
  pieces_.update(p, rows.of(weight), rows.of(master), rounding(p, rows.begin), scalars,
                 [&](const Tensor& w, const Tensor& copy, const RowRange& piece, const RandomKey& key) {
                   backend_.apply_update(w, copy, piece.of(update),
                                         {.weight_decay = decay_of(p),
                                          .clip = config_.clip,
                                          .scale_parameter = config_.scale_parameter,
                                          .eps2 = config_.eps2},
                                         squares_.as<float>(), weight_squares.as<float>(), p.elements(), key, scalars);
                 });
}

// gradient <- U.
void Flora::normalise(const Slot& slot, Tensor gradient, StepScalars* scalars) {
  if (!slot.factored) {
    backend_.full_second_moment(gradient, states_.get(slot.second_moment), config_.eps1, scalars);
    return;
  }
  const Tensor row_scale = row_scale_.tensor({gradient.rows()}), col_scale = col_scale_.tensor({gradient.cols()});
  backend_.factored_second_moment(states_.get(slot.row), states_.get(slot.col), row_scale, col_scale, gradient,
                                  config_.eps1, scalars);
  backend_.scale_rows_cols(gradient, gradient, row_scale, col_scale, 1.0f);
}

// p <- the parameter's projection number *index.
void Flora::project_with(const Slot& slot, Tensor p, const uint32_t* index, StepScalars* scalars) {
  const RandomKey key{.seed = config_.seed, .purpose = RandomPurpose::kProjection, .tensor = slot.parameter.hash()};
  make_projection(backend_, p, {config_.projection, key, index}, factor_.data(), scalars);
}

Tensor Flora::projection_of(const Slot& slot, const Scratch& scratch) const {
  const Compression shape = compression(slot);
  return scratch.tensor({shape.rank, shape.dimension()});
}

Tensor Flora::compressed_of(const Slot& slot, const Scratch& scratch) const {
  const Compression shape = compression(slot);
  return scratch.tensor({shape.compressed_rows(), shape.compressed_cols()});
}

// A compressed momentum as numbers: as it is stored, or what decode_momentum() has made of its codes.
Tensor Flora::momentum_numbers(const Slot& slot) const {
  const Tensor momentum = states_.get(slot.momentum);
  return momentum.dtype == DType::kI8 ? compressed_of(slot, decoded_momentum_) : momentum;
}

void Flora::decode_momentum(const Slot& slot) {
  const Tensor momentum = states_.get(slot.momentum);
  if (momentum.dtype == DType::kI8) backend_.dequantize(momentum_numbers(slot), momentum);
}

// gradient <- D = (1 - beta1) U + beta1 up(M); M <- beta1 M + (1 - beta1) down(U), in a new projection where that is
// due. U itself, the gradient scaled on both sides, is never stored: for down(U) the diagonal on the projection's side
// scales the projection, the other one the small result.
void Flora::compressed_momentum(const Slot& slot, Tensor gradient, StepScalars* scalars) {
  const Compression shape = compression(slot);
  const float beta1 = config_.beta1;
  const Tensor row_scale = row_scale_.tensor({shape.rows}), col_scale = col_scale_.tensor({shape.cols});
  backend_.factored_second_moment(states_.get(slot.row), states_.get(slot.col), row_scale, col_scale, gradient,
                                  config_.eps1, scalars);

  const Tensor p = projection_of(slot, projection_), p2 = projection_of(slot, projection2_);
  const Tensor s = compressed_of(slot, compressed_);
  project_with(slot, p, &scalars->next_projection_index, scalars);
  backend_.scale_rows_cols(p2, p, {}, shape.wide() ? row_scale : col_scale, 1.0f);
  project_down(backend_, s, gradient, p2, shape, false);
  backend_.scale_rows_cols(s, s, shape.wide() ? Tensor{} : row_scale, shape.wide() ? col_scale : Tensor{}, 1.0f);

  decode_momentum(slot);
  const Tensor momentum = momentum_numbers(slot);
  if (transfer_due_) project_with(slot, p2, &scalars->projection_index, scalars);
  const Tensor p_old = transfer_due_ ? p2 : p;
  backend_.scale_rows_cols(gradient, gradient, row_scale, col_scale, 1.0f - beta1);
  project_up(backend_, gradient, momentum, p_old, shape, beta1, true);

  if (transfer_due_) change_projection(slot, momentum, p_old, p);
  backend_.ema(states_.get(slot.momentum), s, beta1, scalars);
}

// Before the passes that need projections: projection_ is the new one, scaled; projection2_ the one of the momentum.
void Flora::prepare_compressed(const Slot& slot, StepScalars* scalars) {
  const Compression shape = compression(slot);
  const Tensor p = projection_of(slot, projection_);
  project_with(slot, p, &scalars->next_projection_index, scalars);
  backend_.scale_rows_cols(p, p, {}, shape.wide() ? row_scale_.tensor({shape.rows}) : col_scale_.tensor({shape.cols}),
                           1.0f);
  project_with(slot, projection_of(slot, projection2_), &scalars->projection_index, scalars);
  decode_momentum(slot);
}

// Rows [begin, ...) of a gradient in blocks become those of D. With keep_momentum an uncompressed momentum stays as it
// is; a compressed one does anyhow.
void Flora::to_update(const Slot& slot, Tensor gradient, int64_t begin, bool keep_momentum, StepScalars* scalars) {
  const Parameter& p = slot.parameter;
  const Tensor row_scale = row_scale_.tensor({p.rows}).slice(begin, gradient.rows());
  const Tensor momentum = states_.get(slot.momentum);
  const float beta1 = config_.beta1;
  backend_.scale_rows_cols(gradient, gradient, row_scale, col_scale_.tensor({p.cols}),
                           slot.compressed ? 1.0f - beta1 : 1.0f);
  if (slot.compressed) {
    project_rows_up(backend_, gradient, momentum_numbers(slot), projection_of(slot, projection2_), compression(slot),
                    begin, beta1, true);
  } else if (has_momentum()) {
    const Tensor rows = momentum.slice(begin, gradient.rows());
    backend_.momentum_update(gradient, keep_momentum ? copied_momentum(rows) : rows, beta1, scalars);
  }
}

Tensor Flora::copied_momentum(Tensor rows) {
  const Tensor copy = copied_momentum_.tensor({rows.rows(), rows.cols()});
  backend_.copy(copy.data, rows.data, rows.bytes());
  if (rows.scales)
    backend_.copy(copy.scales, rows.scales, static_cast<size_t>(quant_blocks(rows.elements())) * sizeof(float));
  return copy;
}

void Flora::finish_compressed(const Slot& slot, StepScalars* scalars) {
  const Compression shape = compression(slot);
  const Tensor s = compressed_of(slot, compressed_);
  backend_.scale_rows_cols(s, s, shape.wide() ? Tensor{} : row_scale_.tensor({shape.rows}),
                           shape.wide() ? col_scale_.tensor({shape.cols}) : Tensor{}, 1.0f);
  const Tensor momentum = states_.get(slot.momentum);
  if (transfer_due_) {
    const Tensor p_new = projection_of(slot, projection_);
    project_with(slot, p_new, &scalars->next_projection_index, scalars);
    change_projection(slot, momentum_numbers(slot), projection_of(slot, projection2_), p_new);
  }
  backend_.ema(momentum, s, config_.beta1, scalars);
}

// The stored momentum, whose numbers are in `momentum`, moves from p_old to p_new. This happens whatever the gate says,
// because the next step decodes with p_new.
void Flora::change_projection(const Slot& slot, Tensor momentum, Tensor p_old, Tensor p_new) {
  const Compression shape = compression(slot);
  const Tensor stored = states_.get(slot.momentum);
  if (config_.transfer == TransferKind::kRestart) {
    zero_state(backend_, stored);
    return;
  }
  const Tensor moved = compressed_of(slot, moved_);
  transfer(backend_, moved, momentum, p_old, p_new, square_.tensor({shape.rank, shape.rank}), shape);
  if (config_.transfer == TransferKind::kRescale) {
    const Tensor before = squares_.slice(2, 1), after = squares_.slice(3, 1);
    backend_.sum_squares(before, momentum, false);
    backend_.sum_squares(after, moved, false);
    backend_.restore_norm(moved, before.as<float>(), after.as<float>());
  }
  if (stored.dtype == DType::kI8) {
    backend_.quantize(stored, moved);
  } else {
    backend_.convert(stored, moved);
  }
}

std::vector<std::string> Flora::compressed_parameters() const {
  std::vector<std::string> names;
  for (const Slot& slot : slots_)
    if (slot.compressed) names.push_back(slot.parameter.name);
  return names;
}
