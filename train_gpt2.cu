// train_gpt2.cu: main(). Options, device, data, plan, trainer; and the subcommands plan, generate and eval.
// Compiled by g++ where there is no nvcc: nothing in this file is CUDA.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "data/json_text.h"
#include "data/token_loader.h"
#include "data/tokenizer.h"
#include "kernels/cpu/library_settings.h"
#include "train/budget.h"
#include "train/command_line.h"
#include "train/file_io.h"
#include "train/mapping_fault.h"
#include "train/plan_command.h"
#include "train/resume.h"
#include "train/run_data.h"
#include "train/run_setup.h"
#include "train/sampler.h"
#include "train/standard_streams.h"
#include "train/trainer.h"

namespace {

constexpr char kNoModel[] = "--model is needed: a checkpoint or another directory with weights";

void check_prompt(const RunSetup& setup) {
  if (setup.tokenizer || setup.options.prompt.empty()) return;
  throw UsageError("--prompt needs a tokenizer: --tokenizer FILE (tokenizer.bin, made by data/prepare.py)" +
                   (setup.tokenizer_warning.empty() ? "" : "; " + setup.tokenizer_warning));
}

void print_banner(const RunSetup& setup, const Backend& backend, const std::string& why, const std::string& budget,
                  const std::string& no_validation, const Trainer& trainer) {
  const Options& o = setup.options;
  const Gpt2Config& model = setup.engine.model;
  std::printf("device      %s (%s)\n", backend.description().c_str(), why.c_str());
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
  std::printf("settings   ");
  const nlohmann::ordered_json options = options_to_json(o);
  for (const auto& [key, value] : options.items()) {
    if (value.is_string() ? !value.get<std::string>().empty() : value != false && value != -1) {
      std::printf(" %s=%s", key.c_str(), value.is_string() ? value.get<std::string>().c_str() : value.dump().c_str());
    }
  }
  const MemoryPlan plan = trainer.engine().plan();
  std::printf("\nmemory      %s on the device:", format_bytes(plan.device_bytes()).c_str());
  const std::vector<size_t> categories = plan.bytes_by_category();
  for (int i = 0; i < kCategoryCount; ++i) {
    std::printf(" %s %s%s", category_name(static_cast<Category>(i)), format_bytes(categories[i]).c_str(),
                i + 1 < kCategoryCount ? "," : "\n");
  }
  if (plan.host_bytes() > 0) std::printf("host memory %s\n", format_bytes(plan.host_bytes()).c_str());
  std::fputs(budget.c_str(), stdout);
  std::printf("output      %s\n", o.out.c_str());
  for (const std::string& warning :
       {trainer.compression_warning(), trainer.transfer_warning(), backend.host_memory_note(),
        vocabulary_warning(setup, o.data), setup.tokenizer_warning}) {
    warn(warning);
  }
  for (const std::string& warning : trainer.data_warnings()) warn(warning);
  std::fflush(stdout);
}

int train(Options options) {
  std::optional<RunFolder> folder;  // held to the end
  std::string checkpoint;
  TrainerState state;
  std::vector<std::string> changes;
  if (!options.resume.empty()) {
    checkpoint = resume(options, folder, state, changes).checkpoint;
    if (!folder) return 0;
  } else {
    check_options(options);
    options.out = folder.emplace(options.out).path();
    if (newest_step(options.out) > 0) {
      throw UsageError(options.out + " holds a run already: go on with --resume " + options.out +
                       ", or name another --out");
    }
  }
  std::string why;
  const std::unique_ptr<Backend> backend = make_backend(options, why);
  const std::string no_validation = resolve_data(options);
  if (!checkpoint.empty()) check_saved_shards(options, checkpoint);
  const RunRequest request{options, backend->name(), data_vocabulary(options, options.data, "--data"), true,
                           checkpoint};
  // A resumed run has its settings from its checkpoint, unless a budget is given anew.
  std::optional<BudgetChoice> choice;
  if (options.was_given("memory-budget")) choice = choose_within_budget(request, *backend, true);
  RunSetup setup = choice ? choice->setup : resolve(request);
  find_tokenizer(setup);
  if (options.sample_every > 0) check_prompt(setup);
  Trainer trainer(setup, *backend, checkpoint, state);
  print_banner(setup, *backend, why, choice ? budget_report(*choice) : "", no_validation, trainer);
  for (const std::string& change : changes) std::printf("changed     %s\n", change.c_str());
  return trainer.run();
}

// An engine without a training half, with the weights of --model.
std::unique_ptr<Engine> open_model(const Options& options, Backend& backend, RunSetup& setup, int64_t vocabulary) {
  if (options.was_given("memory-budget")) throw UsageError("--memory-budget is for training and plan");
  if (options.model.empty()) throw UsageError(kNoModel);
  setup = resolve({options, backend.name(), vocabulary, false, ""});
  if (!setup.source.has_weights) throw UsageError("--model " + options.model + " has no weights");
  verify_model(setup.source.path, CheckpointPart::kModel);
  backend.end_tuning();  // too short to gain from it, and the same numbers each time
  auto engine = std::make_unique<Engine>(setup.engine, backend);
  engine->allocate();
  load_weights(setup.source, engine->store(), backend);
  const int64_t length = setup.engine.shapes.sequence, trained = setup.engine.model.usable_positions();
  if (length > trained) {
    warn("--seq-len " + std::to_string(length) + " is longer than the " + std::to_string(trained) +
         " tokens that the model was trained at: its later positions are as they were initialized");
  }
  return engine;
}

int generate(Options options) {
  check_options(options);
  options.set("micro-batch", options.engine.shapes.batch, 1);
  std::string why;
  const std::unique_ptr<Backend> backend = make_backend(options, why);
  RunSetup setup;
  const std::unique_ptr<Engine> engine = open_model(options, *backend, setup, 0);
  find_tokenizer(setup);
  check_prompt(setup);
  warn(setup.tokenizer_warning);
  const SamplingOptions sampling{options.sample_tokens, static_cast<float>(options.temperature), options.top_k,
                                 static_cast<uint64_t>(options.seed), 0};
  std::printf("%s\n", sample_text(*engine, setup.tokenizer.get(), options.prompt, sampling).c_str());
  return 0;
}

int eval(Options options) {
  check_options(options);
  std::string why;
  const std::unique_ptr<Backend> backend = make_backend(options, why);
  if (options.model.empty()) throw UsageError(kNoModel);
  if (options.val_data.empty()) std::printf("data        %s\n", resolve_evaluation_data(options).c_str());
  RunSetup setup;
  const std::unique_ptr<Engine> engine =
      open_model(options, *backend, setup, data_vocabulary(options, options.val_data, "--val-data"));
  TokenLoader loader = open_loader(setup.options, setup.options.val_data, setup.engine.model.vocabulary, false);
  warn(vocabulary_warning(setup, options.val_data));
  warn(loader.left_out());
  int64_t tokens;
  const int64_t batches = std::max<int64_t>(options.eval_batches, 0);
  const double loss = validation_loss(*engine, loader, batches * setup.engine.shapes.batch, tokens);
  if (!std::isfinite(loss)) {
    throw std::runtime_error("the validation loss is not finite: " + options.model +
                             " holds weights that are not, or overflows in " + dtype_name(setup.engine.shapes.dtype));
  }
  std::printf("validation loss %.6f (%lld tokens)\n", loss, static_cast<long long>(tokens));
  return 0;
}

int report(const std::string& message, int code) {
  say_on_error(message);
  return code;
}

int run(Command command, const Options& options) {
  switch (command) {
    case Command::kTrain: {
      outlive_reader();
      const int code = train(options);
      output_arrived();  // what a run is for is in its checkpoints
      return code;
    }
    case Command::kPlan: print_plan(options); break;
    case Command::kGenerate: generate(options); break;
    case Command::kEval: eval(options); break;
    case Command::kExit: break;
  }
  return output_arrived() ? 0 : 1;  // what was asked for is what is printed
}

}  // namespace

int main(int argc, char** argv) {
  prepare_standard_streams();
  explain_mapping_faults();
  choose_library_settings(argv);
  try {
    Options options;
    const Command command = parse_command_line(argc, argv, options);
    return run(command, options);
  } catch (const UsageError& error) {
    return report(error.what(), 2);
  } catch (const std::bad_alloc&) {
    return report("out of memory: a smaller --micro-batch, or --memory-budget auto, takes less", 1);
  } catch (const std::length_error&) {
    return report("out of memory: a size is beyond what can be allocated", 1);
  } catch (const nlohmann::json::exception& error) {
    return report("damaged JSON: " + problem_of(error), 1);
  } catch (const std::exception& error) {
    return report(message_of(error), 1);
  }
}
