// train_gpt2.cu: main(). Options, device, data, plan, trainer; and the subcommands plan, generate and eval.
// Compiled by g++ where there is no nvcc: nothing in this file is CUDA.
#include <exception>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "data/json_text.h"
#include "kernels/cpu/library_settings.h"
#include "train/banner.h"
#include "train/budget.h"
#include "train/command_line.h"
#include "train/file_io.h"
#include "train/inference.h"
#include "train/plan_command.h"
#include "train/resume.h"
#include "train/run_data.h"
#include "train/run_setup.h"
#include "train/standard_streams.h"
#include "train/trainer.h"

namespace {

int train(Options options) {
  if (options.was_given("hellaswag"))
    throw UsageError("--hellaswag is for eval: ./train_gpt2 eval --model DIR --hellaswag FILE");
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
  Job job;
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
  Trainer trainer(setup, *backend, job, alone(), checkpoint, state);
  print_banner(setup, *backend, why, choice ? budget_report(*choice) : "", no_validation, changes, trainer);
  return trainer.run();
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
    case Command::kEval: evaluate(options); break;
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
