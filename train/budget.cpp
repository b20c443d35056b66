// budget.cpp: see budget.h.
#include "train/budget.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "train/agreement.h"
#include "train/memory_advice.h"
#include "train/memory_size.h"
#include "train/metrics.h"

namespace {

constexpr const char* kFlag = "memory-budget";

std::string timing(const Candidate& candidate, bool measured) {
  if (!measured) return "";
  char text[96];
  snprintf(text, sizeof text, ", predicted %.4g ms per step, %.4g tokens/s", 1e3 * candidate.seconds,
           1 / candidate.seconds_per_token());
  return text;
}

// With these flags a run is planned as this one, on whatever device.
std::string flags_of(const Candidate& candidate) {
  return settings_flags(candidate.config) + (candidate.updates_in_turn ? " --no-update-overlap" : "");
}

std::string described(const Candidate& candidate, bool measured) {
  std::string text = flags_of(candidate) + ": " + format_bytes(candidate.device_bytes);
  if (candidate.host_bytes > 0) text += " and " + format_bytes(candidate.host_bytes) + " of host memory";
  return text + timing(candidate, measured);
}

// All ranks measure at the same time, as they will compute.
Rates rates_of_rank_0(Job& job, const Rates& mine) {
  char text[192];
  snprintf(text, sizeof text, "%d %d %a %a %a %a %a %a", mine.measured, mine.copies_overlap, mine.flops, mine.bytes,
           mine.transfer, mine.call, mine.wire, mine.tiles);
  const std::string first = from_rank_0(job, text);
  Rates rates;
  int measured = 0, overlap = 0;
  std::sscanf(first.c_str(), "%d %d %la %la %la %la %la %la", &measured, &overlap, &rates.flops, &rates.bytes,
              &rates.transfer, &rates.call, &rates.wire, &rates.tiles);
  rates.measured = measured != 0;
  rates.copies_overlap = overlap != 0;
  return rates;
}

// By how much the smallest candidate is too large, and what would fit.
std::string nothing_fits(const RunSetup& undecided, const Candidate& least, const Budget& budget, Backend& backend) {
  // Where it is the same memory, the host's part counts, too.
  const size_t need = least.device_bytes + (budget.limit.shared ? least.host_bytes : 0);
  std::string text = "--memory-budget " + undecided.options.memory_budget + " leaves " +
                     std::to_string(budget.limit.device) + " bytes for the plan; the smallest setting needs " +
                     std::to_string(need);
  if (need > budget.limit.device) {
    text += ", " + std::to_string(need - budget.limit.device) + " bytes more";
  } else {
    text += " and " + std::to_string(least.host_bytes) + " of host memory, where " + std::to_string(budget.limit.host) +
            " are free";
  }
  return text + "; " + advice_that_fits(undecided, budget.limit, backend);
}

// The same with updates beside the backward pass, where the options leave it open and the memory for it is within the
// limit. Not where nobody knows how much there is.
Candidate with_overlap(const Candidate& candidate, const Options& options, Backend& backend, const MemoryLimit& limit) {
  if (!options.overlap_updates || !can_overlap_updates(candidate.config, backend)) return candidate;
  Candidate beside = candidate;
  beside.config.overlap_updates = true;
  const MemoryPlan plan = Engine(beside.config, backend).plan();
  beside.device_bytes = plan.device_bytes();
  beside.host_bytes = plan.host_bytes();
  if (fits(beside.bytes(), limit)) return beside;
  Candidate in_turn = candidate;
  in_turn.updates_in_turn = true;
  return in_turn;
}

}  // namespace

Budget find_budget(const Options& options, Backend& backend, bool for_run, Job& job) {
  Budget budget;
  const bool automatic = options.memory_budget == "auto";
  const MemoryLimit now = available_memory_limit(backend, job);
  if (automatic) {
    if (now.device == 0) throw UsageError("--memory-budget auto asks a device that is not here: give it in bytes");
    budget.bytes = now.device;  // the backend has set its own part aside already
    budget.limit = now;
    return budget;
  }
  budget.bytes = parse_memory_size(kFlag, options.memory_budget);
  for (const std::string& bytes : job.gather(std::to_string(backend.runtime_bytes())))
    budget.set_aside = std::max<size_t>(budget.set_aside, std::stoull(bytes));
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

RunSetup with_settings(const RunSetup& setup, const EngineConfig& choice) {
  RunRequest request = setup.request;
  Options& o = request.options;
  o.set("micro-batch", o.engine.shapes.batch, choice.shapes.batch);
  o.set("head-chunk", o.engine.shapes.head_chunk, choice.shapes.head_chunk);
  o.set("recompute", o.engine.shapes.recompute, choice.shapes.recompute);
  o.set("gradient-blocks", o.engine.gradients.blocks, choice.gradients.blocks);
  o.set("offload", o.engine.offload, choice.offload);
  if (o.ranks > 1) o.set("shard", o.engine.spread, choice.spread);
  return resolve(request);
}

RunSetup resolve_for(const RunRequest& request, Backend& backend, Job& job) {
  RunSetup setup = resolve(request);
  if (backend.name() == "cpu") return setup;
  const MemoryLimit limit = available_memory_limit(backend, job);
  if (request.checkpoint.empty() && !request.options.was_given("head-chunk")) {
    RunRequest longer = request;
    longer.options.choose("head-chunk", longer.options.engine.shapes.head_chunk,
                          longest_head_chunk(setup.engine, limit, backend));
    setup = resolve(longer);
    setup.request = request;
  }
  setup.engine = with_overlap({.config = setup.engine}, setup.options, backend, limit).config;
  return setup;
}

BudgetChoice choose_within_budget(const RunRequest& request, Backend& backend, bool for_run, Job& job) {
  BudgetChoice choice;
  choice.budget = find_budget(request.options, backend, for_run, job);
  const RunSetup undecided = resolve(request, Undecided::kPlannersSettings);
  Rates rates = nominal_rates(undecided.engine, backend.name());
  if (for_run) {
    Options options = request.options;
    std::string why;
    rates = rates_of_rank_0(job, measure_rates(undecided.engine, *make_backend(options, why, device_place(job))));
  }
  const std::vector<Candidate> all = candidates(undecided.engine, search_space(undecided), rates, backend);
  if (all.empty()) resolve(request);  // says what contradicts what
  const MemoryLimit& limit = choice.budget.limit;
  const std::vector<Candidate> found = fitting(all, limit, 2, backend);
  if (found.empty())
    throw std::runtime_error(nothing_fits(undecided, *smallest(all, limit, backend), choice.budget, backend));
  choice.setup = with_settings(undecided, found[0].config);
  choice.chosen = with_overlap(found[0], request.options, backend, limit);
  choice.setup.engine.overlap_updates = choice.chosen.config.overlap_updates;
  if (found.size() > 1) choice.runner_up = with_overlap(found[1], request.options, backend, limit);
  choice.measured = rates.measured;
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
  if (!choice.measured) text += "rates       not measured on this device: no step times\n";
  return text;
}

nlohmann::ordered_json budget_json(const BudgetChoice& choice) {
  const auto described = [&](const Candidate& c) {
    nlohmann::ordered_json json = {
        {"flags", flags_of(c)}, {"device_bytes", c.device_bytes}, {"host_bytes", c.host_bytes}};
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
