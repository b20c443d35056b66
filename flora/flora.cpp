// flora.cpp: the Flora update; see flora.h. The order within a step is the design's: S from the raw gradient, D in its
// place from the old momentum, then the transfer and the new momentum; with `residual` the transfer comes first, and D
// needs all of S.
#include "flora/flora.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace {

OptimizerConfig checked(OptimizerConfig config) {
  if (config.kappa == 0) throw std::invalid_argument("kappa must be at least 1");
  if (config.kind == OptimizerKind::kAdafactor) config.rank = 0;
  if (config.residual && !has_orthonormal_rows(config.projection))
    throw std::invalid_argument("residual needs orthonormal projections");
  return config;
}

bool keeps_momentum(const OptimizerConfig& config, const Parameter& parameter) {
  const bool large_table = parameter.long_lived && is_elongated(parameter);
  return config.beta1 > 0 && (config.embedding_momentum || !large_table);
}

// Whether the momentum of a parameter is kept in a projection.
bool compresses_momentum(const OptimizerConfig& config, const Parameter& parameter) {
  return config.factored && parameter.matrix && keeps_momentum(config, parameter) &&
         is_compressed(parameter, config.rank, config.compress_embeddings, config.projection);
}

}  // namespace

double transfer_growth(const OptimizerConfig& config, const std::vector<Parameter>& parameters) {
  const bool orthonormal = has_orthonormal_rows(config.projection);
  const bool inflates = config.transfer == (orthonormal ? TransferKind::kUnbiased : TransferKind::kReencode);
  if (config.kind != OptimizerKind::kFlora || !inflates) return 0;
  int64_t largest = 0;
  for (const Parameter& parameter : parameters)
    if (compresses_momentum(config, parameter))
      largest = std::max(largest, Compression(parameter, config.rank).dimension());
  if (largest == 0) return 0;
  const double others = static_cast<double>(largest) + (config.projection == ProjectionKind::kGaussian ? 1 : -1);
  const double rank = static_cast<double>(config.rank);
  return std::pow(static_cast<double>(config.beta1), config.kappa) *
         std::sqrt(orthonormal ? static_cast<double>(largest) / rank : 1 + others / rank);
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
      scaled_projection_("flora.scaled_projection", gradient_dtype, kUpdatePhases),
      compressed_("flora.compressed_update", DType::kF32, kUpdatePhases),
      decoded_momentum_("flora.decoded_momentum", gradient_dtype, kUpdatePhases),
      moved_("flora.moved_momentum", DType::kF32, kUpdatePhases),
      square_("flora.transfer", DType::kF32, kUpdatePhases),
      copied_momentum_("flora.copied_momentum", config.state_dtype, kUpdatePhases),
      decodes_momentum_(config.state_dtype == DType::kI8 ||
                        (config.state_dtype == DType::kBF16 && gradient_dtype == DType::kF32)) {
  for (const Parameter& parameter : parameters) {
    Entry entry;
    entry.parameter = parameter;
    entry.factored = config_.factored && parameter.matrix;
    entry.compressed = compresses_momentum(config_, parameter);
    const Compression shape = compression(entry);
    const bool in_parts = shape.wide() && gradient_block_rows(parameter, config_.blocks) > 0;
    entry.transformed = entry.compressed && !in_parts && is_transformed(backend, config_.projection, shape);
    if (gradient_block_rows(parameter, config_.blocks) > 0 && !entry.factored)
      throw std::invalid_argument("a gradient in blocks needs a factored second moment");
    add_states(entry);
    reserve_scratch(entry);
    entries_.push_back(entry);
  }
}

void Flora::add_states(Entry& entry) {
  const Parameter& p = entry.parameter;
  const Compression shape = compression(entry);
  const Tensor compressed =
      Tensor::of(nullptr, config_.state_dtype, {shape.compressed_rows(), shape.compressed_cols()});
  if (entry.compressed) {
    entry.momentum = states_.add(p, "momentum", compressed);
  } else if (keeps_momentum(config_, p)) {
    entry.momentum = add_momentum(p);
  }
  if (entry.factored) {
    entry.row = states_.add(p, "row", Tensor::of(nullptr, DType::kF32, {p.rows}));
    entry.col = states_.add(p, "col", Tensor::of(nullptr, DType::kF32, {p.cols}));
  } else {
    entry.second_moment = add_second_moment(p);
  }
}

void Flora::reserve_scratch(const Entry& entry) {
  const Parameter& p = entry.parameter;
  if (entry.factored) {
    row_scale_.reserve(p.rows);
    col_scale_.reserve(p.cols);
  }
  if (!entry.compressed) {
    if (entry.momentum >= 0 && config_.clip > 0)
      copied_momentum_.reserve(gradient_block_rows(p, config_.blocks) * p.cols);
    return;
  }
  const Compression shape = compression(entry);
  if (!entry.transformed || config_.transfer != TransferKind::kRestart) {
    projection_.reserve(shape.projection_elements());
    scaled_projection_.reserve(shape.projection_elements());
  }
  compressed_.reserve(shape.compressed_elements());
  if (decodes_momentum_ || config_.residual) decoded_momentum_.reserve(shape.compressed_elements());
  if (config_.transfer != TransferKind::kRestart) {
    moved_.reserve(shape.compressed_elements());
    square_.reserve(shape.rank * shape.rank);
  }
}

void Flora::declare(MemoryPlan& plan) {
  Optimizer::declare(plan);
  for (Scratch* scratch : {&row_scale_, &col_scale_, &projection_, &scaled_projection_, &compressed_,
                           &decoded_momentum_, &moved_, &square_, &copied_momentum_})
    scratch->declare(plan);
  plan.add(&squares_, "flora.squares", Category::kWorkspace, DType::kF32, {4});
}

void Flora::begin_step(uint32_t step, StepScalars& scalars) {
  const double t = step;
  scalars.beta2 = static_cast<float>(1.0 - std::pow(t, static_cast<double>(config_.decay_rate)));
  if (config_.half_life > 0) scalars.beta2 = std::min(scalars.beta2, half_life_decay(config_));
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
  if (!parameter.matrix) {
    const VectorGradient vector{&parameter, weight, master, gradient.whole()};
    update_vectors({&vector, 1}, gradient.squares(), scalars);
    return;
  }
  states_.hold(parameter.layer, Access::kUpdate);
  const Entry& entry = entries_.at(static_cast<size_t>(parameter.index));
  const bool projected = second_moment(entry, gradient, scalars);
  if (entry.compressed) begin_momentum(entry, projected, scalars);

  // What needs all of the gradient before any of the update can be made costs a pass of its own where it is in blocks.
  const bool residual = keeps_residual(entry);
  if (residual) gradient.pass([&](const RowRange& rows, const Tensor& g) { compress(entry, g, rows, scalars); });
  ScaledSum difference;  // made beside the first rows of D
  if (residual) difference = momentum_less_s(entry);
  bool made = !residual;
  const auto beside_update = [&] { return std::exchange(made, true) ? nullptr : &difference; };
  // So does the norm of the whole update, which is known before any of it is applied.
  float* const squares = squares_.as<float>();
  const bool twice = config_.clip > 0 && !gradient.whole();
  if (twice) {
    gradient.pass([&](const RowRange& rows, const Tensor& g) {
      if (!residual) compress(entry, g, rows, scalars);
      to_update(entry, g, rows, true, {squares, rows.begin > 0}, beside_update(), scalars);
    });
  }
  // The new compressed momentum needs all of S, and the old projection no more; a whole weight is changed beside it.
  const bool transfers = entry.compressed && transfer_due_ && !residual;
  const bool beside = entry.compressed && gradient.whole() && !transfers && weight.dtype != DType::kI8;
  const MomentumAverage average = entry.compressed ? average_of(entry) : MomentumAverage{};
  gradient.pass([&](const RowRange& rows, const Tensor& g) {
    if (!twice && !residual) compress(entry, g, rows, scalars);
    to_update(entry, g, rows, false, config_.clip > 0 && !twice ? SquaresTarget{squares} : SquaresTarget{},
              beside_update(), scalars);
    apply(entry, weight, master, g, rows, beside ? &average : nullptr, scalars);
  });
  if (transfers) transfer_momentum(entry, scalars);
  if (entry.compressed && !beside) backend_.ema(average, scalars);
}

void Flora::update_vectors(std::span<const VectorGradient> vectors, SquaresTarget squares, StepScalars* scalars) {
  if (vectors.empty()) return;
  states_.hold(vectors.front().parameter->layer, Access::kUpdate);
  std::vector<ParameterUpdate> updates;
  for (const VectorGradient& vector : vectors) {
    const Entry& entry = entries_.at(static_cast<size_t>(vector.parameter->index));
    updates.push_back(update_of(vector));
    updates.back().momentum = states_.get(entry.momentum);
    updates.back().second_moment = states_.get(entry.second_moment);
  }
  backend_.unfactored_update(updates,
                             {.eps1 = config_.eps1,
                              .beta1 = config_.beta1,
                              .clip = config_.clip,
                              .scale_parameter = config_.scale_parameter,
                              .eps2 = config_.eps2},
                             scalars, squares);
}

// The statistics move on. What scales the gradient is left in row_scale_ and col_scale_, or in its place where the
// second moment is not factored. True when the projections have been made, too.
bool Flora::second_moment(const Entry& entry, const Gradient& gradient, StepScalars* scalars) {
  const Tensor& whole = gradient.whole();
  if (!entry.factored) {
    const SquaresTarget target = gradient.squares();
    if (target.out) backend_.sum_squares(Tensor::of(target.out, DType::kF32, {1}), whole, target.accumulate);
    backend_.full_second_moment(whole, states_.get(entry.second_moment), config_.eps1, scalars);
    return false;
  }
  const Tensor row = states_.get(entry.row), col = states_.get(entry.col);
  const Tensor row_scale = row_scale_.tensor({entry.parameter.rows}),
               col_scale = col_scale_.tensor({entry.parameter.cols});
  if (whole) {
    const bool projects = entry.compressed && !entry.transformed && !transfer_due_;
    ScaledProjection projection;
    if (projects) {
      projection = {.plain = projection_of(entry, projection_),
                    .scaled = projection_of(entry, scaled_projection_),
                    .of_rows = compression(entry).wide(),
                    .kind = config_.projection,
                    .key = projection_key(entry),
                    .index = &scalars->projection_index};
    }
    backend_.factored_second_moment(row, col, row_scale, col_scale, whole, config_.eps1, scalars, gradient.squares(),
                                    projects ? &projection : nullptr);
    return projects;
  }
  gradient.pass([&](const RowRange& rows, const Tensor& g) {
    backend_.factored_squares(rows.of(row_scale), col_scale, g, config_.eps1, rows.begin > 0);
  });
  backend_.factored_scales(row, col, row_scale, col_scale, scalars);
  return false;
}

// Rows of the gradient <- those of D, the update before clipping, whose squares are left where they are wanted. An
// uncompressed momentum moves on unless keep_momentum; a compressed one does later.
void Flora::to_update(const Entry& entry, Tensor gradient, const RowRange& rows, bool keep_momentum,
                      SquaresTarget squares, const ScaledSum* beside, StepScalars* scalars) {
  const float beta1 = config_.beta1;
  const Parameter& p = entry.parameter;
  const Tensor row_scale = entry.factored ? rows.of(row_scale_.tensor({p.rows})) : Tensor{},
               col_scale = entry.factored ? col_scale_.tensor({p.cols}) : Tensor{};
  if (entry.compressed) {
    const bool residual = keeps_residual(entry);
    const ScaledSum scaled = {gradient, gradient, row_scale, col_scale, residual ? 1.0f : 1.0f - beta1};
    const Tensor momentum = residual ? compressed_of(entry, decoded_momentum_) : momentum_numbers(entry);
    const Compression shape = compression(entry);
    if (entry.transformed) {
      if (beside) backend_.scale_rows_cols(*beside);
      backend_.cosine_up(scaled, shape.wide() ? momentum : rows.of(momentum),
                         cosine_projection(entry, decoder(scalars)), beta1, squares);
      return;
    }
    backend_.scale_rows_cols(scaled, beside);
    project_rows_up(backend_, gradient, momentum, projection_of(entry, projection_), shape, rows.begin, beta1, true);
    if (squares.out) backend_.sum_squares(Tensor::of(squares.out, DType::kF32, {1}), gradient, squares.accumulate);
    return;
  }
  const bool has_momentum = entry.momentum >= 0;
  if (!entry.factored && !has_momentum && !squares.out) return;
  const Tensor momentum = rows.of(states_.get(entry.momentum));
  backend_.scaled_momentum_update(gradient, keep_momentum && has_momentum ? copied_momentum(momentum) : momentum,
                                  row_scale, col_scale, beta1, scalars, squares);
}

// W <- W - ... D, whose squares are known; `update` holds these rows only.
void Flora::apply(const Entry& entry, Tensor weight, Tensor master, Tensor update, const RowRange& rows,
                  const MomentumAverage* average, StepScalars* scalars) {
  const Parameter& p = entry.parameter;
  const Tensor weight_squares = squares_.slice(1, 1);
  if (config_.scale_parameter && rows.begin == 0)
    pieces_.sum_squares(p, weight_squares, master.empty() ? weight : master);
  pieces_.update(p, rows.of(weight), rows.of(master), rounding(p, rows.begin * p.cols), scalars,
                 [&](const Tensor& w, const Tensor& copy, const RowRange& piece, const RandomKey& key) {
                   backend_.apply_update(w, copy, piece.of(update),
                                         {.weight_decay = decay_of(p),
                                          .lr_scale = lr_scale_of(p),
                                          .clip = config_.clip,
                                          .scale_parameter = config_.scale_parameter,
                                          .eps2 = config_.eps2},
                                         squares_.as<float>(), weight_squares.as<float>(), p.elements(), key, scalars,
                                         average);
                 });
}

// ---- compressed momentum
//
// U, the gradient scaled on both sides, is never stored: for S = down(U) the diagonal on the projection's side scales
// the projection (or what is transformed), the other one the small result.

// Makes the projections, unless they are there or transforms do without: the one that decodes in this step, and the one
// that S is made with, scaled. They are the same unless a transfer is due after D.
void Flora::begin_momentum(const Entry& entry, bool projected, StepScalars* scalars) {
  if (transfer_due_ && config_.residual) transfer_momentum(entry, scalars);
  decode_momentum(entry);
  if (projected || entry.transformed) return;
  const Compression shape = compression(entry);
  const Tensor p = projection_of(entry, projection_), scaled = projection_of(entry, scaled_projection_);
  generate(entry, p, decoder(scalars));
  Tensor encoder = p;
  if (transfer_due_ && !config_.residual) {
    generate(entry, scaled, &scalars->next_projection_index);
    encoder = scaled;
  }
  const Tensor scale = shape.wide() ? row_scale_.tensor({shape.rows}) : col_scale_.tensor({shape.cols});
  backend_.scale_rows_cols({scaled, encoder, {}, scale});
}

// The number of the projection that D is decoded with: with `residual` a transfer comes before.
const uint32_t* Flora::decoder(const StepScalars* scalars) const {
  return config_.residual ? &scalars->next_projection_index : &scalars->projection_index;
}

// S gets its part from these rows of the gradient.
void Flora::compress(const Entry& entry, Tensor gradient, const RowRange& rows, StepScalars* scalars) {
  if (!entry.compressed) return;
  const Compression shape = compression(entry);
  const Tensor s = compressed_of(entry, compressed_);
  if (entry.transformed) {
    backend_.cosine_down(shape.wide() ? s : rows.of(s), gradient,
                         shape.wide() ? row_scale_.tensor({shape.rows}) : col_scale_.tensor({shape.cols}),
                         cosine_projection(entry, &scalars->next_projection_index));
    return;
  }
  project_rows_down(backend_, s, gradient, projection_of(entry, scaled_projection_), shape, rows.begin);
}

// With `residual`: what D decodes is M - S, which beta1 makes the new momentum less S.
ScaledSum Flora::momentum_less_s(const Entry& entry) const {
  const MomentumAverage average = average_of(entry);
  return {.out = compressed_of(entry, decoded_momentum_),
          .in = average.in,
          .row_scale = average.row_scale,
          .col_scale = average.col_scale,
          .factor = -1.0f,
          .added = momentum_numbers(entry)};
}

// M <- beta1 M + (1 - beta1) S, where S gets the scale of the other side.
MomentumAverage Flora::average_of(const Entry& entry) const {
  const Compression shape = compression(entry);
  return {.momentum = states_.get(entry.momentum),
          .in = compressed_of(entry, compressed_),
          .row_scale = shape.wide() ? Tensor{} : row_scale_.tensor({shape.rows}),
          .col_scale = shape.wide() ? col_scale_.tensor({shape.cols}) : Tensor{},
          .beta1 = config_.beta1};
}

// The stored momentum goes to the next projection. This happens whatever the gate says, because the next step decodes
// with that one.
void Flora::transfer_momentum(const Entry& entry, StepScalars* scalars) {
  const Compression shape = compression(entry);
  const Tensor stored = states_.get(entry.momentum);
  if (config_.transfer == TransferKind::kRestart) {
    zero_state(backend_, stored);
    return;
  }
  const bool before_d = config_.residual, is_made = !before_d && !entry.transformed;  // as D needed it
  if (before_d) decode_momentum(entry);
  const Tensor momentum = momentum_numbers(entry);
  const Tensor p_old = projection_of(entry, projection_), p_new = projection_of(entry, scaled_projection_);
  if (!is_made) generate(entry, p_old, &scalars->projection_index);
  generate(entry, p_new, &scalars->next_projection_index);
  const Tensor moved = compressed_of(entry, moved_);
  transfer(backend_, moved, momentum, p_old, p_new, square_.tensor({shape.rank, shape.rank}), shape,
           config_.transfer == TransferKind::kUnbiased ? unbiased_factor(config_.projection, shape) : 1.0f);
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

// p <- the parameter's projection number *index.
void Flora::generate(const Entry& entry, Tensor p, const uint32_t* index) {
  backend_.generate_projection(p, config_.projection, projection_key(entry), index);
}

CosineProjection Flora::cosine_projection(const Entry& entry, const uint32_t* index) const {
  const Compression shape = compression(entry);
  return {.rank = shape.rank, .of_rows = shape.wide(), .key = projection_key(entry), .index = index};
}

RandomKey Flora::projection_key(const Entry& entry) const {
  return {.seed = config_.seed, .purpose = RandomPurpose::kProjection, .tensor = entry.parameter.hash()};
}

Tensor Flora::projection_of(const Entry& entry, const Scratch& scratch) const {
  const Compression shape = compression(entry);
  return scratch.tensor({shape.rank, shape.dimension()});
}

Tensor Flora::compressed_of(const Entry& entry, const Scratch& scratch) const {
  const Compression shape = compression(entry);
  return scratch.tensor({shape.compressed_rows(), shape.compressed_cols()});
}

void Flora::decode_momentum(const Entry& entry) {
  if (!decodes_momentum_) return;
  const Tensor momentum = states_.get(entry.momentum), numbers = compressed_of(entry, decoded_momentum_);
  momentum.dtype == DType::kI8 ? backend_.dequantize(numbers, momentum) : backend_.convert(numbers, momentum);
}

// A compressed momentum as products take it: as it is stored, or what decode_momentum() has made of it.
Tensor Flora::momentum_numbers(const Entry& entry) const {
  return decodes_momentum_ ? compressed_of(entry, decoded_momentum_) : states_.get(entry.momentum);
}

Tensor Flora::copied_momentum(Tensor rows) {
  const Tensor copy = copied_momentum_.tensor({rows.rows(), rows.cols()});
  backend_.copy(copy.data, rows.data, rows.bytes());
  if (rows.scales)
    backend_.copy(copy.scales, rows.scales, static_cast<size_t>(quant_blocks(rows.elements())) * sizeof(float));
  return copy;
}

std::vector<std::string> Flora::compressed_parameters() const {
  std::vector<std::string> names;
  for (const Entry& entry : entries_)
    if (entry.compressed) names.push_back(entry.parameter.name);
  return names;
}
