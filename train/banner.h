// banner.h: what a run says about itself before its first step. All options are in metrics.jsonl.
#pragma once

#include <string>
#include <vector>

#include "train/trainer.h"

// Device, model, data, update rule, what was given or chosen, memory, and warnings. `why`: what the device was chosen
// by; `budget`: lines about --memory-budget; `no_validation`: why there are no validation shards, or empty; `changes`:
// what a resumed run changes of the training.
void print_banner(const RunSetup& setup, const Backend& backend, const std::string& why, const std::string& budget,
                  const std::string& no_validation, const std::vector<std::string>& changes, const Trainer& trainer);
