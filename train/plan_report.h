// plan_report.h: memory plans as tables and as JSON.
#pragma once

#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "kernels/memory_plan.h"
#include "train/run_setup.h"

std::string plan_table(const MemoryPlan& plan);
nlohmann::ordered_json plan_json(const MemoryPlan& plan);

// What each technique saves: the plan of AdamW as it is usually done, and then of one technique after another, each on
// top of those before, at the run's shapes and dtype.
struct Technique {
  std::string name;
  size_t device_bytes = 0, host_bytes = 0;
  std::vector<size_t> categories;
};
std::vector<Technique> plan_techniques(const RunSetup& setup, Backend& backend);
std::string techniques_table(const std::vector<Technique>& techniques);
nlohmann::ordered_json techniques_json(const std::vector<Technique>& techniques);

// The resolved settings that decide over memory.
nlohmann::ordered_json settings_json(const RunSetup& setup);
