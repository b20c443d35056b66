// train_gpt2.cu: main(). Options, device, data, plan, trainer; and the subcommands plan, generate, eval and
// selftest.
// Compiled by g++ where there is no nvcc: nothing in this file is CUDA.
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "data/json_text.h"
#include "kernels/cpu/library_settings.h"
#include "parallel/communicator.h"
#include "parallel/job.h"
#include "parallel/launch.h"
#include "parallel/local_ranks.h"
#include "train/agreement.h"
#include "train/banner.h"
#include "train/budget.h"
#include "train/command_line.h"
#include "train/file_io.h"
#include "train/inference.h"
#include "train/interrupt.h"
#include "train/plan_command.h"
#include "train/resume.h"
#include "train/run_data.h"
#include "train/run_setup.h"
#include "train/self_check.h"
#include "train/standard_streams.h"
#include "train/trainer.h"

namespace {

// What a run begins with.
struct Beginning {
  std::optional<RunFolder> folder;  // of rank 0, held to the end
  std::string checkpoint;           // to go on from
  TrainerState state;               // which was read from it
  std::vector<std::string> changes;
};

// Rank 0 takes the run's folder, and tells the others which one, and where to go on from. False where nothing is left
// to be done.
bool begin(Options& options, Job& job, Beginning& run) {
  if (options.resume.empty()) check_options(options);
  if (job.rank() == 0 && !options.resume.empty()) {
    run.checkpoint = resume(options, run.folder, run.state, run.changes).checkpoint;
  } else if (job.rank() == 0) {
    options.out = run.folder.emplace(options.out).path();
    if (newest_step(options.out) > 0) {
      throw UsageError(options.out + " holds a run already: go on with --resume " + options.out +
                       ", or name another --out");
    }
  }
  const std::string out = from_rank_0(job, run.folder ? options.out : "");
  const std::string checkpoint = from_rank_0(job, run.checkpoint);
  if (out.empty()) return false;
  if (job.rank() == 0) return true;
  options.out = out;
  run.checkpoint = checkpoint;
  if (!checkpoint.empty()) follow_resume(options, checkpoint, out, run.state);
  return true;
}

// Rank 0 first: it may have to make the data.
std::string resolve_data_in_turn(Options& options, Job& job) {
  std::string no_validation;
  if (job.rank() == 0) no_validation = resolve_data(options);
  from_rank_0(job, "");
  if (job.rank() > 0) no_validation = resolve_data(options);
  return no_validation;
}

int train(Options options, Job& job) {
  agree_on_options(job, options);
  options.ranks = job.size();
  Beginning run;
  if (!begin(options, job, run)) return 0;
  const std::string& checkpoint = run.checkpoint;
  std::string why;
  const DevicePlace place = device_place(job);
  const std::unique_ptr<Backend> backend = make_backend(options, why, place);
  agree_on_device(job, *backend, place);
  const std::string no_validation = resolve_data_in_turn(options, job);
  if (!checkpoint.empty()) check_saved_shards(options, checkpoint);
  const RunRequest request{options, backend->name(), data_vocabulary(options, options.data, "--data"), true,
                           checkpoint};
  // A resumed run has its settings from its checkpoint, unless a budget is given anew.
  std::optional<BudgetChoice> choice;
  if (options.was_given("memory-budget")) choice = choose_within_budget(request, *backend, true, job);
  RunSetup setup = choice ? choice->setup : resolve_for(request, *backend, job);
  find_tokenizer(setup);
  if (options.sample_every > 0) check_prompt(setup);
  // Later than the job, which knows who is to blame.
  const std::unique_ptr<Communicator> communicator =
      make_communicator(job, *backend, std::chrono::milliseconds(std::llround(2e3 * options.comm_timeout)));
  Trainer trainer(setup, *backend, job, *communicator, checkpoint, run.state);
  print_banner(setup, *backend, why, choice ? budget_report(*choice) : "", no_validation, run.changes, trainer);
  return trainer.run();
}

// Training is a job, of this process alone or of several, which --devices starts here.
int run_training(const Options& options, char** argv, std::unique_ptr<Job>& job) {
  if (options.was_given("hellaswag"))
    throw UsageError("--hellaswag is for eval: ./train_gpt2 eval --model DIR --hellaswag FILE");
  const Launch launch = find_launch(static_cast<int>(options.rendezvous_port));
  if (options.devices > 1 && launch.by != kByDevices) {
    if (launch.size > 1) {
      throw UsageError("--devices " + std::to_string(options.devices) + " contradicts " + launch.by +
                       ", which has started " + std::to_string(launch.size) + " processes: leave it out");
    }
    if (options.resume.empty()) check_options(options);  // said once
    check_devices(options);
    return run_local_ranks(static_cast<int>(options.devices), argv);
  }
  take_signals();
  speak_as_rank(launch.rank);
  if (launch.rank > 0) answer_interrupts_silently();
  outlive_reader();
  job = join_job(launch, {options.rendezvous_timeout, options.comm_timeout, say_on_error});
  const int code = train(options, *job);
  job->leave();
  output_arrived();  // what a run is for is in its checkpoints
  return code;
}

// The other commands are one process's work.
void refuse_launchers(const Options& options) {
  if (options.was_given("devices")) throw UsageError("--devices is for training");
  const Launch launch = find_launch(0);
  if (launch.size == 1) return;
  if (launch.rank > 0) std::exit(2);
  throw UsageError("only training runs in several processes: start this without " + launch.by);
}

int run(Command command, const Options& options, char** argv, std::unique_ptr<Job>& job) {
  if (command == Command::kGenerate || command == Command::kEval || command == Command::kSelftest)
    refuse_launchers(options);
  switch (command) {
    case Command::kTrain: return run_training(options, argv, job);
    case Command::kPlan: print_plan(options); break;
    case Command::kGenerate: generate(options); break;
    case Command::kEval: evaluate(options); break;
    case Command::kSelftest:
      if (!selftest(options)) return 1;
      break;
    case Command::kExit: break;
  }
  return output_arrived() ? 0 : 1;  // what was asked for is what is printed
}

}  // namespace

int main(int argc, char** argv) {
  prepare_standard_streams();
  explain_mapping_faults();
  choose_library_settings(argv);
  std::unique_ptr<Job> job = std::make_unique<Job>();
  // Said once, whichever processes of the job end with it.
  const auto report = [&](const std::string& message, int code) {
    if (job->fail(message)) say_on_error(message);
    return code;
  };
  try {
    Options options;
    const Command command = parse_command_line(argc, argv, options);
    return run(command, options, argv, job);
  } catch (const UsageError& error) {
    return report(error.what(), 2);
  } catch (const LaunchError& error) {
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
