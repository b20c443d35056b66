// run_setup.cpp: see run_setup.h.
#include "train/run_setup.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "data/token_loader.h"
#include "flora/flora.h"
#include "kernels/cpu/machine.h"
#include "train/trainer_state.h"

namespace fs = std::filesystem;

namespace {

constexpr int64_t kCpuMicroBatch = 4, kGpuMicroBatch = 16;
constexpr int64_t kMostActivations = int64_t{1} << 50;  // elements of the residual stream, all layers

DType dtype_of(const std::string& name) {
  if (name == "bf16") return DType::kBF16;
  if (name == "int8") return DType::kI8;
  return DType::kF32;
}

template <typename T>
T choice(const std::map<std::string, T>& names, const std::string& name) {
  return names.at(name);
}

int64_t percent(int64_t steps, int64_t share) { return std::max<int64_t>(1, steps * share / 100); }

// A micro-batch that divides the step, where the planner is going to choose another one.
int64_t starting_micro_batch(const Options& o, int64_t largest) {
  const int64_t sequences = o.tokens_per_step / o.seq_len;
  if (sequences == 0) return largest;
  while (sequences % largest != 0) --largest;
  return largest;
}

void choose_micro_batch(Options& o, bool cpu, Undecided undecided) {
  if (o.micro_batch == 0) o.micro_batch = cpu ? kCpuMicroBatch : kGpuMicroBatch;
  const bool open = undecided == Undecided::kPlannersSettings && o.tokens_per_step > 0;
  if (open && !o.was_given("micro-batch")) o.micro_batch = starting_micro_batch(o, o.micro_batch);
  const int64_t micro_tokens = o.micro_batch * o.seq_len;
  if (micro_tokens > INT32_MAX) {
    throw UsageError("--micro-batch x --seq-len is " + std::to_string(micro_tokens) + " tokens, more than fit a pass");
  }
  if (o.tokens_per_step == 0) o.tokens_per_step = micro_tokens;
  if (o.tokens_per_step % micro_tokens != 0) {
    throw UsageError("--tokens-per-step " + std::to_string(o.tokens_per_step) +
                     " is not a multiple of micro-batch x seq-len = " + std::to_string(micro_tokens));
  }
  if (o.head_chunk == 0) o.head_chunk = std::min<int64_t>(micro_tokens, 512);
  o.head_chunk = std::min(o.head_chunk, micro_tokens);
}

void choose_defaults(Options& o, bool cpu, Gpt2Config& config, bool from_scratch, bool training, Undecided undecided) {
  const bool adaptive = o.optimizer == "flora" || o.optimizer == "adafactor";
  if (o.dtype.empty()) o.dtype = cpu ? "fp32" : "bf16";
  for (std::string* dtype : {&o.weight_dtype, &o.activation_dtype, &o.gradient_dtype, &o.state_dtype}) {
    if (dtype->empty()) *dtype = o.dtype;
  }
  if (o.seq_len == 0) {
    const int64_t most = training ? config.positions : config.usable_positions();
    o.seq_len = cpu && training ? std::min<int64_t>(256, most) : most;
  }
  if (o.seq_len > config.positions) {
    if (!from_scratch) {
      throw UsageError("--seq-len " + std::to_string(o.seq_len) + " is longer than the model's " +
                       std::to_string(config.positions) + " positions");
    }
    config.positions = o.seq_len;
  }
  choose_micro_batch(o, cpu, undecided);
  if (o.lr == 0) o.lr = adaptive ? 5e-4 : o.optimizer == "adamw" ? 6e-4 : 0.1;
  if (o.weight_decay < 0) o.weight_decay = o.optimizer == "sgd" ? 0.0 : 0.1;
  if (o.beta1 < 0) o.beta1 = o.optimizer == "sgd" ? 0.0 : 0.9;
  if (o.warmup_steps < 0) o.warmup_steps = percent(o.steps, 5);
  if (o.cooldown_steps < 0) o.cooldown_steps = percent(o.steps, 20);
  if (o.gradients.empty()) o.gradients = o.optimizer == "flora" ? "fused" : "dense";
  if (o.gradients == "compressed" && o.accumulation_rank == 0) o.accumulation_rank = o.rank;
  if (o.clip_norm < 0) o.clip_norm = !adaptive && o.gradients == "dense" ? 1.0 : 0.0;
}

EngineConfig engine_config(const Options& o, const Gpt2Config& model, bool training) {
  EngineConfig engine;
  engine.model = model;
  engine.shapes = {o.micro_batch, o.seq_len, o.head_chunk, dtype_of(o.activation_dtype), recompute_of(o.recompute),
                   training};
  engine.weight_dtype = dtype_of(o.weight_dtype);
  engine.master_weights = o.master_weights == "fp32";

  const auto projection = choice<ProjectionKind>({{"gaussian", ProjectionKind::kGaussian},
                                                  {"rademacher", ProjectionKind::kRademacher},
                                                  {"orthonormal", ProjectionKind::kOrthonormal}},
                                                 o.projection);
  OptimizerConfig& opt = engine.optimizer;
  opt.kind = choice<OptimizerKind>({{"flora", OptimizerKind::kFlora},
                                    {"adamw", OptimizerKind::kAdamW},
                                    {"adafactor", OptimizerKind::kAdafactor},
                                    {"sgd", OptimizerKind::kSgd}},
                                   o.optimizer);
  opt.seed = static_cast<uint64_t>(o.seed);
  opt.beta1 = static_cast<float>(o.beta1);
  opt.weight_decay = static_cast<float>(o.weight_decay);
  opt.state_dtype = dtype_of(o.state_dtype);
  opt.beta2 = static_cast<float>(o.beta2);
  opt.eps = static_cast<float>(o.eps);
  opt.rank = opt.kind == OptimizerKind::kFlora ? o.rank : 0;
  opt.kappa = static_cast<uint32_t>(o.kappa);
  opt.decay_rate = static_cast<float>(o.decay_rate);
  opt.eps1 = static_cast<float>(o.eps1);
  opt.eps2 = static_cast<float>(o.eps2);
  opt.clip = static_cast<float>(o.update_clip);
  opt.factored = !o.no_factored;
  opt.scale_parameter = o.scale_parameter;
  opt.relative_step = o.relative_step;
  opt.warmup_init = o.warmup_init;
  opt.compress_embeddings = o.compress_embeddings;
  opt.projection = projection;
  opt.transfer = o.transfer.empty() ? bounded_transfer(opt, gpt2_parameters(model)) : transfer_of(o.transfer);
  GradientConfig& gradients = engine.gradients;
  gradients.kind = choice<GradientMode>(
      {{"dense", GradientMode::kDense}, {"fused", GradientMode::kFused}, {"compressed", GradientMode::kCompressed}},
      o.gradients);
  gradients.micro_batches = static_cast<int>(o.tokens_per_step / (o.micro_batch * o.seq_len));
  gradients.gradient_dtype = dtype_of(o.gradient_dtype);
  gradients.accumulation_dtype = dtype_of(o.accumulation_dtype);
  gradients.accumulation_rank = o.accumulation_rank;
  gradients.projection = projection;
  gradients.compress_embeddings = o.compress_embeddings;
  gradients.clip_norm = static_cast<float>(o.clip_norm);
  gradients.seed = opt.seed;
  gradients.blocks = gradient_blocks_of(o.gradient_blocks);
  engine.offload = offload_of(o.offload, o.layers_in_flight);
  engine.graphs = !o.no_cuda_graph;
  return engine;
}

void check_gradient_blocks(const Options& o, const GradientConfig& gradients, Undecided undecided) {
  if (gradients.blocks == GradientBlocks::kWhole) return;
  const std::string flag = "--gradient-blocks " + o.gradient_blocks;
  if (gradients.kind != GradientMode::kFused) throw UsageError(flag + " contradicts --gradients " + o.gradients);
  if (o.no_factored) throw UsageError(flag + " contradicts --no-factored: a full second moment sees a gradient once");
  if (gradients.micro_batches > 1 && undecided == Undecided::kNothing) {
    throw UsageError(flag + " needs all of --tokens-per-step " + std::to_string(o.tokens_per_step) +
                     " in one micro-batch, which has " + std::to_string(o.micro_batch * o.seq_len) + " tokens");
  }
}

ScheduleConfig schedule_config(const Options& o) {
  ScheduleConfig schedule;
  schedule.kind = choice<ScheduleKind>({{"cosine", ScheduleKind::kCosine},
                                        {"linear", ScheduleKind::kLinear},
                                        {"constant", ScheduleKind::kConstant},
                                        {"wsd", ScheduleKind::kWsd}},
                                       o.schedule);
  schedule.peak = static_cast<float>(o.lr);
  schedule.warmup_steps = static_cast<uint32_t>(o.warmup_steps);
  schedule.final_fraction = static_cast<float>(o.final_lr);
  schedule.cooldown_steps = static_cast<uint32_t>(o.cooldown_steps);
  return schedule;
}

// What JSON can hold.
bool is_utf8(const std::string& text) {
  try {
    static_cast<void>(nlohmann::json(text).dump());
    return true;
  } catch (const nlohmann::json::exception&) {
    return false;
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

// A list of globs as --data takes it, from the root. Nothing changes in a directory whose name is no text.
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

std::unique_ptr<Backend> make_backend(Options& options, std::string& why) {
  why = "as asked for";
  if (options.device != "cpu") {
    const std::string problem = cuda_unavailable();
    if (problem.empty()) {
      if (options.device == "auto") why = "auto: a GPU is there";
      return make_cuda_backend({.tf32 = options.tf32, .autotune = !options.no_autotune});
    }
    if (options.device == "cuda") throw UsageError("--device cuda: " + problem + "; --device cpu works everywhere");
    why = "auto: " + problem;
  }
  if (options.threads == 0) options.threads = usable_cores();
  return make_cpu_backend({.threads = static_cast<int>(options.threads)});
}

std::unique_ptr<Backend> make_backend_for_plan(Options& options, std::string& note) {
  note.clear();
  const std::string problem = options.device == "cuda" ? cuda_unavailable() : "";
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
  // Sizes of activations are sums of multiples of this.
  const int64_t activations = options.micro_batch * options.seq_len * config.channels;  // at most 2^48
  if (activations > kMostActivations / config.layers) {
    throw UsageError("--micro-batch " + std::to_string(options.micro_batch) + " x --seq-len " +
                     std::to_string(options.seq_len) + " of a model of " + std::to_string(config.layers) +
                     " layers of " + std::to_string(config.channels) + " channels is more than any machine holds");
  }
  if (request.training) {
    const int64_t before = setup.source.has_weights ? config.usable_positions() : 0;
    config.trained_positions = std::max(before, options.seq_len);
  }
  check_options(options);  // what was chosen may contradict what was given
  setup.engine = engine_config(options, config, request.training);
  options.transfer = transfer_name(setup.engine.optimizer.transfer);
  check_gradient_blocks(options, setup.engine.gradients, undecided);
  setup.schedule = schedule_config(options);
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
