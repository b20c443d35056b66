// budget.cpp: see budget.h.
#include "train/budget.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "train/memory_advice.h"
#include "train/memory_size.h"
#include "train/metrics.h"

namespace {

constexpr const char* kFlag = "memory-budget";

Freedom freedom_of(const RunSetup& setup, bool all) {
  const Options& asked = setup.request.options;
  const bool fresh = setup.request.checkpoint.empty();
  const auto open = [&](const char* flag) { return all || !asked.was_given(flag); };
  Freedom freedom;
  freedom.recompute = open("recompute");
  freedom.offload = open("offload");
  freedom.micro_batch = fresh && open("micro-batch");
  freedom.head_chunk = fresh && open("head-chunk");
  freedom.gradient_blocks = fresh && open("gradient-blocks");
  if (asked.tokens_per_step > 0) {
    freedom.sequences_per_step = asked.tokens_per_step / setup.options.seq_len;
  } else {
    // A micro-batch that was given is never made larger: without --tokens-per-step it is the whole step.
    freedom.largest_micro_batch =
        asked.was_given("micro-batch") ? setup.options.micro_batch : default_micro_batch(setup.request.device);
  }
  return freedom;
}

std::string timing(const Choice& choice, bool measured) {
  if (!measured) return "";
  char text[96];
  snprintf(text, sizeof text, ", predicted %.4g ms per step, %.4g tokens/s", 1e3 * choice.seconds,
           1 / choice.seconds_per_token());
  return text;
}

std::string described(const Choice& choice, bool measured) {
  std::string text = settings_flags(choice.config) + ": " + format_bytes(choice.device_bytes);
  if (choice.host_bytes > 0) text += " and " + format_bytes(choice.host_bytes) + " of host memory";
  return text + timing(choice, measured);
}

}  // namespace

MemoryLimit available_memory_limit(const Backend& backend) {
  return {backend.memory_available(), backend.host_memory_available(), backend.name() == "cpu"};
}

Budget find_budget(const Options& options, Backend& backend, bool for_run) {
  Budget budget;
  const bool automatic = options.memory_budget == "auto";
  const MemoryLimit now = available_memory_limit(backend);
  if (automatic) {
    if (now.device == 0) throw UsageError("--memory-budget auto asks a device that is not here: give it in bytes");
    budget.bytes = now.device;  // the backend has set its own part aside already
    budget.limit = now;
    return budget;
  }
  budget.bytes = parse_memory_size(kFlag, options.memory_budget);
  budget.set_aside = backend.runtime_bytes();
  if (budget.bytes <= budget.set_aside) {
    const bool bare = options.memory_budget.find_first_not_of("0123456789.") == std::string::npos;
    throw std::runtime_error("--memory-budget " + options.memory_budget + ": the runtime alone takes " +
                             std::to_string(budget.set_aside) + " bytes (" + format_bytes(budget.set_aside) +
                             "), the budget has " + std::to_string(budget.bytes) +
                             (bare ? "; did you mean " + options.memory_budget + "GiB?" : ""));
  }
  const size_t left = budget.bytes - budget.set_aside;
  if (for_run) {
    budget.limit = {std::min(left, now.device), now.shared ? std::min(left, now.host) : now.host, now.shared};
  } else {
    budget.limit = {left, now.shared ? left : SIZE_MAX, now.shared};
  }
  return budget;
}

Freedom freedom_left(const RunSetup& setup) { return freedom_of(setup, false); }
Freedom full_freedom(const RunSetup& setup) { return freedom_of(setup, true); }

RunSetup with_settings(const RunSetup& setup, const EngineConfig& choice) {
  RunRequest request = setup.request;
  Options& o = request.options;
  o.micro_batch = choice.shapes.batch;
  o.head_chunk = choice.shapes.head_chunk;
  o.recompute = recompute_name(choice.shapes.recompute);
  o.gradient_blocks = gradient_blocks_name(choice.gradients.blocks);
  o.offload = offload_name(choice.offload);
  return resolve(request);
}

std::string settings_flags(const EngineConfig& config) {
  return "--micro-batch " + std::to_string(config.shapes.batch) + " --recompute " +
         recompute_name(config.shapes.recompute) + " --head-chunk " + std::to_string(config.shapes.head_chunk) +
         " --gradient-blocks " + gradient_blocks_name(config.gradients.blocks) + " --offload " +
         offload_name(config.offload);
}

BudgetChoice choose_within_budget(const RunSetup& undecided, const Budget& budget, Backend& backend,
                                  const Speeds& speeds) {
  const Planner planner(backend, speeds);
  const std::vector<Choice> candidates = planner.candidates(undecided.engine, freedom_left(undecided));
  if (candidates.empty()) resolve(undecided.request);  // says what contradicts what
  const std::vector<Choice> found = planner.fitting(candidates, budget.limit, 2);
  if (found.empty()) throw std::runtime_error(budget_advice(undecided, budget, backend));
  BudgetChoice choice;
  choice.budget = budget;
  choice.setup = with_settings(undecided, found[0].config);
  choice.chosen = found[0];
  if (found.size() > 1) choice.runner_up = found[1];
  choice.measured = speeds.measured;
  return choice;
}

std::string budget_report(const BudgetChoice& choice) {
  const Budget& budget = choice.budget;
  std::string text = "budget      " + format_bytes(budget.bytes) + " (--memory-budget " +
                     choice.setup.options.memory_budget + "), " + format_bytes(budget.set_aside) +
                     " of it set aside for the runtime, " + format_bytes(budget.limit.device) + " for the plan\n";
  text += "chosen      " + described(choice.chosen, choice.measured) + "\n";
  text +=
      "runner-up   " + (choice.runner_up ? described(*choice.runner_up, choice.measured) : "nothing else fits") + "\n";
  if (!choice.measured) text += "speeds      not measured on this device: no step times\n";
  return text;
}

nlohmann::ordered_json budget_json(const BudgetChoice& choice) {
  const auto described = [&](const Choice& c) {
    nlohmann::ordered_json json = {
        {"flags", settings_flags(c.config)}, {"device_bytes", c.device_bytes}, {"host_bytes", c.host_bytes}};
    if (choice.measured) json["predicted_ms"] = 1e3 * c.seconds;
    return json;
  };
  nlohmann::ordered_json json = {{"bytes", choice.budget.bytes},
                                 {"set_aside", choice.budget.set_aside},
                                 {"for_plan", choice.budget.limit.device},
                                 {"chosen", described(choice.chosen)},
                                 {"runner_up", nullptr}};
  if (choice.runner_up) json["runner_up"] = described(*choice.runner_up);
  return json;
}
