// options.h: every option of a run in one place, with the one list that the command line, the checkpoint, metrics.jsonl
// and the check on resume are all made from (describe()).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "data/shard.h"
#include "flora/schedule.h"
#include "kernels/cpu/machine.h"
#include "train/engine.h"
#include "train/option_values.h"

constexpr std::pair<DType, const char*> named(DType dtype) { return {dtype, kDTypes[static_cast<size_t>(dtype)].name}; }
inline constexpr std::pair<DType, const char*> kDtypeNames[] = {named(DType::kBF16), named(DType::kF32),
                                                                named(DType::kI8)};
inline constexpr std::pair<DType, const char*> kFloatDtypeNames[] = {kDtypeNames[0], kDtypeNames[1]};
inline constexpr std::pair<bool, const char*> kMasterWeightsNames[] = {{false, "none"}, {true, "fp32"}};

enum class DeviceKind : uint8_t { kAuto, kCpu, kCuda };
inline constexpr std::pair<DeviceKind, const char*> kDeviceNames[] = {
    {DeviceKind::kAuto, "auto"}, {DeviceKind::kCpu, "cpu"}, {DeviceKind::kCuda, "cuda"}};

// What the parts of the engine are configured with is described where they declare it. Of an open option (is_open())
// the value means nothing yet: resolve() in run_setup.h chooses it for the device and the model.
struct Options {
  EngineConfig engine;
  ScheduleConfig schedule;

  // data
  std::string data, val_data, tokenizer, hellaswag;
  DataFormat data_format = DataFormat::kLlmc;
  int64_t tokens_per_step = 0;
  int64_t vocab_size = 0;  // 0: the data's
  // model
  std::string model;
  DType dtype = DType::kF32;  // of what has no dtype of its own
  int64_t seed = 1337;
  // gradients
  bool skip_nonfinite = false;
  int64_t max_skips = 5;
  // memory
  std::string memory_budget;
  bool plan = false, json = false;
  // run
  int64_t steps = 1000;
  std::string out, resume;
  int64_t checkpoint_every = 250, keep_checkpoints = 2, eval_every = 250;
  int64_t eval_batches = -1;  // -1: as many as make a default number of sequences
  int64_t sample_every = 0, sample_tokens = 200, log_every = 1;
  std::string prompt;
  double temperature = 0.8;
  int64_t top_k = 50;
  double top_p = 1;
  // device
  DeviceKind device = DeviceKind::kAuto;
  int64_t threads = 0;  // 0: as many as there are cores
  bool tf32 = false, autotune = true, self_check = true;
  bool overlap_updates = true;  // where memory allows: train/budget.h
  bool profile = false;
  double peak_tflops = 0;  // 0: measured
  // many devices
  int64_t devices = 1, rendezvous_port = 0;
  double rendezvous_timeout = 60, comm_timeout = 60;
  int64_t check_ranks = 0;

  int ranks = 1;  // processes of the run: what its launcher says, no flag

  std::vector<std::string> given;    // flags that were on the command line or in the configuration file
  std::vector<std::string> settled;  // those that something else has decided: a checkpoint, the planner, resolve()

  bool was_given(const std::string& flag) const;
  // True while nobody has said or chosen a value.
  bool is_open(const std::string& flag) const;

  template <typename T>
  void set(const char* flag, T& field, const std::type_identity_t<T>& value) {
    field = value;
    settled.push_back(flag);
  }
  // set() for an option that is open.
  template <typename T>
  void choose(const char* flag, T& field, const std::type_identity_t<T>& value) {
    if (is_open(flag)) set(flag, field, value);
  }
};

// kMayChangeTraining: what a run learns, or in which portions; said when it changes.
enum class OnResume : uint8_t { kMayChange, kMayChangeTraining, kFixed };

// Calls the visitor once per option: visitor(field, flag, unit, help, values, on_resume), where values is one of
// the kinds of option_values.h; group(name) starts a new group.
template <typename Visitor>
void describe(Options& o, Visitor& v);

// A flag as a key: "micro_batch" for "micro-batch".
std::string json_key(std::string flag);

// All options as one JSON object, by json_key() of their flags.
nlohmann::ordered_json options_to_json(const Options& options);

struct Restored {
  std::vector<std::string> missing;  // flags that a checkpoint of an earlier version lacks: they keep their defaults
  std::vector<std::string> changes;  // what changes the training, a line each: what was and what is
};

// Takes from a checkpoint's options everything that was not given on the command line. A given option that differs and
// must not change on resume throws UsageError naming the flag and both values; an option of another type, or one that
// this version does not have, std::runtime_error.
Restored restore_options(Options& options, const nlohmann::json& saved);

// Throws UsageError for flags that contradict each other.
void check_options(const Options& options);

template <typename Visitor>
void describe(Options& o, Visitor& v) {
  const OnResume fixed = OnResume::kFixed, free = OnResume::kMayChange, said = OnResume::kMayChangeTraining;
  EngineConfig& engine = o.engine;
  ActivationShapes& shapes = engine.shapes;
  OptimizerConfig& optimizer = engine.optimizer;
  GradientConfig& gradients = engine.gradients;
  ScheduleConfig& schedule = o.schedule;
  v.group("data");
  v(o.data, "data", "GLOB[,GLOB]", "training shards; default: text found on this machine, as bytes", Text{}, free);
  v(o.val_data, "val-data", "GLOB[,GLOB]",
    "validation shards; default: the 'val' ones beside the training shards; eval: those of the model's run", Text{},
    free);
  v(o.data_format, "data-format", "", "shard format: llm.c's (told by their magic) or headerless uint16",
    kDataFormatNames, fixed);
  v(o.vocab_size, "vocab-size", "tokens",
    "vocabulary of headerless data, and of a preset model; default: what the shards declare, headerless GPT-2's 50257",
    at_least(1), fixed);
  v(o.tokenizer, "tokenizer", "FILE",
    "tokenizer.bin for prompts, samples and bits per byte, or a Hugging Face tokenizer's folder; default: beside the "
    "shards, or the model's",
    Text{}, free);
  v(o.hellaswag, "hellaswag", "FILE",
    "eval: how often the likeliest of several endings is the right one, of questions made by data/hellaswag.py or "
    "llm.c; without --val-data and --data nothing else is evaluated",
    Text{}, free);
  v(shapes.sequence, "seq-len", "tokens",
    "sequence length T; default: 256 on a CPU, else the model's positions; eval, generate: what the model was trained "
    "at",
    at_least(1), fixed);
  v(shapes.batch, "micro-batch", "sequences",
    "sequences per forward and backward pass; default: 4 on a CPU, 16 on a GPU", at_least(1), said);
  v(o.tokens_per_step, "tokens-per-step", "tokens",
    "tokens per update, a multiple of micro-batch x seq-len; default: one micro-batch", at_least(1), said);
  v.group("model");
  v(o.model, "model", "NAME|DIR|FILE",
    "preset (tiny mini small d12 d24 d36 d48 gpt2:dN gpt3:cN), Hugging Face directory, config.json, or llm.c .bin; "
    "default: small on a CPU, d12 on a GPU",
    Text{}, fixed);
  v(o.dtype, "dtype", "",
    "of weights, activations, gradients and states; default: bf16 on a GPU and on a CPU with AMX or AMD's "
    "AVX512-BF16, else fp32",
    kFloatDtypeNames, fixed);
  v(engine.weight_dtype, "weight-dtype", "",
    "of the weights; int8: matrices of the blocks in 8-bit blocks, the rest as the activations; default: dtype",
    kDtypeNames, fixed);
  v(shapes.dtype, "activation-dtype", "", "of the activations; default: dtype", kFloatDtypeNames, fixed);
  v(gradients.gradient_dtype, "gradient-dtype", "", "of a gradient; default: dtype", kFloatDtypeNames, fixed);
  v(optimizer.state_dtype, "state-dtype", "",
    "of the optimizer's momentum; int8: block-wise, full second moments, too; default: dtype", kDtypeNames, fixed);
  v(engine.master_weights, "master-weights", "", "keep an fp32 copy of bf16 weights instead of rounding stochastically",
    kMasterWeightsNames, fixed);
  v(o.seed, "seed", "", "of weights, projections, rounding, data order and sampling", at_least(0, INT64_MAX), fixed);
  v.group("optimizer");
  v(optimizer.kind, "optimizer", "", "update rule", kOptimizerNames, fixed);
  v(optimizer.rank, "rank", "", "Flora: rank of the compressed momentum", at_least(1), fixed);
  v(optimizer.kappa, "kappa", "steps", "Flora: steps between two projections", at_least(1), fixed);
  v(schedule.peak, "lr", "",
    "peak learning rate; default: 1 / channels for flora (without residual 0.5 / channels, with gaussian or rademacher "
    "projections 5e-4) and adafactor (with scale-parameter 5e-4), 6e-4 for adamw, 0.1 for sgd",
    kAboveZero, said);
  v(schedule.kind, "schedule", "", "of the learning rate after the warmup (wsd: constant, then 1-sqrt cooldown)",
    kScheduleNames, said);
  v(schedule.warmup_steps, "warmup-steps", "steps", "linear warmup; default: 5% of steps", at_least(0), said);
  v(schedule.cooldown_steps, "cooldown-steps", "steps", "cooldown of wsd; default: 20% of steps", at_least(0), said);
  v(schedule.final_fraction, "final-lr", "fraction", "learning rate at the end, as a fraction of the peak", at_least(0),
    said);
  v(optimizer.matrix_lr_scale, "matrix-lr-scale", "",
    "factor on the learning rate of the blocks' matrices; embeddings, the head, biases and LayerNorms keep lr; "
    "default: 0.1 with residual and for adafactor, unless scale-parameter; else 1",
    kAboveZero, said);
  v(optimizer.weight_decay, "weight-decay", "", "of matrices and embeddings, times lr; default: 0.1, sgd 0",
    at_least(0), said);
  v(optimizer.beta1, "beta1", "", "momentum; 0 keeps none; default: 0.9, sgd 0", kFraction, fixed);
  v(optimizer.beta2, "beta2", "", "AdamW: decay of the second moment", kFraction, fixed);
  v(optimizer.half_life, "half-life", "tokens",
    "AdamW, Flora, Adafactor: of the second moment, in tokens instead of steps (beta2 = 0.5^(tokens-per-step / "
    "half-life)); 0: beta2, decay-rate",
    at_least(0), fixed);
  v(optimizer.eps, "eps", "", "AdamW: added to the root of the second moment", at_least(0), fixed);
  v(optimizer.projection, "projection", "", "Flora: kind of projection", kProjectionNames, fixed);
  v(optimizer.residual, "residual", "",
    "Flora: what the projection does not hold is used at full weight instead of 1 - beta1; default: on with "
    "projection cosine, --residual=false leaves it off",
    Switch{}, fixed);
  v(optimizer.transfer, "transfer", "",
    "Flora: what happens to the momentum when the projection changes; default: reencode, or rescale where reencode "
    "could make it grow without bound",
    kTransferNames, fixed);
  v(optimizer.decay_rate, "decay-rate", "",
    "Flora, Adafactor: beta2(t) = 1 - t^decay-rate, or that of half-life where it is smaller", kBelowZero, fixed);
  v(optimizer.eps1, "eps1", "", "Flora, Adafactor: added to squared gradients", at_least(0), fixed);
  v(optimizer.eps2, "eps2", "", "Flora, Adafactor: smallest rms(weight) for scale-parameter", at_least(0), fixed);
  v(optimizer.clip, "update-clip", "", "Flora, Adafactor: largest rms of an update; 0: off", at_least(0), fixed);
  v(optimizer.factored, "no-factored", "", "Flora, Adafactor: full second moment instead of a factored one",
    Switch{false}, fixed);
  v(optimizer.scale_parameter, "scale-parameter", "", "Flora, Adafactor: learning rate times rms(weight)", Switch{},
    fixed);
  v(optimizer.relative_step, "relative-step", "",
    "Flora, Adafactor: lr = min(1e-2, 1/sqrt(t)) instead of lr and schedule", Switch{}, fixed);
  v(optimizer.warmup_init, "warmup-init", "", "with relative-step: lr = min(1e-6 t, 1/sqrt(t))", Switch{}, fixed);
  v(optimizer.embedding_momentum, "embedding-momentum", "",
    "Flora, Adafactor: momentum of the token embedding and the head, too, if they have more than four rows a column; "
    "default: off with residual, unless compress-embeddings",
    Switch{}, fixed);
  v(optimizer.compress_embeddings, "compress-embeddings", "",
    "Flora: compress matrices of any aspect ratio, embeddings too", Switch{}, fixed);
  v.group("gradients");
  v(gradients.kind, "gradients", "",
    "keep all (dense), update at once (fused, LOMO), or sum projections; default: fused for flora, else dense",
    kGradientModeNames, fixed);
  v(gradients.accumulation_rank, "accumulation-rank", "",
    "rank of gradients summed over micro-batches; default: 0 (not projected); compressed: rank", at_least(1), fixed);
  v(gradients.accumulation_dtype, "accumulation-dtype", "",
    "of gradients summed over micro-batches (bf16: rounded stochastically)", kFloatDtypeNames, fixed);
  v(gradients.clip_norm, "clip-norm", "",
    "largest global gradient norm, 0: off; fused needs two backward passes; default: 1 for dense adamw and sgd, else 0",
    at_least(0), fixed);
  v(o.skip_nonfinite, "skip-nonfinite", "", "skip an update with a non-finite loss instead of stopping", Switch{},
    free);
  v(o.max_skips, "max-skips", "steps", "skip-nonfinite: stop after so many skipped updates in a row", at_least(1),
    free);
  v.group("memory");
  v(o.memory_budget, "memory-budget", "BYTES|auto",
    "choose the fastest micro-batch, recompute, head-chunk, gradient-blocks, offload and (several devices) shard that "
    "fit, among those not given; KiB MiB GiB TiB (or K M G T): powers of 1024, KB MB GB TB: of 1000, nothing: bytes; "
    "auto: what the device has free; plan without --model: the largest models that fit",
    Text{}, free);
  v(shapes.recompute, "recompute", "", "activations computed again in the backward pass", kRecomputeNames, free);
  v(shapes.head_chunk, "head-chunk", "tokens",
    "tokens whose logits exist at a time; default: at most 512, in training on a GPU as many as its memory allows",
    at_least(1), fixed);
  v(gradients.blocks, "gradient-blocks", "",
    "gradients that are computed and used block by block, computed again for each pass of the update, instead of "
    "whole: of embedding and head, or of all large matrices (fused gradients, one micro-batch)",
    kGradientBlocksNames, fixed);
  v(engine.offload, "offload", "LIST",
    "what stays in host memory and visits the device layer by layer: none, or any of activations (what is kept for "
    "the backward pass), state (of the optimizer), weights (state comes along), with commas between",
    OffloadList{}, free);
  v(engine.offload.layers_in_flight, "layers-in-flight", "layers", "offload: layers that are on the device at a time",
    at_least(2), free);
  v(o.plan, "plan", "", "print the memory plan and exit", Switch{}, free);
  v(o.json, "json", "", "with plan: as JSON", Switch{}, free);
  v.group("run");
  v(o.steps, "steps", "steps", "updates to make in all", at_least(1), said);
  v(o.out, "out", "DIR", "checkpoints and metrics.jsonl; default: runs/<date and time>", Text{}, free);
  v(o.resume, "resume", "DIR", "go on from a run's directory or one of its checkpoints", Text{}, free);
  v(o.checkpoint_every, "checkpoint-every", "steps", "0: only at the end", at_least(0), free);
  v(o.keep_checkpoints, "keep-checkpoints", "", "how many of the newest to keep; 0: all", at_least(0), free);
  v(o.eval_every, "eval-every", "steps", "validation loss; 0: never", at_least(0), free);
  v(o.eval_batches, "eval-batches", "micro-batches",
    "of one validation; 0: all of the shards; default: 80 sequences on a CPU, 320 on a GPU, whatever the micro-batch; "
    "eval: all; hellaswag: the first questions with as many endings",
    at_least(0), free);
  v(o.sample_every, "sample-every", "steps",
    "print a sample of text, and one before the first step and after the last; 0: never", at_least(0), free);
  v(o.sample_tokens, "sample-tokens", "tokens", "length of a sample", at_least(1), free);
  v(o.prompt, "prompt", "TEXT", "start of a sample; default: end-of-text", Text{.may_be_empty = true}, free);
  v(o.temperature, "temperature", "", "of sampling; 0: the likeliest token", at_least(0), free);
  v(o.top_k, "top-k", "tokens", "sample from the k likeliest; 0: from all", at_least(0), free);
  v(o.top_p, "top-p", "", "of those from the fewest likeliest that are together as probable as this; 1: from all",
    kAboveZeroToOne, free);
  v(o.log_every, "log-every", "steps", "progress line; metrics.jsonl has every step", at_least(1), free);
  v.group("device");
  v(o.device, "device", "", "where to compute", kDeviceNames, free);
  v(o.threads, "threads", "",
    "CPU threads; 0: OMP_NUM_THREADS, else one per core; on resume those of the run, for identical bits",
    at_least(0, kMostThreads), free);
  v(o.tf32, "tf32", "", "CUDA: fp32 matmuls on tensor cores, inputs rounded to TF32", Switch{}, fixed);
  v(o.autotune, "no-autotune", "",
    "CUDA: cuBLASLt's first choice of a matmul algorithm instead of timing several at the start", Switch{false}, free);
  v(o.self_check, "no-self-check", "",
    "do not compare what a GPU computes with plain formulas before it trains; it takes a second, once for each device, "
    "driver, build and shape",
    Switch{false}, free);
  v(engine.graphs, "no-cuda-graph", "", "CUDA: launch every kernel instead of replaying a recorded step", Switch{false},
    free);
  v(o.overlap_updates, "no-update-overlap", "",
    "CUDA: fused updates take turns with the backward pass; else they run beside it where a second buffer for "
    "gradients and a second workspace fit into memory",
    Switch{false}, free);
  v(o.profile, "profile", "", "time, rate and share of every operation at the end", Switch{}, free);
  v(o.peak_tflops, "peak-tflops", "TFLOP/s", "of the device, for MFU; 0: measured at the start", at_least(0), free);
  v.group("many devices");
  v(o.devices, "devices", "", "train with as many processes on this machine, one a device; they average gradients",
    at_least(1, kMostThreads), free);
  v(engine.spread, "shard", "",
    "weights: each process keeps its part of the blocks' matrices and of their optimizer states, and layers are "
    "gathered one after another; for a model that is larger than one device",
    kSpreadNames, free);
  v(o.rendezvous_port, "rendezvous-port", "PORT",
    "where rank 0 listens for the others; 0: one above MASTER_PORT, or one made from the job's name; with devices a "
    "free one",
    at_least(0, 65535), free);
  v(o.rendezvous_timeout, "rendezvous-timeout", "seconds", "in which all processes must have come", kAboveZero, free);
  v(o.comm_timeout, "comm-timeout", "seconds", "after which a process that gives no sign of life is lost", kAboveZero,
    free);
  v(o.check_ranks, "check-ranks", "steps",
    "compare the bits of weights and states over all processes so often; 0: only before a checkpoint", at_least(0),
    free);
}
