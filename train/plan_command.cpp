// plan_command.cpp: see plan_command.h.
#include "train/plan_command.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "train/budget.h"
#include "train/metrics.h"
#include "train/plan_report.h"
#include "train/run_data.h"
#include "train/techniques.h"

namespace {

constexpr int64_t kMostLayers = 256;

struct FittingModel {
  std::string name;     // a preset's, or empty
  Candidate candidate;  // its model and settings
  int64_t parameters() const { return candidate.config.model.parameter_count(); }
};

// Models by what fits: Flora, fused, with recomputed blocks and one sequence of 1024 tokens per micro-batch, and of
// several devices with the weights spread over them, where the options do not say otherwise.
class LargestModels {
 public:
  LargestModels(const Options& options, Backend& backend)
      : options_(options), backend_(backend), budget_(find_budget(options, backend, false, alone_)) {
    Options base = options;
    base.model = "d12";
    base.choose("seq-len", base.engine.shapes.sequence, 1024);
    base.choose("micro-batch", base.engine.shapes.batch, 1);
    base.choose("recompute", base.engine.shapes.recompute, Recompute::kBlock);
    if (options.ranks > 1) base.choose("shard", base.engine.spread, Spread::kWeights);
    base_ = resolve({base, backend.name(), 0, true, ""}, Undecided::kPlannersSettings).engine;
    space_.head_chunk = !options.was_given("head-chunk");
    space_.gradient_blocks = !options.was_given("gradient-blocks");

    std::map<int64_t, Gpt2Config> of_width;
    for (const std::string& name : preset_names()) {
      const Gpt2Config model = preset(name);
      of_width.emplace(model.channels, model);
      keep_larger(preset_, name, model, false);
      if (!options.was_given("offload")) keep_larger(streamed_preset_, name, model, true);
    }
    for (const auto& [channels, model] : of_width) add_deepest(model);
  }

  std::string report() const {
    const std::string devices = options_.ranks > 1 ? " on each of " + std::to_string(options_.ranks) + " devices" : "";
    std::string text = "training within " + format_bytes(budget_.bytes) + devices + " (" +
                       format_bytes(budget_.set_aside) + " of it set aside for the runtime)\n";
    const FittingModel* const best = largest();
    if (!best) return text + "  no model fits\n";
    char heading[128];
    snprintf(heading, sizeof heading, "  %7s %7s %11s %12s %12s\n", "width", "layers", "parameters", "device", "host");
    if (preset_) text += std::string("the largest preset\n") + heading + line_of(*preset_);
    text += "the deepest model of each width (up to " + std::to_string(kMostLayers) + " layers)\n" + heading;
    for (const FittingModel& model : widths_) text += line_of(model);
    if (streamed_preset_)
      text += "the largest preset with " + std::string(is_spread(base_) ? "" : "weights, state and ") +
              "activations in host memory\n" + heading + line_of(*streamed_preset_);
    return text + "the largest one runs with (config.json as in its line)\n  ./train_gpt2 " + flags_of(*best) + "\n";
  }

  nlohmann::ordered_json json() const {
    MemoryPlan plan;
    if (const FittingModel* const best = largest()) plan = Engine(best->candidate.config, backend_).declared();
    plan.layout();
    nlohmann::ordered_json json = plan_json(plan), widths = nlohmann::ordered_json::array();
    for (const FittingModel& model : widths_) widths.push_back(json_of(model));
    const auto json_or_null = [&](const auto& model) { return model ? json_of(*model) : nlohmann::ordered_json(); };
    json["largest"] = {
        {"preset", json_or_null(preset_)}, {"streamed_preset", json_or_null(streamed_preset_)}, {"widths", widths}};
    return json;
  }

 private:
  // The setting of this model that takes least; nothing when that does not fit.
  std::optional<Candidate> fitting(Gpt2Config model, bool streamed) const {
    EngineConfig config = base_;
    model.positions = std::max(model.positions, config.shapes.sequence);
    config.model = model;
    const bool here = is_spread(config);  // weights and state are with the ranks
    if (streamed) config.offload = {true, !here, !here, config.offload.layers_in_flight};
    const Rates rates = nominal_rates(config, backend_.name());
    const std::optional<Candidate> least =
        smallest(candidates(config, space_, rates, backend_), budget_.limit, backend_);
    return least && fits(least->bytes(), budget_.limit) ? least : std::nullopt;
  }

  void keep_larger(std::optional<FittingModel>& kept, const std::string& name, const Gpt2Config& model,
                   bool streamed) const {
    if (kept && model.parameter_count() <= kept->parameters()) return;
    if (const std::optional<Candidate> candidate = fitting(model, streamed)) kept = FittingModel{name, *candidate};
  }

  // Nothing when not even one layer fits, or more than kMostLayers.
  void add_deepest(Gpt2Config model) {
    int64_t fit = 0, too_many = kMostLayers + 1;
    std::optional<Candidate> deepest;
    while (too_many - fit > 1) {
      model.layers = fit + (too_many - fit) / 2;
      const std::optional<Candidate> candidate = fitting(model, false);
      (candidate ? fit : too_many) = model.layers;
      if (candidate) deepest = candidate;
    }
    if (deepest && fit < kMostLayers) widths_.push_back({"", *deepest});
  }

  // By parameters, of all that need no streaming; null when nothing fits.
  const FittingModel* largest() const {
    const FittingModel* best = preset_ ? &*preset_ : nullptr;
    for (const FittingModel& model : widths_) {
      if (!best || model.parameters() > best->parameters()) best = &model;
    }
    return best;
  }

  // What was given, and then what this question takes for granted.
  std::string flags_of(const FittingModel& model) const {
    std::string flags = "--model " + (model.name.empty() ? "config.json" : model.name);
    const nlohmann::ordered_json values = options_to_json(options_);
    const std::vector<std::string> said_below = {"micro-batch", "recompute", "head-chunk", "gradient-blocks",
                                                 "offload",     "shard",     "seq-len",    "memory-budget",
                                                 "json",        "plan"};
    for (const std::string& flag : options_.given) {
      if (std::find(said_below.begin(), said_below.end(), flag) != said_below.end()) continue;
      const nlohmann::ordered_json& value = values.at(json_key(flag));
      flags += " --" + flag;
      if (!value.is_boolean()) flags += " " + (value.is_string() ? value.get<std::string>() : value.dump());
    }
    const EngineConfig& config = model.candidate.config;
    return flags + " --seq-len " + std::to_string(config.shapes.sequence) + " " + settings_flags(config);
  }

  static nlohmann::ordered_json config_json(const Gpt2Config& model) {
    return {{"model_type", "gpt2"},     {"vocab_size", model.vocabulary}, {"n_positions", model.positions},
            {"n_embd", model.channels}, {"n_layer", model.layers},        {"n_head", model.heads}};
  }

  static std::string line_of(const FittingModel& model) {
    const Gpt2Config& config = model.candidate.config.model;
    char text[256];
    snprintf(text, sizeof text, "  %7lld %7lld %10.2fB %12s %12s  %s\n", static_cast<long long>(config.channels),
             static_cast<long long>(config.layers), static_cast<double>(model.parameters()) / 1e9,
             format_bytes(model.candidate.device_bytes).c_str(), format_bytes(model.candidate.host_bytes).c_str(),
             model.name.empty() ? config_json(config).dump().c_str() : model.name.c_str());
    return text;
  }

  nlohmann::ordered_json json_of(const FittingModel& model) const {
    const Gpt2Config& config = model.candidate.config.model;
    return {{"name", model.name},
            {"parameters", model.parameters()},
            {"layers", config.layers},
            {"channels", config.channels},
            {"heads", config.heads},
            {"device_bytes", model.candidate.device_bytes},
            {"host_bytes", model.candidate.host_bytes},
            {"config", config_json(config)},
            {"flags", flags_of(model)}};
  }

  Job alone_;  // which plans for all
  Options options_;
  Backend& backend_;
  Budget budget_;
  EngineConfig base_;
  SearchSpace space_;
  std::optional<FittingModel> preset_;           // with everything on the device, unless --offload was given
  std::optional<FittingModel> streamed_preset_;  // with as much as possible in host memory
  std::vector<FittingModel> widths_;  // narrowest first; those that would be deeper than kMostLayers left out
};

}  // namespace

void print_plan(Options options) {
  check_options(options);
  options.ranks = static_cast<int>(options.devices);
  std::string note;
  const std::unique_ptr<Backend> backend = make_backend_for_plan(options, note);
  if (!note.empty()) std::fprintf(options.json ? stderr : stdout, "%s\n", note.c_str());
  const bool choose = options.was_given("memory-budget");
  if (choose && options.model.empty()) {
    const LargestModels models(options, *backend);
    std::fputs((options.json ? models.json().dump(2) + "\n" : models.report()).c_str(), stdout);
    return;
  }
  // Without data: bytes for the default run, whose data is made of bytes, GPT-2's vocabulary for a model that is named.
  const int64_t vocabulary = !options.data.empty()    ? data_vocabulary(options, options.data, "--data")
                             : options.vocab_size > 0 ? options.vocab_size
                             : options.model.empty()  ? 257
                                                      : 0;
  const RunRequest request{options, backend->name(), vocabulary, true, ""};
  Job job;  // of this process alone
  std::optional<BudgetChoice> choice;
  if (choose) choice = choose_within_budget(request, *backend, false, job);
  const RunSetup setup = choice ? choice->setup : resolve_for(request, *backend, job);
  const MemoryPlan plan = Engine(setup.engine, *backend).plan();
  const std::vector<Technique> techniques = plan_techniques(setup, *backend);
  if (options.json) {
    nlohmann::ordered_json json = plan_json(plan);
    json["settings"] = settings_json(setup);
    if (choice) json["budget"] = budget_json(*choice);
    json["techniques"] = techniques_json(techniques);
    std::puts(json.dump(2).c_str());
  } else {
    if (choice) std::fputs(budget_report(*choice).c_str(), stdout);
    std::fputs((plan_table(plan) + techniques_table(techniques)).c_str(), stdout);
  }
}
