// plan_report.cpp: see plan_report.h.
#include "train/plan_report.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "train/metrics.h"

namespace {

std::string phase_names(uint32_t phases) {
  if (phases == kPhaseAlways) return "always";
  std::string names;
  const std::pair<uint32_t, const char*> all[] = {{kPhaseForward, "forward"},
                                                  {kPhaseHead, "head"},
                                                  {kPhaseBackward, "backward"},
                                                  {kPhaseUpdate, "update"},
                                                  {kPhaseSample, "sample"}};
  for (const auto& [phase, name] : all) {
    if (phases & phase) names += (names.empty() ? "" : "+") + std::string(name);
  }
  return names;
}

}  // namespace

nlohmann::ordered_json categories_json(const std::vector<size_t>& categories) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  for (int i = 0; i < kCategoryCount; ++i) {
    json[category_name(static_cast<Category>(i))] = categories[static_cast<size_t>(i)];
  }
  return json;
}

std::string plan_table(const MemoryPlan& plan) {
  constexpr size_t kLargest = 12;
  char line[256];
  std::string text = "memory plan, device\n";
  const std::vector<size_t> categories = plan.bytes_by_category();
  for (int i = 0; i < kCategoryCount; ++i) {
    snprintf(line, sizeof line, "  %-18s %14s  %5.1f%%\n", category_name(static_cast<Category>(i)),
             format_bytes(categories[i]).c_str(),
             plan.device_bytes() ? 100.0 * static_cast<double>(categories[i]) / static_cast<double>(plan.device_bytes())
                                 : 0.0);
    text += line;
  }
  snprintf(line, sizeof line, "  %-18s %14s  (%zu bytes)\n", "total", format_bytes(plan.device_bytes()).c_str(),
           plan.device_bytes());
  text += line;
  if (plan.host_bytes() > 0) text += "  host               " + format_bytes(plan.host_bytes()) + "\n";

  std::vector<const Allocation*> largest;
  for (const Allocation& allocation : plan.allocations())
    if (!allocation.host) largest.push_back(&allocation);
  std::stable_sort(largest.begin(), largest.end(),
                   [](const Allocation* a, const Allocation* b) { return a->bytes > b->bytes; });
  text += "largest of " + std::to_string(largest.size()) +
          " allocations on the device (those alive in different phases may share memory)\n";
  for (size_t i = 0; i < std::min(kLargest, largest.size()); ++i) {
    snprintf(line, sizeof line, "  %14s  %-16s %-22s %s\n", format_bytes(largest[i]->bytes).c_str(),
             category_name(largest[i]->category), phase_names(largest[i]->phases).c_str(), largest[i]->name.c_str());
    text += line;
  }
  return text;
}

nlohmann::ordered_json plan_json(const MemoryPlan& plan) {
  nlohmann::ordered_json json = {{"device_bytes", plan.device_bytes()},
                                 {"host_bytes", plan.host_bytes()},
                                 {"categories", categories_json(plan.bytes_by_category())},
                                 {"allocations", nlohmann::ordered_json::array()}};
  for (const Allocation& allocation : plan.allocations()) {
    json["allocations"].push_back({{"name", allocation.name},
                                   {"category", category_name(allocation.category)},
                                   {"bytes", allocation.bytes},
                                   {"offset", allocation.offset},
                                   {"phases", phase_names(allocation.phases)},
                                   {"host", allocation.host}});
  }
  return json;
}

nlohmann::ordered_json settings_json(const RunSetup& setup) {
  const ActivationShapes& shapes = setup.engine.shapes;
  return {{"model", setup.options.model},
          {"parameters", setup.engine.model.parameter_count()},
          {"seq_len", shapes.sequence},
          {"micro_batch", shapes.batch},
          {"tokens_per_step", setup.options.tokens_per_step},
          {"recompute", name_of(kRecomputeNames, shapes.recompute)},
          {"head_chunk", shapes.head_chunk},
          {"gradient_blocks", name_of(kGradientBlocksNames, setup.engine.gradients.blocks)},
          {"offload", offload_name(setup.engine.offload)},
          {"ranks", setup.engine.ranks},
          {"shard", name_of(kSpreadNames, setup.engine.spread)},
          {"layers_in_flight", setup.engine.offload.layers_in_flight}};
}
