// largest_model.cpp: see largest_model.h. The bytes of a model grow by the same amount with every layer, so the deepest
// one is guessed from two plans and then made sure of by its own and its neighbour's.
#include "train/largest_model.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "train/metrics.h"

namespace {

// The request as a run of `model`, with the defaults of this question.
RunRequest request_of(Options options, const std::string& device) {
  const auto otherwise = [&](const char* flag, auto& field, const auto& value) {
    if (!options.was_given(flag)) field = value;
  };
  otherwise("seq-len", options.seq_len, int64_t{1024});
  otherwise("micro-batch", options.micro_batch, int64_t{1});
  otherwise("recompute", options.recompute, "block");
  return {.options = options, .device = device, .vocabulary = 0, .training = true, .checkpoint = ""};
}

class Search {
 public:
  Search(const Options& options, const Budget& budget, Backend& backend)
      : options_(options), limit_(budget.limit), backend_(backend) {
    RunRequest request = request_of(options, backend.name());
    request.options.model = "d12";
    base_ = resolve(request, Undecided::kPlannersSettings).engine;
    freedom_.head_chunk = !options.was_given("head-chunk");
    freedom_.gradient_blocks = !options.was_given("gradient-blocks");
  }

  // The setting of this model that takes least; nothing when that does not fit.
  std::optional<Choice> fitting(Gpt2Config model, bool streamed) const {
    EngineConfig config = base_;
    model.positions = std::max(model.positions, config.shapes.sequence);
    config.model = model;
    if (streamed) config.offload = {true, true, true, config.offload.layers_in_flight};
    const Planner planner(backend_, nominal_speeds(config, backend_.name()));
    const std::optional<Choice> least = planner.smallest(planner.candidates(config, freedom_), limit_);
    if (!least || !fits({least->device_bytes, least->host_bytes}, limit_)) return std::nullopt;
    return least;
  }

  std::optional<FittingModel> largest_preset(bool streamed) const {
    std::optional<FittingModel> best;
    for (const std::string& name : preset_names()) {
      const Gpt2Config model = preset(name);
      if (best && model.parameter_count() <= best->choice.config.model.parameter_count()) continue;
      if (const std::optional<Choice> choice = fitting(model, streamed)) best = FittingModel{name, *choice};
    }
    return best;
  }

  // Nothing when not even one layer fits, or more than kMostLayers.
  std::optional<FittingModel> deepest(Gpt2Config model) const {
    const auto at = [&](int64_t layers) {
      model.layers = layers;
      return fitting(model, false);
    };
    const std::optional<Choice> few = at(2), more = at(4);
    int64_t layers = 1;
    if (few && more) {
      const size_t per_layer = (more->device_bytes - few->device_bytes) / 2;
      const size_t left = limit_.device - few->device_bytes;
      if (left / std::max<size_t>(per_layer, 1) > 2 * kMostLayers) return std::nullopt;
      layers = 2 + static_cast<int64_t>(left / std::max<size_t>(per_layer, 1));
    }
    std::optional<Choice> found = at(layers);
    for (; !found && layers > 1; found = at(layers)) --layers;
    for (std::optional<Choice> next = found; found && layers <= kMostLayers; ++layers) {
      next = at(layers + 1);
      if (!next) break;
      found = next;
    }
    if (!found || layers > kMostLayers) return std::nullopt;
    return FittingModel{"", *found};
  }

 private:
  Options options_;
  MemoryLimit limit_;
  Backend& backend_;
  EngineConfig base_;
  Freedom freedom_;
};

std::string short_config(const Gpt2Config& model) {
  const nlohmann::ordered_json json = {{"model_type", "gpt2"},           {"vocab_size", model.vocabulary},
                                       {"n_positions", model.positions}, {"n_embd", model.channels},
                                       {"n_layer", model.layers},        {"n_head", model.heads}};
  return json.dump();
}

// What was given, and then what this question takes for granted.
std::string run_flags(const FittingModel& model, const Options& options) {
  std::string flags = "--model " + (model.name.empty() ? "config.json" : model.name);
  Options defaults, given = options;
  const nlohmann::ordered_json now = options_to_json(given), before = options_to_json(defaults);
  for (const std::string& flag : options.given) {
    std::string key = flag;
    std::replace(key.begin(), key.end(), '-', '_');
    const bool chosen = flag == "micro-batch" || flag == "recompute" || flag == "head-chunk" ||
                        flag == "gradient-blocks" || flag == "offload" || flag == "seq-len";
    if (chosen || flag == "memory-budget" || flag == "json" || flag == "plan" || !now.contains(key)) continue;
    if (now[key].is_boolean()) {
      flags += " --" + flag;
    } else {
      flags += " --" + flag + " " + (now[key].is_string() ? now[key].get<std::string>() : now[key].dump());
    }
  }
  return flags + " --seq-len " + std::to_string(model.choice.config.shapes.sequence) + " " +
         settings_flags(model.choice.config);
}

std::string line_of(const FittingModel& model) {
  const Gpt2Config& config = model.choice.config.model;
  char text[256];
  snprintf(text, sizeof text, "  %7lld %7lld %10.2fB %12s %12s  %s\n", static_cast<long long>(config.channels),
           static_cast<long long>(config.layers), static_cast<double>(config.parameter_count()) / 1e9,
           format_bytes(model.choice.device_bytes).c_str(), format_bytes(model.choice.host_bytes).c_str(),
           model.name.empty() ? short_config(config).c_str() : model.name.c_str());
  return text;
}

nlohmann::ordered_json json_of(const FittingModel& model, const Options& options) {
  const Gpt2Config& config = model.choice.config.model;
  return {{"name", model.name},
          {"parameters", config.parameter_count()},
          {"layers", config.layers},
          {"channels", config.channels},
          {"heads", config.heads},
          {"device_bytes", model.choice.device_bytes},
          {"host_bytes", model.choice.host_bytes},
          {"config", nlohmann::ordered_json::parse(short_config(config))},
          {"flags", run_flags(model, options)}};
}

}  // namespace

const FittingModel* LargestModels::largest() const {
  const FittingModel* best = preset ? &*preset : nullptr;
  for (const FittingModel& model : widths) {
    const auto parameters = [](const FittingModel& m) { return m.choice.config.model.parameter_count(); };
    if (!best || parameters(model) > parameters(*best)) best = &model;
  }
  return best;
}

LargestModels find_largest_models(const Options& options, const Budget& budget, Backend& backend) {
  const Search search(options, budget, backend);
  LargestModels models;
  models.preset = search.largest_preset(false);
  if (!options.was_given("offload")) models.streamed_preset = search.largest_preset(true);
  std::map<int64_t, Gpt2Config> by_width;
  for (const std::string& name : preset_names()) by_width.emplace(preset(name).channels, preset(name));
  for (const auto& [channels, model] : by_width) {
    if (std::optional<FittingModel> deepest = search.deepest(model)) models.widths.push_back(*deepest);
  }
  return models;
}

std::string largest_models_report(const LargestModels& models, const Options& options, const Budget& budget) {
  char line[256];
  std::string text = "training within " + format_bytes(budget.bytes) + " (" + format_bytes(budget.set_aside) +
                     " of it set aside for the runtime)\n";
  const FittingModel* const largest = models.largest();
  if (!largest) return text + "  no model fits\n";
  snprintf(line, sizeof line, "  %7s %7s %11s %12s %12s\n", "width", "layers", "parameters", "device", "host");
  const std::string heading = line;
  if (models.preset) text += "the largest preset\n" + heading + line_of(*models.preset);
  text += "the deepest model of each width (up to " + std::to_string(kMostLayers) + " layers)\n" + heading;
  for (const FittingModel& model : models.widths) text += line_of(model);
  if (models.streamed_preset)
    text += "the largest preset with weights, state and activations in host memory\n" + heading +
            line_of(*models.streamed_preset);
  text +=
      "the largest one runs with (config.json as in its line)\n  ./train_gpt2 " + run_flags(*largest, options) + "\n";
  return text;
}

nlohmann::ordered_json largest_models_json(const LargestModels& models, const Options& options) {
  nlohmann::ordered_json json = {
      {"preset", nullptr}, {"streamed_preset", nullptr}, {"widths", nlohmann::json::array()}};
  if (models.preset) json["preset"] = json_of(*models.preset, options);
  if (models.streamed_preset) json["streamed_preset"] = json_of(*models.streamed_preset, options);
  for (const FittingModel& model : models.widths) json["widths"].push_back(json_of(model, options));
  return json;
}
