// techniques.h: the ladder of techniques that save memory, and what each of them saves at the shapes of a run. This is
// the one list: `plan` prints it, the scripts read it from `plan --json`, the documentation quotes it.
#pragma once

#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "train/run_setup.h"

struct Technique {
  std::string name;
  std::string adds;   // flags of this row
  std::string flags;  // those of the rows above before them: what a user types beside model and shapes
  size_t device_bytes = 0, host_bytes = 0;
  std::vector<size_t> categories;
};

// AdamW as it is usually done in mixed precision, and then one technique after another, each on top of those before, in
// one micro-batch of the run's model, shapes and rank.
std::vector<Technique> plan_techniques(const RunSetup& setup, Backend& backend);

std::string techniques_table(const std::vector<Technique>& techniques);
nlohmann::ordered_json techniques_json(const std::vector<Technique>& techniques);
