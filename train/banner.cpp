// banner.cpp: see banner.h.
#include "train/banner.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <set>

#include "flora/flora.h"
#include "train/metrics.h"
#include "train/run_data.h"
#include "train/standard_streams.h"

namespace {

// Compression was asked for and nothing is compressed.
std::string compression_warning(const RunSetup& setup, const Optimizer& optimizer) {
  const EngineConfig& engine = setup.engine;
  const auto above = [](int64_t rank) {
    return "nothing is compressed: rank " + std::to_string(rank) + " is above every matrix of this model";
  };
  if (engine.optimizer.rank > 0 && optimizer.compressed_parameters().empty()) {
    if (!engine.optimizer.factored) return "nothing is compressed: --no-factored keeps the momentum in full";
    if (engine.optimizer.beta1 == 0) return "nothing is compressed: with --beta1 0 there is no momentum";
    return above(engine.optimizer.rank);
  }
  const GradientConfig& gradients = engine.gradients;
  if (gradients.accumulation_rank > 0) {
    const std::vector<Parameter> parameters = gpt2_parameters(engine.model);
    const bool any = std::any_of(parameters.begin(), parameters.end(), [&](const Parameter& parameter) {
      return is_compressed(parameter, gradients.accumulation_rank, gradients.compress_embeddings, gradients.projection);
    });
    if (!any) return above(gradients.accumulation_rank);
  }
  return "";
}

// The momentum can grow without bound.
std::string transfer_warning(const RunSetup& setup) {
  const OptimizerConfig& optimizer = setup.engine.optimizer;
  const double growth = transfer_growth(optimizer, gpt2_parameters(setup.engine.model));
  if (growth < 1) return "";
  char text[256];
  snprintf(text, sizeof text,
           "--transfer %s with --rank %lld, --kappa %lld and --beta1 %g can multiply the momentum by about %.3g "
           "every %lld steps, without bound; --transfer rescale or restart, or a larger --kappa, cannot",
           name_of(kTransferNames, optimizer.transfer).c_str(), static_cast<long long>(optimizer.rank),
           static_cast<long long>(optimizer.kappa), static_cast<double>(optimizer.beta1), growth,
           static_cast<long long>(optimizer.kappa));
  return text;
}

std::string text_of(const nlohmann::ordered_json& value) {
  return value.is_string() ? value.get<std::string>() : value.dump();
}

// The update rule, and of all other options those that were given or chosen for the device and the model.
void print_settings(const RunSetup& setup) {
  static const std::set<std::string> said = {"model",           "data",   "val_data",      "micro_batch", "seq_len",
                                             "tokens_per_step", "out",    "resume",        "device",      "plan",
                                             "profile",         "prompt", "memory_budget", "optimizer",   "rank",
                                             "kappa",           "lr",     "schedule",      "steps",       "gradients"};
  const nlohmann::ordered_json before = options_to_json(setup.request.options), now = options_to_json(setup.options);
  std::string rule = text_of(now["optimizer"]);
  if (rule == "flora") rule += " of rank " + text_of(now["rank"]) + ", kappa " + text_of(now["kappa"]);
  std::printf("update      %s, %s gradients, lr %s %s, %s steps\n", rule.c_str(), text_of(now["gradients"]).c_str(),
              text_of(now["lr"]).c_str(), text_of(now["schedule"]).c_str(), text_of(now["steps"]).c_str());
  std::string settings;
  for (const auto& [key, value] : now.items()) {
    std::string flag = key;
    std::replace(flag.begin(), flag.end(), '_', '-');
    const bool follows = key.ends_with("_dtype") && value == now["dtype"];
    const bool unused = key == "cooldown_steps" && now["schedule"] != "wsd";
    const bool was_open = setup.request.options.is_open(flag) && !setup.options.is_open(flag);
    const bool chosen = (was_open || before[key] != value) && !follows && !unused;
    if (!said.contains(key) && (chosen || setup.options.was_given(flag))) settings += " " + key + "=" + text_of(value);
  }
  if (!settings.empty()) std::printf("settings   %s\n", settings.c_str());
}

}  // namespace

void print_banner(const RunSetup& setup, const Backend& backend, const std::string& why, const std::string& budget,
                  const std::string& no_validation, const std::vector<std::string>& changes, const Trainer& trainer) {
  const Options& o = setup.options;
  const Gpt2Config& model = setup.engine.model;
  std::printf("device      %s (%s)\n", backend.description().c_str(), why.c_str());
  if (const std::string checked = checked_text(trainer.checked_device()); !checked.empty())
    std::printf("checked     %s\n", checked.c_str());
  std::printf("model       %s: %lld layers, %lld channels, %lld heads, vocabulary %lld, %.1fM parameters, weights %s\n",
              o.model.c_str(), static_cast<long long>(model.layers), static_cast<long long>(model.channels),
              static_cast<long long>(model.heads), static_cast<long long>(model.vocabulary),
              static_cast<double>(model.parameter_count()) / 1e6, setup.source.has_weights ? "loaded" : "initialized");
  if (setup.source.kind == ModelSource::Kind::kDirectory && !setup.source.has_weights) {
    std::printf("weights     none in %s: initialized\n", o.model.c_str());
  }
  const std::string& none = no_validation.empty() ? trainer.validation_problem() : no_validation;
  std::printf("data        %s: %s; validation %s\n", o.data.c_str(), trainer.data_summary().c_str(),
              none.empty() ? o.val_data.c_str() : "none");
  if (!none.empty()) std::printf("validation  none: %s (--val-data names shards)\n", none.c_str());
  std::printf("step        %lld tokens: %d micro-batches of %lld x %lld\n", static_cast<long long>(o.tokens_per_step),
              setup.engine.gradients.micro_batches, static_cast<long long>(setup.engine.shapes.batch),
              static_cast<long long>(setup.engine.shapes.sequence));
  print_settings(setup);
  const MemoryPlan plan = trainer.engine().plan();
  std::printf("memory      %s on the device:", format_bytes(plan.device_bytes()).c_str());
  const std::vector<size_t> categories = plan.bytes_by_category();
  for (int i = 0; i < kCategoryCount; ++i) {
    std::printf(" %s %s%s", category_name(static_cast<Category>(i)), format_bytes(categories[i]).c_str(),
                i + 1 < kCategoryCount ? "," : "\n");
  }
  if (plan.host_bytes() > 0) std::printf("host memory %s\n", format_bytes(plan.host_bytes()).c_str());
  std::fputs(budget.c_str(), stdout);
  std::printf("output      %s\n", o.out.c_str());
  for (const std::string& warning :
       {compression_warning(setup, trainer.engine().optimizer()), transfer_warning(setup), backend.host_memory_note(),
        vocabulary_warning(setup, setup.request.vocabulary, o.data), setup.tokenizer_warning}) {
    warn(warning);
  }
  for (const std::string& warning : trainer.data_warnings()) warn(warning);
  for (const std::string& warning : trainer.checked_device().switched_off) warn(warning);
  for (const std::string& change : changes) std::printf("changed     %s\n", change.c_str());
  std::fflush(stdout);
}
