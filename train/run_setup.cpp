// run_setup.cpp: see run_setup.h.
#include "train/run_setup.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "data/token_loader.h"
#include "data/unicode_classes.h"
#include "flora/flora.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/machine.h"
#include "train/trainer_state.h"

namespace fs = std::filesystem;

namespace {

constexpr int64_t kCpuMicroBatch = 4, kGpuMicroBatch = 16;
constexpr int64_t kMostActivations = int64_t{1} << 50;  // elements of the residual stream, all layers

int64_t percent(int64_t steps, int64_t share) { return std::max<int64_t>(1, steps * share / 100); }

// A micro-batch that divides a rank's part of the step, where the planner is going to choose another one.
int64_t starting_micro_batch(const Options& o, int64_t largest) {
  const int64_t sequences = o.tokens_per_step / (o.engine.shapes.sequence * o.ranks);
  if (sequences == 0) return largest;
  while (sequences % largest != 0) --largest;
  return largest;
}

void choose_micro_batch(Options& o, bool cpu, Undecided undecided) {
  ActivationShapes& shapes = o.engine.shapes;
  const bool divide = undecided == Undecided::kPlannersSettings && !o.is_open("tokens-per-step");
  const bool given = o.was_given("micro-batch");
  o.choose("micro-batch", shapes.batch, cpu ? kCpuMicroBatch : kGpuMicroBatch);
  if (divide && !given) shapes.batch = starting_micro_batch(o, shapes.batch);
  const int64_t micro_tokens = shapes.batch * shapes.sequence, all_ranks = o.ranks * micro_tokens;
  if (micro_tokens > INT32_MAX) {
    throw UsageError("--micro-batch x --seq-len is " + std::to_string(micro_tokens) + " tokens, more than fit a pass");
  }
  o.choose("tokens-per-step", o.tokens_per_step, all_ranks);
  if (o.tokens_per_step % all_ranks != 0) {
    const std::string ranks = o.ranks > 1 ? std::to_string(o.ranks) + " ranks x " : "";
    throw UsageError("--tokens-per-step " + std::to_string(o.tokens_per_step) + " is not a multiple of " + ranks +
                     "micro-batch x seq-len = " + std::to_string(all_ranks));
  }
  o.choose("head-chunk", shapes.head_chunk, 512);
  shapes.head_chunk = std::min(shapes.head_chunk, micro_tokens);
}

// As measured (docs/learning.md): the blocks' matrices learn best at a tenth of the rate of embeddings and vectors.
// Flora without --residual moves them so far by itself, outside of its projection.
bool scales_matrix_rates(const OptimizerConfig& optimizer) {
  const bool whole = optimizer.kind == OptimizerKind::kAdafactor || optimizer.residual;
  return whole && !optimizer.scale_parameter && !optimizer.relative_step;
}

float default_rate(const OptimizerConfig& optimizer, int64_t channels) {
  if (scales_matrix_rates(optimizer)) return 1.0f / static_cast<float>(channels);
  switch (optimizer.kind) {
    case OptimizerKind::kFlora:
      return has_orthonormal_rows(optimizer.projection) ? 0.5f / static_cast<float>(channels) : 5e-4f;
    case OptimizerKind::kAdafactor: return 5e-4f;
    case OptimizerKind::kAdamW: return 6e-4f;
    case OptimizerKind::kSgd: return 0.1f;
  }
  return 0;
}

void choose_defaults(Options& o, bool cpu, Gpt2Config& config, bool from_scratch, bool training, Undecided undecided) {
  ActivationShapes& shapes = o.engine.shapes;
  OptimizerConfig& optimizer = o.engine.optimizer;
  GradientConfig& gradients = o.engine.gradients;
  const bool flora = optimizer.kind == OptimizerKind::kFlora, sgd = optimizer.kind == OptimizerKind::kSgd;
  const bool adaptive = flora || optimizer.kind == OptimizerKind::kAdafactor;
  o.choose("dtype", o.dtype, cpu && !multiplies_bf16_faster() ? DType::kF32 : DType::kBF16);
  o.choose("weight-dtype", o.engine.weight_dtype, o.dtype);
  o.choose("activation-dtype", shapes.dtype, o.dtype);
  o.choose("gradient-dtype", gradients.gradient_dtype, o.dtype);
  o.choose("state-dtype", optimizer.state_dtype, o.dtype);
  const int64_t longest = training ? config.positions : config.usable_positions();
  o.choose("seq-len", shapes.sequence, cpu && training ? std::min<int64_t>(256, longest) : longest);
  if (shapes.sequence > config.positions) {
    if (!from_scratch) {
      throw UsageError("--seq-len " + std::to_string(shapes.sequence) + " is longer than the model's " +
                       std::to_string(config.positions) + " positions");
    }
    config.positions = shapes.sequence;
  }
  choose_micro_batch(o, cpu, undecided);
  o.choose("residual", optimizer.residual, flora && has_orthonormal_rows(optimizer.projection));
  // A run that is resumed and does not say is older than the option.
  o.choose("embedding-momentum", optimizer.embedding_momentum,
           !optimizer.residual || optimizer.compress_embeddings || !o.resume.empty());
  o.choose("lr", o.schedule.peak, default_rate(optimizer, config.channels));
  o.choose("matrix-lr-scale", optimizer.matrix_lr_scale, scales_matrix_rates(optimizer) ? 0.1f : 1.0f);
  o.choose("weight-decay", optimizer.weight_decay, sgd ? 0.0f : 0.1f);
  o.choose("beta1", optimizer.beta1, sgd ? 0.0f : 0.9f);
  o.choose("warmup-steps", o.schedule.warmup_steps, percent(o.steps, 5));
  o.choose("cooldown-steps", o.schedule.cooldown_steps, percent(o.steps, 20));
  o.choose("gradients", gradients.kind, flora ? GradientMode::kFused : GradientMode::kDense);
  if (gradients.kind == GradientMode::kCompressed) {
    o.choose("accumulation-rank", gradients.accumulation_rank, optimizer.rank);
  }
  o.choose("clip-norm", gradients.clip_norm, !adaptive && gradients.kind == GradientMode::kDense ? 1.0f : 0.0f);
}

// The engine's configuration: what is said in the options once and used by several parts reaches them all. Chooses how
// the momentum is transferred, which depends on all of it.
EngineConfig engine_config(Options& o, const Gpt2Config& model, bool training) {
  EngineConfig engine = o.engine;
  engine.model = model;
  engine.ranks = o.ranks;
  engine.shapes.training = training;
  engine.sampling = training && o.sample_every > 0;
  OptimizerConfig& optimizer = engine.optimizer;
  optimizer.seed = static_cast<uint64_t>(o.seed);
  optimizer.tokens_per_step = o.tokens_per_step;
  if (optimizer.kind != OptimizerKind::kFlora) optimizer.rank = 0;
  if (o.is_open("transfer")) {
    optimizer.transfer = TransferKind::kReencode;
    o.set("transfer", o.engine.optimizer.transfer, bounded_transfer(optimizer, gpt2_parameters(model)));
    optimizer.transfer = o.engine.optimizer.transfer;
  }
  GradientConfig& gradients = engine.gradients;
  gradients.micro_batches =
      static_cast<int>(o.tokens_per_step / (o.ranks * engine.shapes.batch * engine.shapes.sequence));
  gradients.projection = optimizer.projection;
  gradients.compress_embeddings = optimizer.compress_embeddings;
  gradients.seed = optimizer.seed;
  return engine;
}

void check_gradient_blocks(const Options& o, const EngineConfig& engine, Undecided undecided) {
  const GradientConfig& gradients = engine.gradients;
  if (gradients.blocks == GradientBlocks::kWhole) return;
  const std::string flag = "--gradient-blocks " + name_of(kGradientBlocksNames, gradients.blocks);
  if (gradients.kind != GradientMode::kFused) {
    throw UsageError(flag + " contradicts --gradients " + name_of(kGradientModeNames, gradients.kind));
  }
  if (!engine.optimizer.factored)
    throw UsageError(flag + " contradicts --no-factored: a full second moment sees a gradient once");
  if (gradients.micro_batches > 1 && undecided == Undecided::kNothing) {
    throw UsageError(flag + " needs all of --tokens-per-step " + std::to_string(o.tokens_per_step) +
                     " in one micro-batch of each rank, which has " +
                     std::to_string(engine.shapes.batch * engine.shapes.sequence) + " tokens");
  }
}

// Checkpoints that do not say trained_positions in config.json have it among their options; 0 when there are none.
int64_t trained_by_older_version(const ModelSource& source) {
  if (source.kind != ModelSource::Kind::kDirectory || !fs::exists(fs::path(source.path) / kStateFile)) return 0;
  const nlohmann::json options = read_trainer_state(source.path).options;
  const auto length = options.find("seq_len");
  if (length == options.end() || !length->is_number_unsigned()) return 0;
  return *length < source.config.positions ? length->get<int64_t>() : 0;
}

// A list of globs as --data takes it, from the root. Nothing changes in a directory whose name JSON cannot
// hold.
std::string absolute_globs(const std::string& patterns) {
  std::error_code error;
  const std::string directory = fs::current_path(error);
  if (error || !is_utf8(directory)) return patterns;
  std::string absolute;
  for (const std::string& pattern : split_globs(patterns)) {
    const bool relative = pattern[0] != '/' && (pattern[0] != '~' || fs::exists(pattern));
    absolute += (absolute.empty() ? "" : ",") + (relative ? directory + "/" + pattern : pattern);
  }
  return absolute;
}

std::string absolute_file(const std::string& path) {
  std::error_code error;
  const std::string absolute = fs::absolute(path, error);
  return path.empty() || error || !is_utf8(absolute) ? path : absolute;
}

}  // namespace

std::unique_ptr<Backend> make_backend(Options& options, std::string& why, const DevicePlace& place) {
  why = "as asked for";
  if (options.device != DeviceKind::kCpu) {
    const std::string problem = cuda_unavailable(place.ordinal);
    if (problem.empty()) {
      if (options.device == DeviceKind::kAuto) why = "auto: a GPU is there";
      return make_cuda_backend({.device = place.ordinal, .tf32 = options.tf32, .autotune = options.autotune});
    }
    if (options.device == DeviceKind::kCuda)
      throw UsageError("--device cuda: " + problem + "; --device cpu works everywhere");
    why = "auto: " + problem;
  }
  if (options.threads == 0) options.threads = share_of_cores(place.sharing);
  return make_cpu_backend({.threads = static_cast<int>(options.threads)});
}

std::unique_ptr<Backend> make_backend_for_plan(Options& options, std::string& note) {
  note.clear();
  const std::string problem = options.device == DeviceKind::kCuda ? cuda_unavailable() : "";
  if (!problem.empty()) {
    note = "no GPU is used (" + problem + "): the plan is for a GPU that is not here";
    return make_planning_backend();
  }
  std::string why;
  return make_backend(options, why);
}

int64_t default_micro_batch(const std::string& device) { return device == "cpu" ? kCpuMicroBatch : kGpuMicroBatch; }

RunSetup resolve(const RunRequest& request, Undecided undecided) {
  RunSetup setup;
  setup.request = request;
  Options options = request.options;
  const bool cpu = request.device == "cpu";
  if (options.model.empty()) options.model = cpu ? "small" : "d12";
  if (options.ranks == 1 && options.engine.spread != Spread::kNone) {
    if (options.was_given("shard"))
      throw UsageError("--shard weights needs several processes: --devices 2 or more, or a launcher such as torchrun");
    options.engine.spread = Spread::kNone;  // a checkpoint of several goes on in one
  }
  setup.source = find_model(request.checkpoint.empty() ? options.model : request.checkpoint);
  Gpt2Config config = setup.source.config;
  const bool preset_model = setup.source.kind == ModelSource::Kind::kPreset;
  if (preset_model && request.vocabulary > 0) config.vocabulary = request.vocabulary;
  if (request.vocabulary > config.vocabulary) {
    throw UsageError("the data's vocabulary (" + std::to_string(request.vocabulary) +
                     " tokens) is larger than the model's (" + std::to_string(config.vocabulary) +
                     "): " + options.model);
  }
  if (!cpu) {
    const std::string problem = cuda_refuses(config.channels, config.heads);
    if (!problem.empty()) throw UsageError(options.model + " has " + problem + "; --device cpu takes any number");
  }
  if (config.trained_positions == 0) config.trained_positions = trained_by_older_version(setup.source);
  choose_defaults(options, cpu, config, preset_model, request.training, undecided);
  const ActivationShapes& shapes = options.engine.shapes;
  // Sizes of activations are sums of multiples of this.
  const int64_t activations = shapes.batch * shapes.sequence * config.channels;  // at most 2^48
  if (activations > kMostActivations / config.layers) {
    throw UsageError("--micro-batch " + std::to_string(shapes.batch) + " x --seq-len " +
                     std::to_string(shapes.sequence) + " of a model of " + std::to_string(config.layers) +
                     " layers of " + std::to_string(config.channels) + " channels is more than any machine holds");
  }
  if (request.training) {
    const int64_t before = setup.source.has_weights ? config.usable_positions() : 0;
    config.trained_positions = std::max(before, shapes.sequence);
  }
  check_options(options);  // what was chosen may contradict what was given
  setup.engine = engine_config(options, config, request.training);
  check_gradient_blocks(options, setup.engine, undecided);
  setup.options = options;
  return setup;
}

Options with_absolute_paths(const Options& options) {
  Options absolute = options;
  absolute.data = absolute_globs(options.data);
  absolute.val_data = absolute_globs(options.val_data);
  absolute.tokenizer = absolute_file(options.tokenizer);
  if (!is_preset(options.model) && fs::exists(options.model)) absolute.model = absolute_file(options.model);
  return absolute;
}

void check_saved_shards(const Options& options, const std::string& checkpoint) {
  for (const auto& [flag, patterns] : {std::pair("data", options.data), std::pair("val-data", options.val_data)}) {
    if (patterns.empty() || options.was_given(flag)) continue;
    try {
      expand_globs(patterns);
    } catch (const std::runtime_error&) {
      throw std::runtime_error("no shards match " + patterns + ", the --" + flag + " of " + checkpoint +
                               (patterns[0] == '/' ? "" : " seen from where it was started") + "; pass --" + flag +
                               " with where they are now");
    }
  }
}
