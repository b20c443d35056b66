// largest_model.h: the largest models whose training fits a memory budget: of the presets, and for each of their widths
// the deepest one.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "train/budget.h"

struct FittingModel {
  std::string name;  // a preset's, or empty
  Choice choice;     // its model and settings
};

struct LargestModels {
  std::optional<FittingModel> preset;           // with everything on the device, unless --offload was given
  std::optional<FittingModel> streamed_preset;  // with as much as possible in host memory
  std::vector<FittingModel> widths;             // narrowest first; those that would be deeper than kMostLayers left out
  const FittingModel* largest() const;          // by parameters, of all that need no streaming; null when nothing fits
};

inline constexpr int64_t kMostLayers = 256;

// Flora, fused, with recomputed blocks and one sequence of 1024 tokens per micro-batch, where `options` does not say
// otherwise.
LargestModels find_largest_models(const Options& options, const Budget& budget, Backend& backend);

std::string largest_models_report(const LargestModels& models, const Options& options, const Budget& budget);
nlohmann::ordered_json largest_models_json(const LargestModels& models, const Options& options);
