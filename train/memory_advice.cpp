// memory_advice.cpp: see memory_advice.h. Every suggestion is resolved and planned as if the user had made it.
#include "train/memory_advice.h"

#include <functional>
#include <optional>
#include <vector>

#include "train/metrics.h"

namespace {

// Flags added to a request, as the user would append them.
struct Suggestion {
  RunRequest request;
  std::string flags;

  void add(const std::string& flag, const std::string& value) {
    flags += " --" + flag + " " + value;
    if (!request.options.was_given(flag)) request.options.given.push_back(flag);
  }
};

// The settings of a choice that the request would not have by itself.
std::string missing_flags(RunRequest request, const EngineConfig& choice) {
  Suggestion s{std::move(request), ""};
  Options& o = s.request.options;
  EngineConfig now = resolve(s.request, Undecided::kPlannersSettings).engine;
  if (now.shapes.batch != choice.shapes.batch) {
    o.micro_batch = choice.shapes.batch;
    s.add("micro-batch", std::to_string(o.micro_batch));
    now = resolve(s.request, Undecided::kPlannersSettings).engine;
  }
  if (now.shapes.head_chunk != choice.shapes.head_chunk) s.add("head-chunk", std::to_string(choice.shapes.head_chunk));
  if (now.shapes.recompute != choice.shapes.recompute) s.add("recompute", recompute_name(choice.shapes.recompute));
  if (now.gradients.blocks != choice.gradients.blocks)
    s.add("gradient-blocks", gradient_blocks_name(choice.gradients.blocks));
  if (offload_name(now.offload) != offload_name(choice.offload)) s.add("offload", offload_name(choice.offload));
  return s.flags;
}

// The fastest setting of the request that fits, as flags; nothing when none does or flags contradict each other.
std::optional<std::string> flags_that_fit(const Suggestion& suggestion, const MemoryLimit& limit, Backend& backend,
                                          Choice& choice) {
  try {
    const RunSetup setup = resolve(suggestion.request, Undecided::kPlannersSettings);
    const Planner planner(backend, nominal_speeds(setup.engine, backend.name()));
    // The head's chunk seldom decides, so it is left alone where it can be.
    std::vector<Choice> found;
    for (const bool chunk : {false, true}) {
      Freedom freedom = full_freedom(setup);
      freedom.head_chunk = freedom.head_chunk && chunk;
      if (found.empty()) found = planner.fitting(planner.candidates(setup.engine, freedom), limit, 1);
    }
    if (found.empty()) return std::nullopt;
    choice = found[0];
    std::string flags = suggestion.flags + missing_flags(suggestion.request, choice.config);
    // A step of fewer tokens than were asked for is part of the suggestion.
    if (suggestion.request.options.tokens_per_step == 0 && suggestion.request.options.was_given("tokens-per-step"))
      flags += " --tokens-per-step " + std::to_string(tokens_per_step(choice.config));
    return flags;
  } catch (const UsageError&) {
    return std::nullopt;
  }
}

void use_flora(Suggestion& s) {
  Options& o = s.request.options;
  if (o.optimizer != "flora") s.add("optimizer", o.optimizer = "flora");
  if (resolve(s.request, Undecided::kPlannersSettings).options.gradients != "fused")
    s.add("gradients", o.gradients = "fused");
  if (o.master_weights == "fp32") s.add("master-weights", o.master_weights = "none");
}

void use_8bit_states(Suggestion& s) {
  if (s.request.options.state_dtype != "int8") s.add("state-dtype", s.request.options.state_dtype = "int8");
}

void use_8bit_weights(Suggestion& s) {
  Options& o = s.request.options;
  if (o.weight_dtype != "int8") s.add("weight-dtype", o.weight_dtype = "int8");
  if (o.master_weights == "fp32") s.add("master-weights", o.master_weights = "none");
}

// What makes the run fit, from cheap to drastic, and the bytes it then takes.
std::string advice(const RunSetup& setup, const MemoryLimit& limit, Backend& backend) {
  Suggestion suggestion{setup.request, ""};
  const auto tried = [&](const Suggestion& s) -> std::string {
    Choice choice;
    const std::optional<std::string> flags = flags_that_fit(s, limit, backend, choice);
    if (!flags) return "";
    std::string text = "with" + *flags + " it needs " + format_bytes(choice.device_bytes);
    if (choice.host_bytes > 0) text += " and " + format_bytes(choice.host_bytes) + " of host memory";
    return text;
  };
  std::string found = tried(suggestion);
  const bool resumed = !setup.request.checkpoint.empty();
  if (found.empty() && resumed) return "no setting that may change on resume makes it fit";
  const std::function<void(Suggestion&)> changes[] = {[](Suggestion&) {}, use_flora, use_8bit_states, use_8bit_weights};
  for (const auto& change : changes) {
    if (!found.empty()) return found;
    Suggestion changed = suggestion;
    try {
      change(changed);
      resolve(changed.request, Undecided::kPlannersSettings);
    } catch (const UsageError&) {
      continue;  // contradicts something that was given
    }
    suggestion = changed;
    found = tried(suggestion);
    if (!found.empty() || suggestion.request.options.tokens_per_step == 0) continue;
    changed.request.options.tokens_per_step = 0;
    found = tried(changed);
  }
  return !found.empty() ? found : "no setting of this model fits, a smaller --model is needed";
}

}  // namespace

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
  return text + "; " + advice(setup, limit, backend);
}

std::string budget_advice(const RunSetup& undecided, const Budget& budget, Backend& backend) {
  const Planner planner(backend, nominal_speeds(undecided.engine, backend.name()));
  const std::optional<Choice> least =
      planner.smallest(planner.candidates(undecided.engine, freedom_left(undecided)), budget.limit);
  // Where it is the same memory, the host's part counts, too.
  const size_t need = least->device_bytes + (budget.limit.shared ? least->host_bytes : 0);
  std::string text = "--memory-budget " + undecided.options.memory_budget + " leaves " +
                     std::to_string(budget.limit.device) + " bytes for the plan; the smallest setting needs " +
                     std::to_string(need);
  if (need > budget.limit.device) {
    text += ", " + std::to_string(need - budget.limit.device) + " bytes more";
  } else {
    text += " and " + std::to_string(least->host_bytes) + " of host memory, where " +
            std::to_string(budget.limit.host) + " are free";
  }
  return text + "; " + advice(undecided, budget.limit, backend);
}
