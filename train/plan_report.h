// plan_report.h: memory plans as tables and as JSON.
#pragma once

#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "kernels/memory_plan.h"
#include "train/run_setup.h"

std::string plan_table(const MemoryPlan& plan);
nlohmann::ordered_json plan_json(const MemoryPlan& plan);

// Bytes of each category by its name.
nlohmann::ordered_json categories_json(const std::vector<size_t>& categories);

// The resolved settings that decide over memory.
nlohmann::ordered_json settings_json(const RunSetup& setup);
