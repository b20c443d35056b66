// memory_advice.cpp: see memory_advice.h. Every suggestion is resolved and planned as if the user had made it.
#include "train/memory_advice.h"

#include <algorithm>

#include "train/metrics.h"

namespace {

// A request with flags added, as the user would append them.
struct Suggestion {
  RunRequest request;
  std::string flags;
  bool fewer_tokens = false;  // a step may have fewer than were asked for

  Options& options() { return request.options; }
  template <typename T, size_t N>
  void set(const std::string& flag, T& option, T value, const std::pair<T, const char*> (&names)[N]) {
    if (option == value) return;
    option = value;
    flags += " --" + flag + " " + name_of(names, value);
    options().given.push_back(flag);
  }
};

void use_flora(Suggestion& s) {
  Options& o = s.options();
  s.set("optimizer", o.engine.optimizer.kind, OptimizerKind::kFlora, kOptimizerNames);
  if (!o.is_open("gradients")) s.set("gradients", o.engine.gradients.kind, GradientMode::kFused, kGradientModeNames);
  s.set("master-weights", o.engine.master_weights, false, kMasterWeightsNames);
}

void use_8bit_states(Suggestion& s) {
  s.set("state-dtype", s.options().engine.optimizer.state_dtype, DType::kI8, kDtypeNames);
}

void use_8bit_weights(Suggestion& s) {
  s.set("weight-dtype", s.options().engine.weight_dtype, DType::kI8, kDtypeNames);
  s.set("master-weights", s.options().engine.master_weights, false, kMasterWeightsNames);
}

std::string changed_settings(const EngineConfig& from, const EngineConfig& to) {
  std::string flags;
  const int64_t chunk = std::min(from.shapes.head_chunk, to.shapes.batch * to.shapes.sequence);  // as it follows
  const auto add = [&](const char* flag, const auto& before, const auto& now, const std::string& value) {
    if (before != now) flags += std::string(" --") + flag + " " + value;
  };
  add("micro-batch", from.shapes.batch, to.shapes.batch, std::to_string(to.shapes.batch));
  add("head-chunk", chunk, to.shapes.head_chunk, std::to_string(to.shapes.head_chunk));
  add("recompute", from.shapes.recompute, to.shapes.recompute, name_of(kRecomputeNames, to.shapes.recompute));
  add("gradient-blocks", from.gradients.blocks, to.gradients.blocks,
      name_of(kGradientBlocksNames, to.gradients.blocks));
  add("shard", from.spread, to.spread, name_of(kSpreadNames, to.spread));
  add("offload", offload_name(from.offload), offload_name(to.offload), offload_name(to.offload));
  return flags;
}

// The fastest setting of the suggestion that fits, in words; empty when none does or flags contradict each other.
std::string words_for(const Suggestion& suggestion, const MemoryLimit& limit, Backend& backend) {
  RunSetup setup;
  try {
    setup = resolve(suggestion.request, Undecided::kPlannersSettings);
  } catch (const UsageError&) {
    return "";
  }
  const SearchSpace all = search_space(setup, true);
  const Rates rates = nominal_rates(setup.engine, backend.name());
  std::vector<Candidate> found;
  // The head's chunk seldom decides, so it is left alone where it can be.
  for (const bool chunk : {false, true}) {
    SearchSpace space = all;
    space.head_chunk = all.head_chunk && chunk;
    if (found.empty()) found = fitting(candidates(setup.engine, space, rates, backend), limit, 1, backend);
  }
  if (found.empty()) return "";
  std::string text = "with" + suggestion.flags + changed_settings(setup.engine, found[0].config);
  if (suggestion.fewer_tokens) text += " --tokens-per-step " + std::to_string(tokens_per_step(found[0].config));
  text += " it needs " + format_bytes(found[0].device_bytes);
  if (found[0].host_bytes > 0) text += " and " + format_bytes(found[0].host_bytes) + " of host memory";
  return text;
}

}  // namespace

std::string advice_that_fits(const RunSetup& setup, const MemoryLimit& limit, Backend& backend) {
  Suggestion suggestion{setup.request, "", false};
  const bool resumed = !setup.request.checkpoint.empty();
  for (const auto change : {+[](Suggestion&) {}, use_flora, use_8bit_states, use_8bit_weights}) {
    Suggestion changed = suggestion;
    change(changed);
    try {
      resolve(changed.request, Undecided::kPlannersSettings);
    } catch (const UsageError&) {
      continue;  // contradicts something that was given
    }
    suggestion = changed;
    std::string words = words_for(suggestion, limit, backend);
    if (words.empty() && resumed) return "no setting that may change on resume makes it fit";
    if (words.empty() && changed.options().was_given("tokens-per-step")) {
      changed.fewer_tokens = true;
      std::erase(changed.options().given, "tokens-per-step");
      words = words_for(changed, limit, backend);
    }
    if (!words.empty()) return words;
  }
  return "no setting of this model fits, a smaller --model is needed";
}

std::string memory_advice(const RunSetup& setup, const MemoryLimit& limit, Backend& backend) {
  const MemoryPlan plan = Engine(setup.engine, backend).plan();
  std::string text = "out of memory: the plan is " + format_bytes(plan.device_bytes()) + " (";
  const std::vector<size_t> categories = plan.bytes_by_category();
  for (int i = 0; i < kCategoryCount; ++i) {
    text += (i > 0 ? ", " : "") + std::string(category_name(static_cast<Category>(i))) + " " +
            format_bytes(categories[static_cast<size_t>(i)]);
  }
  text += "), " + format_bytes(limit.device) + " are free";
  if (plan.device_bytes() <= limit.device) {
    text = "out of host memory: the plan takes " + format_bytes(plan.host_bytes()) + " of it";
    if (limit.shared) text += " beside " + format_bytes(plan.device_bytes()) + " for the device, which is the same";
    text += ", " + format_bytes(limit.host) + " are free";
  }
  return text + "; " + advice_that_fits(setup, limit, backend);
}
