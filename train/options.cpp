// options.cpp: options as JSON, the check on resume, and the checks that need nothing but the options themselves.
#include "train/options.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <type_traits>

#include "train/memory_size.h"
#include "train/option_json.h"

namespace {

struct ToJson {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  void group(const char*) {}
  template <typename T, typename Values>
  void operator()(T& field, const char* flag, const char*, const char*, const Values& values, OnResume) {
    json[json_key(flag)] = written(field, values);
  }
};

struct FromJson {
  const nlohmann::json& saved;
  Options& options;
  Restored found = {};
  std::vector<std::string> keys = {};  // all that there are
  void group(const char*) {}
  template <typename T, typename Values>
  void operator()(T& field, const char* flag, const char*, const char*, const Values& values, OnResume on_resume) {
    const std::string key = json_key(flag);
    keys.push_back(key);
    const bool given = options.was_given(flag);
    if (!saved.contains(key)) {
      if (!given) found.missing.emplace_back(flag);
      return;
    }
    const nlohmann::json now = written(field, values);
    bool same = saved[key] == now;
    if constexpr (std::is_same_v<T, float>) same = saved[key].is_number() && saved[key].get<T>() == field;
    if (!given) {
      T value = field;
      if (!same) read_saved(value, key, saved[key], values);  // a default need not be what a flag takes
      options.set(flag, field, value);
    } else if (on_resume == OnResume::kMayChangeTraining && !same) {
      found.changes.push_back(std::string(flag) + " was " + saved[key].dump() + ", is now " + now.dump());
    } else if (on_resume == OnResume::kFixed && !same) {
      throw UsageError(std::string("--") + flag + " " + now.dump() + " contradicts the checkpoint, which has " +
                       saved[key].dump() + "; it cannot change on resume: leave the flag out, or start a new run");
    }
  }

  template <typename T, typename Values>
  static void read_saved(T& value, const std::string& key, const nlohmann::json& saved, const Values& values) {
    const std::string damaged = "; the file is damaged, or of another version",
                      option = "the checkpoint's option '" + key + "' ";
    const std::string text = saved.is_string() ? saved.get<std::string>() : saved.dump();
    const bool is_switch = std::is_same_v<Values, Switch>, is_number = std::is_same_v<Values, Range>;
    if (saved.is_boolean() != is_switch || saved.is_number() != is_number) {
      throw std::runtime_error(option + "has the wrong type" + damaged);
    }
    try {
      read(value, key, text, values);
    } catch (const UsageError&) {
      throw std::runtime_error(option + "is " + (saved.is_string() ? "'" + text + "'" : text) + damaged);
    }
  }
};

}  // namespace

std::string json_key(std::string flag) {
  std::replace(flag.begin(), flag.end(), '-', '_');
  return flag;
}

bool Options::was_given(const std::string& flag) const {
  return std::find(given.begin(), given.end(), flag) != given.end();
}

bool Options::is_open(const std::string& flag) const {
  return !was_given(flag) && std::find(settled.begin(), settled.end(), flag) == settled.end();
}

nlohmann::ordered_json options_to_json(const Options& options) {
  ToJson visitor;
  Options copy = options;
  describe(copy, visitor);
  return visitor.json;
}

Restored restore_options(Options& options, const nlohmann::json& saved) {
  const Options before = options;
  FromJson visitor{saved, options};
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
  options.devices = before.devices;
  return visitor.found;
}

void check_options(const Options& o) {
  if (!o.memory_budget.empty() && o.memory_budget != "auto") parse_memory_size("memory-budget", o.memory_budget);

  // Flags that say nothing, or two different things, together.
  const auto only_for = [&](std::initializer_list<const char*> flags, bool applies, const std::string& needs) {
    for (const char* flag : flags) {
      if (o.was_given(flag) && !applies) throw UsageError(std::string("--") + flag + " contradicts " + needs);
    }
  };
  const EngineConfig& engine = o.engine;
  const OptimizerKind kind = engine.optimizer.kind;
  const GradientMode gradients = engine.gradients.kind;
  const bool flora = kind == OptimizerKind::kFlora, adaptive = flora || kind == OptimizerKind::kAdafactor;
  const std::string optimizer = "--optimizer " + name_of(kOptimizerNames, kind);
  only_for({"rank", "kappa", "projection", "transfer", "compress-embeddings"},
           flora || gradients == GradientMode::kCompressed || engine.gradients.accumulation_rank > 0, optimizer);
  only_for({"kappa", "transfer", "residual"}, flora, optimizer);
  only_for({"compress-embeddings"},
           engine.optimizer.embedding_momentum || engine.gradients.accumulation_rank > 0 ||
               gradients == GradientMode::kCompressed,
           "--embedding-momentum=false");
  only_for({"embedding-momentum", "decay-rate", "eps1", "eps2", "update-clip", "no-factored", "scale-parameter",
            "relative-step", "warmup-init"},
           adaptive, optimizer);
  only_for({"beta2", "eps"}, kind == OptimizerKind::kAdamW, optimizer);
  only_for({"half-life"}, kind != OptimizerKind::kSgd, optimizer);
  only_for({"beta2"}, engine.optimizer.half_life == 0, "--half-life, which gives it");
  if (engine.optimizer.residual && !has_orthonormal_rows(engine.optimizer.projection)) {
    throw UsageError("--residual contradicts --projection " + name_of(kProjectionNames, engine.optimizer.projection) +
                     "; it needs cosine");
  }
  only_for({"warmup-init"}, engine.optimizer.relative_step, "the absence of --relative-step");
  only_for({"lr", "schedule", "warmup-steps", "final-lr"}, !engine.optimizer.relative_step,
           "--relative-step, which has its own schedule");
  only_for({"cooldown-steps"}, o.schedule.kind == ScheduleKind::kWsd,
           "--schedule " + name_of(kScheduleNames, o.schedule.kind));
  only_for({"max-skips"}, o.skip_nonfinite, "the absence of --skip-nonfinite");
  only_for({"accumulation-rank"}, gradients != GradientMode::kDense, "--gradients dense");
  const bool spread = engine.spread != Spread::kNone;
  only_for({"layers-in-flight"}, offload_name(engine.offload) != "none" || spread || !o.memory_budget.empty(),
           "--offload none");
  if (spread && (engine.offload.state || engine.offload.weights)) {
    throw UsageError(
        "--shard weights contradicts --offload " + offload_name(engine.offload) +
        ": weights and states are with the processes or in host memory; --offload activations goes with it");
  }
  const DType weights = o.is_open("weight-dtype") ? o.dtype : engine.weight_dtype;
  const bool known = !o.is_open("weight-dtype") || !o.is_open("dtype");
  if (engine.master_weights && known && weights != DType::kBF16) {
    throw UsageError(std::string("--master-weights fp32 contradicts ") + dtype_name(weights) + " weights");
  }
  only_for({"json"}, o.plan, "the absence of --plan");
  if (o.plan && !o.resume.empty()) throw UsageError("--plan contradicts --resume: a plan needs no checkpoint");
}
