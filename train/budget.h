// budget.h: --memory-budget: what the user asked for, what the planner may choose, and the run that follows from its
// choice.
#pragma once

#include <optional>
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "train/planner.h"
#include "train/run_setup.h"

struct Budget {
  size_t bytes = 0;      // as asked for; auto: what the device has free
  size_t set_aside = 0;  // of them, for what the runtime takes beside the plan
  MemoryLimit limit;     // for a plan
};

// What the device and the machine have now, for a run without a budget.
MemoryLimit available_memory_limit(const Backend& backend);

// The budget of the options. A run is limited by what the machine has now, too; a plan for another machine is not.
// Throws std::runtime_error when nothing is left for a plan.
Budget find_budget(const Options& options, Backend& backend, bool for_run);

// What was not given. A resumed run may change only what leaves its numbers alone.
Freedom freedom_left(const RunSetup& setup);
// The same as if none of the planner's settings had been given.
Freedom full_freedom(const RunSetup& setup);

// The run with the settings of `choice`, resolved anew.
RunSetup with_settings(const RunSetup& setup, const EngineConfig& choice);

// "--micro-batch 4 --recompute none ...": everything the planner chooses.
std::string settings_flags(const EngineConfig& config);

struct BudgetChoice {
  Budget budget;
  RunSetup setup;
  Choice chosen;
  std::optional<Choice> runner_up;
  bool measured = false;
};

// The fastest setting of the request within its budget. `undecided` was resolved with Undecided::kPlannersSettings.
// Throws std::runtime_error, in one line with advice, when nothing fits.
BudgetChoice choose_within_budget(const RunSetup& undecided, const Budget& budget, Backend& backend,
                                  const Speeds& speeds);

// Lines for the banner: budget, choice, runner-up. And the same as JSON.
std::string budget_report(const BudgetChoice& choice);
nlohmann::ordered_json budget_json(const BudgetChoice& choice);
