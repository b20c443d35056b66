// plan_report.h: a memory plan as a table or as JSON.
#pragma once

#include <string>

#include "kernels/memory_plan.h"

std::string plan_table(const MemoryPlan& plan);
std::string plan_json(const MemoryPlan& plan);
