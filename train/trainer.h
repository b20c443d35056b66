// trainer.h: the training loop: data, steps, evaluation, samples, checkpoints, and what is said about them on the way.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "data/token_loader.h"
#include "parallel/communicator.h"
#include "parallel/job.h"
#include "train/checkpoint.h"
#include "train/engine.h"
#include "train/metrics.h"
#include "train/run_setup.h"
#include "train/self_check.h"

class Trainer {
 public:
  // Opens the data, allocates the engine, and brings in the weights: fresh, from --model, or from `checkpoint` when
  // that is not empty, whose `state` was read from it. Every rank of the job has one; the first prints and writes.
  // Throws std::runtime_error or UsageError.
  Trainer(const RunSetup& setup, Backend& backend, Job& job, Communicator& communicator, const std::string& checkpoint,
          const TrainerState& state);

  // Trains to the last step, or to a signal, which leaves a checkpoint and says how to resume. Returns the exit code:
  // 0, or 128 + the signal when steps are left (several ranks: 0, so that no launcher takes it for a failure; a signal
  // to one of them is enough). Throws std::runtime_error naming step and last checkpoint when a loss or gradient is not
  // finite, or data cannot be read (then with a checkpoint of the step before).
  int run();

  const Engine& engine() const { return engine_; }
  // Shards, tokens, and how often this run reads them, for the banner.
  std::string data_summary() const;
  // What of the data was left out, one line each.
  const std::vector<std::string>& data_warnings() const { return data_warnings_; }
  // What of the device was checked before this run.
  const CheckedDevice& checked_device() const { return checked_device_; }
  // Why there is no validation although there are shards for it, else empty.
  const std::string& validation_problem() const { return validation_problem_; }

 private:
  StepResult train_step(uint32_t t);
  bool finite_or_skipped(uint32_t t, const StepResult& result);
  void check_results();
  void open_validation();
  int64_t validation_sequences() const;  // of one evaluation; 0: all
  void evaluate(StepMetrics& metrics);
  void print_sample(uint32_t t);
  void checkpoint(uint32_t t, const DataPosition& position);
  void checkpoint_before(uint32_t t, const DataPosition& position);
  bool first_rank() const { return job_.rank() == 0; }
  bool any_rank(bool mine);
  void check_ranks(uint32_t t);
  template <typename Work>
  void try_beside(uint32_t t, const char* without, Work&& work);
  std::string last_checkpoint() const { return last_checkpoint_.empty() ? "none yet" : last_checkpoint_; }
  void finish(uint32_t done, double step_seconds, double seconds);
  StepMetrics measure(uint32_t t, const StepResult& result, double seconds);
  nlohmann::ordered_json metrics_header() const;

  RunSetup setup_;
  Backend& backend_;
  Job& job_;
  Engine engine_;
  TokenLoader loader_;
  std::unique_ptr<TokenLoader> validation_;
  std::vector<std::string> data_warnings_;
  std::string validation_problem_;
  CheckedDevice checked_device_;
  Profiler profiler_;
  Progress progress_;
  nlohmann::ordered_json saved_options_;  // as in checkpoints
  std::unique_ptr<MetricsFile> metrics_;
  double peak_flops_ = 0;
  uint32_t first_step_ = 1;
  int64_t skipped_ = 0, skipped_in_a_row_ = 0;
  double mean_step_seconds_ = 0;  // smoothed, for the ETA
  std::string last_checkpoint_;
};

// Training shards in their random order, or validation shards (--val-data) from first to last.
TokenLoader open_loader(const Options& options, const std::string& pattern, int64_t vocabulary, bool shuffle);
