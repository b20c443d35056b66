// techniques.cpp: see techniques.h. Every row is resolved and planned from its flags, as if a user had typed them.
#include "train/techniques.h"

#include <nlohmann/json.hpp>
#include <sstream>

#include "train/command_line.h"
#include "train/metrics.h"
#include "train/plan_report.h"

namespace {

struct Rung {
  const char *name, *flags;
};

// {rank} is the run's.
constexpr Rung kLadder[] = {
    {"AdamW: bf16 weights, fp32 master weights and states",
     "--dtype bf16 --optimizer adamw --gradients dense --state-dtype fp32 --master-weights fp32"},
    {"+ activation checkpointing", "--recompute block"},
    {"+ fused backward", "--gradients fused"},
    {"+ bf16 momentum, no master weights", "--state-dtype bf16 --master-weights none"},
    {"+ Flora, rank {rank}", "--optimizer flora --rank {rank}"},
    {"+ the embedding's gradient in blocks", "--gradient-blocks embedding"},
    {"+ 8-bit weights and states", "--weight-dtype int8 --state-dtype int8"},
};
constexpr Rung kLast[] = {{"+ weights, states and activations streamed", "--offload activations,state,weights"}};
// Of several ranks.
constexpr Rung kLastOfRanks[] = {{"+ weights and states spread over the devices", "--shard weights"},
                                 {"+ activations streamed", "--offload activations"}};

std::string with_rank(std::string text, int64_t rank) {
  const std::string place = "{rank}";
  if (const size_t at = text.find(place); at != std::string::npos) text.replace(at, place.size(), std::to_string(rank));
  return text;
}

// Options of a command line.
Options parsed(const std::string& flags, const std::string& model) {
  std::istringstream stream(flags);
  std::vector<std::string> words = {"train_gpt2", "--model", model};
  for (std::string word; stream >> word;) words.push_back(word);
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  Options options;
  parse_command_line(static_cast<int>(argv.size()), argv.data(), options);
  return options;
}

}  // namespace

std::vector<Technique> plan_techniques(const RunSetup& setup, Backend& backend) {
  const ActivationShapes& shapes = setup.engine.shapes;
  const std::string same = " --seq-len " + std::to_string(shapes.sequence) + " --micro-batch " +
                           std::to_string(shapes.batch) + " --head-chunk " + std::to_string(shapes.head_chunk);
  const int layers_in_flight = setup.engine.offload.layers_in_flight;
  std::vector<Technique> rows;
  std::string flags;
  std::vector<Rung> rungs(std::begin(kLadder), std::end(kLadder));
  if (setup.engine.ranks > 1) {
    rungs.insert(rungs.end(), std::begin(kLastOfRanks), std::end(kLastOfRanks));
  } else {
    rungs.insert(rungs.end(), std::begin(kLast), std::end(kLast));
  }
  for (const Rung& rung : rungs) {
    std::string adds = with_rank(rung.flags, setup.options.engine.optimizer.rank);
    const char* const streams = setup.engine.ranks > 1 ? "--shard" : "--offload";
    if (adds.find(streams) != std::string::npos && layers_in_flight != Offload{}.layers_in_flight)
      adds += " --layers-in-flight " + std::to_string(layers_in_flight);
    flags += (flags.empty() ? "" : " ") + adds;
    RunRequest request = setup.request;
    request.options = parsed(flags + same, setup.options.model);
    request.options.ranks = setup.engine.ranks;
    const MemoryPlan plan = Engine(resolve(request).engine, backend).plan();
    rows.push_back({with_rank(rung.name, setup.options.engine.optimizer.rank), adds, flags, plan.device_bytes(),
                    plan.host_bytes(), plan.bytes_by_category()});
  }
  return rows;
}

std::string techniques_table(const std::vector<Technique>& techniques) {
  char line[256];
  std::string text = "one technique after another, at these shapes, each row with the flags of those above it\n";
  const auto cells = [&](const std::string& name, const std::string& device, const std::string& host) {
    snprintf(line, sizeof line, "  %-52s %11s %11s", name.c_str(), device.c_str(), host.c_str());
    text += line;
  };
  cells("", "device", "host");
  for (int i = 0; i < kCategoryCount; ++i) {
    snprintf(line, sizeof line, " %15s", category_name(static_cast<Category>(i)));
    text += line;
  }
  text += "\n";
  for (const Technique& technique : techniques) {
    cells(technique.name, format_bytes(technique.device_bytes), format_bytes(technique.host_bytes));
    for (const size_t bytes : technique.categories) {
      snprintf(line, sizeof line, " %15s", format_bytes(bytes).c_str());
      text += line;
    }
    text += "\n      " + technique.adds + "\n";
  }
  return text;
}

nlohmann::ordered_json techniques_json(const std::vector<Technique>& techniques) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (const Technique& technique : techniques) {
    json.push_back({{"name", technique.name},
                    {"adds", technique.adds},
                    {"flags", technique.flags},
                    {"device_bytes", technique.device_bytes},
                    {"host_bytes", technique.host_bytes},
                    {"categories", categories_json(technique.categories)}});
  }
  return json;
}
