// budget.h: --memory-budget: what the user asked for, and the run that follows from the planner's choice.
#pragma once

#include <optional>
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "parallel/job.h"
#include "train/planner.h"
#include "train/run_setup.h"

struct Budget {
  size_t bytes = 0;      // as asked for; auto: what the device has free
  size_t set_aside = 0;  // of them, for what the runtime takes beside the plan
  MemoryLimit limit;     // for a plan
};

// The budget of the options. A run is limited by what the machine has now, too; a plan for another machine is not.
// Throws std::runtime_error when nothing is left for a plan.
// With several ranks the one that has least decides, and those on one machine share its memory.
Budget find_budget(const Options& options, Backend& backend, bool for_run, Job& job);

// The run with the settings of `choice`, resolved anew.
RunSetup with_settings(const RunSetup& setup, const EngineConfig& choice);

// A run without a budget: resolve(), and on a GPU whose memory is known a head chunk as long as that allows, the same
// on all ranks, and updates beside the backward pass where there is room for them, too.
RunSetup resolve_for(const RunRequest& request, Backend& backend, Job& job);

struct BudgetChoice {
  Budget budget;
  RunSetup setup;
  Candidate chosen;
  std::optional<Candidate> runner_up;
  bool measured = false;
};

// The fastest setting of the request within its budget. A run measures its device first, on a backend of its own: what
// that one chooses meanwhile (matmul algorithms) is no part of the run. A plan goes by nominal rates. Ranks
// all choose the same, by what rank 0 measures. Updates run beside the backward pass where that fits, too. Throws
// std::runtime_error, in one line with advice, when nothing fits.
BudgetChoice choose_within_budget(const RunRequest& request, Backend& backend, bool for_run, Job& job);

// Lines for the banner: budget, choice, runner-up. And the same as JSON.
std::string budget_report(const BudgetChoice& choice);
nlohmann::ordered_json budget_json(const BudgetChoice& choice);
