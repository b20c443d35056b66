// options.cpp: options as JSON, the check on resume, and the checks that need nothing but the options themselves.
#include "train/options.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <sstream>
#include <type_traits>

#include "kernels/cpu/machine.h"
#include "train/memory_size.h"

namespace {

std::string underscored(std::string flag) {
  std::replace(flag.begin(), flag.end(), '-', '_');
  return flag;
}

struct ToJson {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  void group(const char*) {}
  template <typename T>
  void operator()(T& field, const char* flag, const char*, const char*, const std::vector<std::string>&, OnResume) {
    json[underscored(flag)] = field;
  }
};

// Whether a value is of the type of an option; the JSON library itself would cut 300.7 to 300 and take true for 1.
template <typename T>
bool holds(const nlohmann::json& value) {
  if constexpr (std::is_same_v<T, bool>) return value.is_boolean();
  if constexpr (std::is_same_v<T, std::string>) return value.is_string();
  if constexpr (std::is_same_v<T, double>) return value.is_number();
  return value.is_number_integer() && (!value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX);
}

struct FromJson {
  const nlohmann::json& saved;
  const Options& options;
  Restored found = {};
  std::vector<std::string> keys = {};  // all that there are
  void group(const char*) {}
  template <typename T>
  void operator()(T& field, const char* flag, const char*, const char*, const std::vector<std::string>& choices,
                  OnResume on_resume) {
    const std::string key = underscored(flag);
    keys.push_back(key);
    if (!saved.contains(key)) {
      if (!options.was_given(flag)) found.missing.emplace_back(flag);
      return;
    }
    if (!holds<T>(saved[key])) {
      throw std::runtime_error("the checkpoint's option '" + key + "' has the wrong type; the file is damaged");
    }
    const T value = saved[key].get<T>();
    if constexpr (std::is_same_v<T, std::string>) {
      // `field` is the default, or what is asked for: both are choices, or "" where one is made later.
      if (value != field && !choices.empty() && std::find(choices.begin(), choices.end(), value) == choices.end()) {
        throw std::runtime_error("the checkpoint's option '" + key + "' is '" + value + "'; the file is damaged");
      }
    }
    const nlohmann::json given = field;
    if (!options.was_given(flag)) {
      field = value;
    } else if (on_resume == OnResume::kMayChangeTraining && field != value) {
      found.changes.push_back(std::string(flag) + " was " + saved[key].dump() + ", is now " + given.dump());
    } else if (on_resume == OnResume::kFixed && field != value) {
      throw UsageError(std::string("--") + flag + " " + given.dump() + " contradicts the checkpoint, which has " +
                       saved[key].dump() + "; it cannot change on resume: leave the flag out, or start a new run");
    }
  }
};

// Sizes and counts are multiplied with each other, and positions on the device are 32 bits wide. Fractions become fp32,
// where one that is 0 or 1 by rounding would switch off what it scales.
struct RefuseNumbersOutOfRange {
  void group(const char*) {}
  template <typename T>
  void operator()(T& field, const char* flag, const char*, const char*, const std::vector<std::string>&, OnResume) {
    if constexpr (std::is_same_v<T, int64_t>) {
      const std::string name = flag;
      const int64_t most = name == "seed" ? INT64_MAX : name == "threads" ? kMostThreads : INT32_MAX;
      if (field > most) throw UsageError("--" + name + " must be at most " + std::to_string(most));
    }
    if constexpr (std::is_same_v<T, double>) {
      const auto refuse = [&](const std::string& why) {
        char text[32];
        snprintf(text, sizeof text, "%.17g", field);
        throw UsageError(std::string("--") + flag + " " + text + " " + why);
      };
      if (!std::isfinite(field)) throw UsageError(std::string("--") + flag + " must be a finite number");
      if (std::abs(field) > FLT_MAX) refuse("is more than fp32 holds");
      if (field != 0 && std::abs(field) < FLT_MIN) refuse("is less than fp32 holds: it would be 0");
      if (field != 1 && static_cast<float>(field) == 1.0f) refuse("would be 1 in fp32");
    }
  }
};

void at_least(double value, double least, const char* flag) {
  if (!(value >= least)) {
    std::string bound = std::to_string(static_cast<int64_t>(least));
    throw UsageError(std::string("--") + flag + " must be at least " + bound);
  }
}

void fraction(double value, const char* flag) {
  if (!(value >= 0.0 && value < 1.0)) throw UsageError(std::string("--") + flag + " must be at least 0 and below 1");
}

void check_offload(const std::string& offload) {
  std::istringstream list(offload);
  for (std::string what; std::getline(list, what, ',');) {
    if (what != "activations" && what != "state" && what != "weights" && (what != "none" || offload != "none")) {
      throw UsageError("--offload " + offload + ": '" + what +
                       "' is none of activations, state, weights; or leave it at none");
    }
  }
  if (!offload.empty() && offload.back() == ',') throw UsageError("--offload " + offload + ": nothing after the comma");
  if (offload.empty()) throw UsageError("--offload needs a value: none, or activations,state,weights");
}

}  // namespace

bool Options::was_given(const std::string& flag) const {
  return std::find(given.begin(), given.end(), flag) != given.end();
}

nlohmann::ordered_json options_to_json(const Options& options) {
  ToJson visitor;
  Options copy = options;
  describe(copy, visitor);
  return visitor.json;
}

Restored restore_options(Options& options, const nlohmann::json& saved) {
  const Options before = options;
  FromJson visitor{saved, before};
  describe(options, visitor);
  for (const auto& [key, value] : saved.items()) {
    if (std::find(visitor.keys.begin(), visitor.keys.end(), key) == visitor.keys.end()) {
      throw std::runtime_error("the checkpoint's option '" + key +
                               "' is not known; the file is damaged, or of a newer version");
    }
  }
  // What is asked for now is never what the earlier call asked for.
  options.plan = before.plan;
  options.json = before.json;
  options.profile = before.profile;
  options.memory_budget = before.memory_budget;  // what it led to is in the other options
  options.resume = before.resume;
  return visitor.found;
}

void check_options(const Options& o) {
  Options copy = o;
  RefuseNumbersOutOfRange bounds;
  describe(copy, bounds);
  at_least(static_cast<double>(o.seq_len), o.was_given("seq-len") ? 1 : 0, "seq-len");
  at_least(static_cast<double>(o.micro_batch), o.was_given("micro-batch") ? 1 : 0, "micro-batch");
  at_least(static_cast<double>(o.tokens_per_step), o.was_given("tokens-per-step") ? 1 : 0, "tokens-per-step");
  at_least(static_cast<double>(o.head_chunk), o.was_given("head-chunk") ? 1 : 0, "head-chunk");
  at_least(static_cast<double>(o.layers_in_flight), 2, "layers-in-flight");
  check_offload(o.offload);
  if (!o.memory_budget.empty() && o.memory_budget != "auto") parse_memory_size("memory-budget", o.memory_budget);
  if (o.memory_budget.empty() && o.was_given("memory-budget")) throw UsageError("--memory-budget needs a value");
  at_least(static_cast<double>(o.rank), 1, "rank");
  at_least(static_cast<double>(o.kappa), 1, "kappa");
  at_least(static_cast<double>(o.accumulation_rank), o.was_given("accumulation-rank") ? 1 : 0, "accumulation-rank");
  at_least(static_cast<double>(o.steps), 1, "steps");
  at_least(static_cast<double>(o.checkpoint_every), 0, "checkpoint-every");
  at_least(static_cast<double>(o.keep_checkpoints), 0, "keep-checkpoints");
  at_least(static_cast<double>(o.eval_every), 0, "eval-every");
  at_least(static_cast<double>(o.eval_batches), o.was_given("eval-batches") ? 0 : -1, "eval-batches");
  at_least(static_cast<double>(o.vocab_size), o.was_given("vocab-size") ? 1 : 0, "vocab-size");
  at_least(static_cast<double>(o.sample_every), 0, "sample-every");
  at_least(static_cast<double>(o.sample_tokens), 1, "sample-tokens");
  at_least(static_cast<double>(o.log_every), 1, "log-every");
  at_least(static_cast<double>(o.max_skips), 1, "max-skips");
  at_least(static_cast<double>(o.threads), 0, "threads");
  at_least(static_cast<double>(o.seed), 0, "seed");
  at_least(static_cast<double>(o.top_k), 0, "top-k");
  at_least(o.temperature, 0, "temperature");
  at_least(o.final_lr, 0, "final-lr");
  at_least(o.update_clip, 0, "update-clip");
  at_least(o.peak_tflops, 0, "peak-tflops");
  at_least(o.eps, 0, "eps");
  at_least(o.eps1, 0, "eps1");
  at_least(o.eps2, 0, "eps2");
  if (o.was_given("lr") && !(o.lr > 0)) throw UsageError("--lr must be above 0");
  if (o.was_given("warmup-steps")) at_least(static_cast<double>(o.warmup_steps), 0, "warmup-steps");
  if (o.was_given("cooldown-steps")) at_least(static_cast<double>(o.cooldown_steps), 0, "cooldown-steps");
  if (o.was_given("weight-decay")) at_least(o.weight_decay, 0, "weight-decay");
  if (o.was_given("clip-norm")) at_least(o.clip_norm, 0, "clip-norm");
  if (o.was_given("beta1")) fraction(o.beta1, "beta1");
  fraction(o.beta2, "beta2");
  if (!(o.decay_rate < 0)) throw UsageError("--decay-rate must be below 0");

  // Flags that say nothing, or two different things, together.
  const auto only_for = [&](std::initializer_list<const char*> flags, bool applies, const std::string& needs) {
    for (const char* flag : flags) {
      if (o.was_given(flag) && !applies) throw UsageError(std::string("--") + flag + " contradicts " + needs);
    }
  };
  const bool flora = o.optimizer == "flora", adaptive = flora || o.optimizer == "adafactor";
  const std::string optimizer = "--optimizer " + o.optimizer;
  only_for({"rank", "kappa", "projection", "transfer", "compress-embeddings"},
           flora || o.gradients == "compressed" || o.accumulation_rank > 0, optimizer);
  only_for({"kappa", "transfer"}, flora, optimizer);
  only_for(
      {"decay-rate", "eps1", "eps2", "update-clip", "no-factored", "scale-parameter", "relative-step", "warmup-init"},
      adaptive, optimizer);
  only_for({"beta2", "eps"}, o.optimizer == "adamw", optimizer);
  only_for({"warmup-init"}, o.relative_step, "the absence of --relative-step");
  only_for({"lr", "schedule", "warmup-steps", "final-lr"}, !o.relative_step,
           "--relative-step, which has its own schedule");
  only_for({"cooldown-steps"}, o.schedule == "wsd", "--schedule " + o.schedule);
  only_for({"max-skips"}, o.skip_nonfinite, "the absence of --skip-nonfinite");
  only_for({"accumulation-rank"}, o.gradients != "dense", "--gradients dense");
  only_for({"layers-in-flight"}, o.offload != "none" || !o.memory_budget.empty(), "--offload none");
  const std::string weights = o.weight_dtype.empty() ? o.dtype : o.weight_dtype;
  if (o.master_weights == "fp32" && (weights == "fp32" || weights == "int8"))
    throw UsageError("--master-weights fp32 contradicts " + weights + " weights");
  only_for({"json"}, o.plan, "the absence of --plan");
  if (o.plan && !o.resume.empty()) throw UsageError("--plan contradicts --resume: a plan needs no checkpoint");
}
