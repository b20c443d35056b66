// options.h: every option of a run in one place, with the one list that the command line, the checkpoint, metrics.jsonl
// and the check on resume are all made from (describe()).
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "kernels/cpu/machine.h"

// A mistake in how the program was called: one line, exit code 2. Failures at run time are std::runtime_error, exit
// code 1.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// 0, "" or -1 in a default means: chosen for the device and the model; resolve() in run_setup.h replaces it.
struct Options {
  // data
  std::string data, val_data, data_format = "auto", tokenizer;
  int64_t seq_len = 0, micro_batch = 0, tokens_per_step = 0;
  int64_t vocab_size = 0;
  // model
  std::string model, dtype, weight_dtype, activation_dtype, gradient_dtype, state_dtype, master_weights = "none";
  int64_t seed = 1337;
  // optimizer
  std::string optimizer = "flora";
  int64_t rank = 256, kappa = 1000;
  double lr = 0;
  std::string schedule = "cosine";
  int64_t warmup_steps = -1, cooldown_steps = -1;
  double final_lr = 0.1, weight_decay = -1, beta1 = -1, beta2 = 0.95, eps = 1e-8;
  double decay_rate = -0.8, eps1 = 1e-30, eps2 = 1e-3, update_clip = 1.0;
  bool no_factored = false, scale_parameter = false, relative_step = false, warmup_init = false;
  bool compress_embeddings = false;
  std::string projection = "gaussian", transfer;
  // gradients
  std::string gradients;
  int64_t accumulation_rank = 0;
  std::string accumulation_dtype = "fp32";
  double clip_norm = -1;
  bool skip_nonfinite = false;
  int64_t max_skips = 5;
  // memory
  std::string memory_budget, recompute = "none", gradient_blocks = "whole", offload = "none";
  int64_t head_chunk = 0, layers_in_flight = 2;
  bool plan = false, json = false;
  // run
  int64_t steps = 1000;
  std::string out, resume;
  int64_t checkpoint_every = 250, keep_checkpoints = 2, eval_every = 250, eval_batches = -1;
  int64_t sample_every = 0, sample_tokens = 200, log_every = 1;
  std::string prompt;
  double temperature = 0.8;
  int64_t top_k = 50;
  // device
  std::string device = "auto";
  int64_t threads = 0;
  bool tf32 = false, no_autotune = false, no_cuda_graph = false;
  bool profile = false;
  double peak_tflops = 0;

  std::vector<std::string> given;  // flags that were on the command line or in the configuration file
  bool was_given(const std::string& flag) const;
};

// kMayChangeTraining: what a run learns, or in which portions; said when it changes.
enum class OnResume : uint8_t { kMayChange, kMayChangeTraining, kFixed };

// The numbers a flag takes. Sizes and counts are multiplied with each other, and positions on the device are 32 bits
// wide.
struct Range {
  double least = -INFINITY, below = INFINITY;
  bool least_itself = true;
  int64_t most = INT32_MAX;  // of whole numbers
};
constexpr Range at_least(double least, int64_t most = INT32_MAX) { return {.least = least, .most = most}; }
inline constexpr Range kAboveZero = {.least = 0, .least_itself = false}, kBelowZero = {.below = 0},
                       kFraction = {.least = 0, .below = 1};

// Throw UsageError naming the flag. Fractions become fp32, where one that is 0 or 1 by rounding would switch off what
// it scales.
void check_range(const std::string& flag, int64_t value, const Range& range);
void check_range(const std::string& flag, double value, const Range& range);

// Calls the visitor once per option: visitor(field, flag, unit, help, values, on_resume), where values is the range of
// a number, or the choices of a text (none: any text); group(name) starts a new group.
template <typename Visitor>
void describe(Options& o, Visitor& v);

// All options as one JSON object, keyed by flag without the dashes.
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
  using S = std::vector<std::string>;
  const OnResume fixed = OnResume::kFixed, free = OnResume::kMayChange, said = OnResume::kMayChangeTraining;
  const S float_dtypes = {"bf16", "fp32"};
  v.group("data");
  v(o.data, "data", "GLOB[,GLOB]", "training shards; default: text found on this machine, as bytes", S{}, free);
  v(o.val_data, "val-data", "GLOB[,GLOB]",
    "validation shards; default: the 'val' ones beside the training shards; eval: those of the model's run", S{}, free);
  v(o.data_format, "data-format", "", "shard format: llm.c's (told by their magic) or headerless uint16",
    S{"auto", "nanogpt"}, fixed);
  v(o.vocab_size, "vocab-size", "tokens",
    "vocabulary of headerless data, and of a preset model; default: what the shards declare, headerless GPT-2's 50257",
    at_least(1), fixed);
  v(o.tokenizer, "tokenizer", "FILE",
    "tokenizer.bin for prompts and samples, or a Hugging Face tokenizer's folder; default: beside the shards, or the "
    "model's",
    S{}, free);
  v(o.seq_len, "seq-len", "tokens",
    "sequence length T; default: 256 on a CPU, else the model's positions; eval, generate: what the model was trained "
    "at",
    at_least(1), fixed);
  v(o.micro_batch, "micro-batch", "sequences",
    "sequences per forward and backward pass; default: 4 on a CPU, 16 on a GPU", at_least(1), said);
  v(o.tokens_per_step, "tokens-per-step", "tokens",
    "tokens per update, a multiple of micro-batch x seq-len; default: one micro-batch", at_least(1), said);
  v.group("model");
  v(o.model, "model", "NAME|DIR|FILE",
    "preset (tiny mini small d12 d24 d36 d48 gpt2:dN gpt3:cN), Hugging Face directory, config.json, or llm.c .bin; "
    "default: small on a CPU, d12 on a GPU",
    S{}, fixed);
  v(o.dtype, "dtype", "", "of weights, activations, gradients and states; default: fp32 on a CPU, bf16 on a GPU",
    float_dtypes, fixed);
  v(o.weight_dtype, "weight-dtype", "",
    "of the weights; int8: matrices of the blocks in 8-bit blocks, the rest as the activations; default: dtype",
    S{"bf16", "fp32", "int8"}, fixed);
  v(o.activation_dtype, "activation-dtype", "", "of the activations; default: dtype", float_dtypes, fixed);
  v(o.gradient_dtype, "gradient-dtype", "", "of a gradient; default: dtype", float_dtypes, fixed);
  v(o.state_dtype, "state-dtype", "",
    "of the optimizer's momentum; int8: block-wise, full second moments, too; default: dtype",
    S{"bf16", "fp32", "int8"}, fixed);
  v(o.master_weights, "master-weights", "", "keep an fp32 copy of bf16 weights instead of rounding stochastically",
    S{"none", "fp32"}, fixed);
  v(o.seed, "seed", "", "of weights, projections, rounding, data order and sampling", at_least(0, INT64_MAX), fixed);
  v.group("optimizer");
  v(o.optimizer, "optimizer", "", "update rule", S{"flora", "adamw", "adafactor", "sgd"}, fixed);
  v(o.rank, "rank", "", "Flora: rank of the compressed momentum", at_least(1), fixed);
  v(o.kappa, "kappa", "steps", "Flora: steps between two projections", at_least(1), fixed);
  v(o.lr, "lr", "", "peak learning rate; default: 5e-4 for flora and adafactor, 6e-4 for adamw, 0.1 for sgd",
    kAboveZero, said);
  v(o.schedule, "schedule", "", "of the learning rate after the warmup (wsd: constant, then 1-sqrt cooldown)",
    S{"cosine", "linear", "constant", "wsd"}, said);
  v(o.warmup_steps, "warmup-steps", "steps", "linear warmup; default: 5% of steps", at_least(0), said);
  v(o.cooldown_steps, "cooldown-steps", "steps", "cooldown of wsd; default: 20% of steps", at_least(0), said);
  v(o.final_lr, "final-lr", "fraction", "learning rate at the end, as a fraction of the peak", at_least(0), said);
  v(o.weight_decay, "weight-decay", "", "of matrices and embeddings, times lr; default: 0.1, sgd 0", at_least(0), said);
  v(o.beta1, "beta1", "", "momentum; 0 keeps none; default: 0.9, sgd 0", kFraction, fixed);
  v(o.beta2, "beta2", "", "AdamW: decay of the second moment", kFraction, fixed);
  v(o.eps, "eps", "", "AdamW: added to the root of the second moment", at_least(0), fixed);
  v(o.projection, "projection", "", "Flora: kind of projection", S{"gaussian", "rademacher", "orthonormal"}, fixed);
  v(o.transfer, "transfer", "",
    "Flora: what happens to the momentum when the projection changes; default: reencode, or rescale where reencode "
    "could make it grow without bound",
    S{"reencode", "restart", "rescale"}, fixed);
  v(o.decay_rate, "decay-rate", "", "Flora, Adafactor: beta2(t) = 1 - t^decay-rate", kBelowZero, fixed);
  v(o.eps1, "eps1", "", "Flora, Adafactor: added to squared gradients", at_least(0), fixed);
  v(o.eps2, "eps2", "", "Flora, Adafactor: smallest rms(weight) for scale-parameter", at_least(0), fixed);
  v(o.update_clip, "update-clip", "", "Flora, Adafactor: largest rms of an update; 0: off", at_least(0), fixed);
  v(o.no_factored, "no-factored", "", "Flora, Adafactor: full second moment instead of a factored one", S{}, fixed);
  v(o.scale_parameter, "scale-parameter", "", "Flora, Adafactor: learning rate times rms(weight)", S{}, fixed);
  v(o.relative_step, "relative-step", "", "Flora, Adafactor: lr = min(1e-2, 1/sqrt(t)) instead of lr and schedule", S{},
    fixed);
  v(o.warmup_init, "warmup-init", "", "with relative-step: lr = min(1e-6 t, 1/sqrt(t))", S{}, fixed);
  v(o.compress_embeddings, "compress-embeddings", "", "Flora: compress matrices of any aspect ratio, embeddings too",
    S{}, fixed);
  v.group("gradients");
  v(o.gradients, "gradients", "",
    "keep all (dense), update at once (fused, LOMO), or sum projections; default: fused for flora, else dense",
    S{"dense", "fused", "compressed"}, fixed);
  v(o.accumulation_rank, "accumulation-rank", "",
    "rank of gradients summed over micro-batches; default: 0 (not projected); compressed: rank", at_least(1), fixed);
  v(o.accumulation_dtype, "accumulation-dtype", "",
    "of gradients summed over micro-batches (bf16: rounded stochastically)", float_dtypes, fixed);
  v(o.clip_norm, "clip-norm", "",
    "largest global gradient norm, 0: off; fused needs two backward passes; default: 1 for dense adamw and sgd, else 0",
    at_least(0), fixed);
  v(o.skip_nonfinite, "skip-nonfinite", "", "skip an update with a non-finite loss instead of stopping", S{}, free);
  v(o.max_skips, "max-skips", "steps", "skip-nonfinite: stop after so many skipped updates in a row", at_least(1),
    free);
  v.group("memory");
  v(o.memory_budget, "memory-budget", "BYTES|auto",
    "choose the fastest micro-batch, recompute, head-chunk, gradient-blocks and offload that fit, among those not "
    "given; KiB MiB GiB TiB (or K M G T): powers of 1024, KB MB GB TB: of 1000, nothing: bytes; auto: what the device "
    "has free; plan without --model: the largest models that fit",
    S{}, free);
  v(o.recompute, "recompute", "", "activations computed again in the backward pass",
    S{"none", "gelu", "norms+gelu", "attention", "block"}, free);
  v(o.head_chunk, "head-chunk", "tokens", "tokens whose logits exist at a time; default: at most 512", at_least(1),
    fixed);
  v(o.gradient_blocks, "gradient-blocks", "",
    "gradients that are computed and used block by block, computed again for each pass of the update, instead of "
    "whole: of embedding and head, or of all large matrices (fused gradients, one micro-batch)",
    S{"whole", "embedding", "all"}, fixed);
  v(o.offload, "offload", "LIST",
    "what stays in host memory and visits the device layer by layer: none, or any of activations (what is kept for "
    "the backward pass), state (of the optimizer), weights (state comes along), with commas between",
    S{}, free);
  v(o.layers_in_flight, "layers-in-flight", "layers", "offload: layers that are on the device at a time", at_least(2),
    free);
  v(o.plan, "plan", "", "print the memory plan and exit", S{}, free);
  v(o.json, "json", "", "with plan: as JSON", S{}, free);
  v.group("run");
  v(o.steps, "steps", "steps", "updates to make in all", at_least(1), said);
  v(o.out, "out", "DIR", "checkpoints and metrics.jsonl; default: runs/<date and time>", S{}, free);
  v(o.resume, "resume", "DIR", "go on from a run's directory or one of its checkpoints", S{}, free);
  v(o.checkpoint_every, "checkpoint-every", "steps", "0: only at the end", at_least(0), free);
  v(o.keep_checkpoints, "keep-checkpoints", "", "how many of the newest to keep; 0: all", at_least(0), free);
  v(o.eval_every, "eval-every", "steps", "validation loss; 0: never", at_least(0), free);
  v(o.eval_batches, "eval-batches", "micro-batches",
    "of one validation; 0: all of the shards; default: 80 sequences on a CPU, 320 on a GPU, whatever the micro-batch; "
    "eval: all",
    at_least(0), free);
  v(o.sample_every, "sample-every", "steps", "print a sample of text; 0: never", at_least(0), free);
  v(o.sample_tokens, "sample-tokens", "tokens", "length of a sample", at_least(1), free);
  v(o.prompt, "prompt", "TEXT", "start of a sample; default: end-of-text", S{}, free);
  v(o.temperature, "temperature", "", "of sampling; 0: the likeliest token", at_least(0), free);
  v(o.top_k, "top-k", "tokens", "sample from the k likeliest; 0: from all", at_least(0), free);
  v(o.log_every, "log-every", "steps", "progress line; metrics.jsonl has every step", at_least(1), free);
  v.group("device");
  v(o.device, "device", "", "where to compute", S{"auto", "cpu", "cuda"}, free);
  v(o.threads, "threads", "",
    "CPU threads; 0: OMP_NUM_THREADS, else one per core; on resume those of the run, for identical bits",
    at_least(0, kMostThreads), free);
  v(o.tf32, "tf32", "", "CUDA: fp32 matmuls on tensor cores, inputs rounded to TF32", S{}, fixed);
  v(o.no_autotune, "no-autotune", "",
    "CUDA: cuBLASLt's first choice of a matmul algorithm instead of timing several at the start", S{}, free);
  v(o.no_cuda_graph, "no-cuda-graph", "", "CUDA: launch every kernel instead of replaying a recorded step", S{}, free);
  v(o.profile, "profile", "", "time, rate and share of every operation at the end", S{}, free);
  v(o.peak_tflops, "peak-tflops", "TFLOP/s", "of the device, for MFU; 0: measured at the start", at_least(0), free);
}
