// options.cpp: options as JSON, the check on resume, and the checks that need nothing but the options themselves.
#include "train/options.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <sstream>
#include <type_traits>

#include "train/memory_size.h"

namespace {

std::string underscored(std::string flag) {
  std::replace(flag.begin(), flag.end(), '-', '_');
  return flag;
}

struct ToJson {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  void group(const char*) {}
  template <typename T, typename Values>
  void operator()(T& field, const char* flag, const char*, const char*, const Values&, OnResume) {
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

bool is_legal(const std::string&, bool, const std::vector<std::string>&) { return true; }
bool is_legal(const std::string&, const std::string& value, const std::vector<std::string>& choices) {
  return choices.empty() || std::find(choices.begin(), choices.end(), value) != choices.end();
}
template <typename T>
bool is_legal(const std::string& flag, T value, const Range& range) {
  try {
    check_range(flag, value, range);
    return true;
  } catch (const UsageError&) {
    return false;
  }
}

std::string shown(const nlohmann::json& value) {
  return value.is_string() ? "'" + value.get<std::string>() + "'" : value.dump();
}

struct FromJson {
  const nlohmann::json& saved;
  const Options& options;
  Restored found = {};
  std::vector<std::string> keys = {};  // all that there are
  void group(const char*) {}
  template <typename T, typename Values>
  void operator()(T& field, const char* flag, const char*, const char*, const Values& values, OnResume on_resume) {
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
    const nlohmann::json given = field;
    if (!options.was_given(flag)) {
      // The default is legal, or means that a value is chosen later.
      if (value != field && !is_legal(flag, value, values)) {
        throw std::runtime_error("the checkpoint's option '" + key + "' is " + shown(saved[key]) +
                                 "; the file is damaged");
      }
      field = value;
    } else if (on_resume == OnResume::kMayChangeTraining && field != value) {
      found.changes.push_back(std::string(flag) + " was " + saved[key].dump() + ", is now " + given.dump());
    } else if (on_resume == OnResume::kFixed && field != value) {
      throw UsageError(std::string("--") + flag + " " + given.dump() + " contradicts the checkpoint, which has " +
                       saved[key].dump() + "; it cannot change on resume: leave the flag out, or start a new run");
    }
  }
};

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

void check_range(const std::string& flag, int64_t value, const Range& range) {
  const auto least = static_cast<int64_t>(range.least);
  if (value < least) throw UsageError("--" + flag + " must be at least " + std::to_string(least));
  if (value > range.most) throw UsageError("--" + flag + " must be at most " + std::to_string(range.most));
}

void check_range(const std::string& flag, double value, const Range& range) {
  const auto refuse = [&](const std::string& why) { throw UsageError("--" + flag + " " + why); };
  char text[32];
  snprintf(text, sizeof text, "%.17g ", value);
  if (!std::isfinite(value)) refuse("must be a finite number");
  if (std::abs(value) > FLT_MAX) refuse(std::string(text) + "is more than fp32 holds");
  if (value != 0 && std::abs(value) < FLT_MIN) refuse(std::string(text) + "is less than fp32 holds: it would be 0");
  if (value != 1 && static_cast<float>(value) == 1.0f) refuse(std::string(text) + "would be 1 in fp32");
  const bool too_small = value < range.least || (value == range.least && !range.least_itself);
  if (!too_small && value < range.below) return;
  std::string bounds;
  snprintf(text, sizeof text, "%g", range.least);
  if (std::isfinite(range.least)) bounds = std::string(range.least_itself ? "at least " : "above ") + text;
  snprintf(text, sizeof text, "%g", range.below);
  if (std::isfinite(range.below)) bounds += std::string(bounds.empty() ? "" : " and ") + "below " + text;
  refuse("must be " + bounds);
}

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
  check_offload(o.offload);
  if (!o.memory_budget.empty() && o.memory_budget != "auto") parse_memory_size("memory-budget", o.memory_budget);
  if (o.memory_budget.empty() && o.was_given("memory-budget")) throw UsageError("--memory-budget needs a value");

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
