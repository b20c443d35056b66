// trainer.cpp: see trainer.h.
#include "train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "train/file_io.h"
#include "train/interrupt.h"
#include "train/memory_advice.h"
#include "train/run_folder.h"
#include "train/sampler.h"
#include "train/standard_streams.h"
#include "train/validation.h"
#include "train/version.h"

namespace {

constexpr int64_t kDefaultEvalBatches = 20;  // of the default micro-batch

// Training data that cannot be read. A step asks for data before it updates anything with it, so the state is still
// that of the step before.
struct DataError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

TokenLoaderOptions loader_options(const Options& options, const std::string& pattern, int64_t vocabulary, bool shuffle,
                                  const Job& job = {}) {
  TokenLoaderOptions loader;
  loader.pattern = pattern;
  loader.flag = shuffle ? "--data" : "--val-data";
  loader.micro_batch = options.engine.shapes.batch;
  loader.sequence_length = options.engine.shapes.sequence;
  loader.vocabulary = vocabulary;
  loader.seed = static_cast<uint64_t>(options.seed);
  loader.shuffle = shuffle;
  loader.prefetch = shuffle;
  loader.format = options.data_format;
  loader.rank = job.rank();
  loader.ranks = job.size();
  return loader;
}

// Largest resident set of this process so far, from the kernel.
size_t peak_resident_bytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    size_t kilobytes;
    if (word == "VmHWM:" && status >> kilobytes) return kilobytes * 1024;
  }
  return 0;
}

}  // namespace

TokenLoader open_loader(const Options& options, const std::string& pattern, int64_t vocabulary, bool shuffle) {
  return TokenLoader(loader_options(options, pattern, vocabulary, shuffle));
}

Trainer::Trainer(const RunSetup& setup, Backend& backend, Job& job, Communicator& communicator,
                 const std::string& checkpoint, const TrainerState& state)
    : setup_(setup),
      backend_(backend),
      job_(job),
      engine_(setup.engine, backend, communicator),
      loader_(loader_options(setup.options, setup.options.data, setup.engine.model.vocabulary, true, job)),
      progress_(setup.options.steps, job.rank(), job.size()),
      saved_options_(options_to_json(with_absolute_paths(setup.options))) {
  const Options& o = setup_.options;
  if (job_.size() > 1) {
    agree(job_,
          {{"--data", "shards of fingerprint " + std::to_string(loader_.position().fingerprint),
            "all ranks read the same shards"},
           {"model", config_json(setup_.engine.model), "--model is another one there"},
           {"device", backend_.description(), "with another one, or other --threads, sums have other last bits"}});
  }
  if (!loader_.left_out().empty()) data_warnings_.push_back(loader_.left_out());
  if (!o.val_data.empty() && o.eval_every > 0) open_validation();
  const MemoryPlan plan = engine_.plan();
  const MemoryLimit available = available_memory_limit(backend, job);
  if (!fits({plan.device_bytes(), plan.host_bytes()}, available))
    throw std::runtime_error(memory_advice(setup, available, backend));
  bool foreign_tuning = false;
  if (!checkpoint.empty()) {
    backend_.set_tuning(state.tuning);
    const bool remembered = !backend_.tuning().empty();
    if (remembered) backend_.end_tuning();  // as in the run it goes on from, which measured in its first step only
    foreign_tuning = !state.tuning.empty() && !remembered;
  }
  // Algorithms that each rank chose by its own measurements would give each rank bits of its own.
  if (job_.size() > 1) backend_.end_tuning();
  if (o.self_check && backend.name() != "cpu") check_results();
  peak_flops_ = o.peak_tflops > 0 ? o.peak_tflops * 1e12 : backend.measure_peak_flops();
  engine_.allocate();
  std::optional<uint32_t> resumed;
  if (!checkpoint.empty()) {
    load_checkpoint(checkpoint, engine_);
    if (foreign_tuning) {
      progress_.message(
          "the checkpoint's matmul algorithms are another GPU's or another cuBLASLt's: chosen anew, the losses may "
          "differ in their last digits");
    }
    loader_.seek(state.position);
    first_step_ = state.step + 1;
    skipped_ = state.skipped;
    resumed = state.step;
    last_checkpoint_ = checkpoint;
    job_.set_last_checkpoint(checkpoint);
  } else if (setup_.source.has_weights) {
    verify_model(setup_.source.path, CheckpointPart::kModel);
    load_weights(setup_.source, engine_.store(), backend_);
  } else {
    engine_.model().initialize(static_cast<uint64_t>(o.seed));
  }
  if (!first_rank()) return;
  clean_run(o.out);
  metrics_ =
      std::make_unique<MetricsFile>(o.out, metrics_header(), resumed, std::filesystem::path(checkpoint).parent_path());
}

// A device that computes something in another way than the others has other last bits.
void Trainer::check_results() {
  constexpr double kSeconds = 1;
  PassedChecks passed;
  checked_device_ = check_device(engine_.config(), setup_.options.tf32, backend_, passed, kSeconds);
  std::string switched_off;
  for (const std::string& line : checked_device_.switched_off) switched_off += line + "; ";
  if (job_.size() > 1) agree(job_, {{"results of the device", switched_off, "not all devices compute the same"}});
}

void Trainer::open_validation() {
  const Options& o = setup_.options;
  try {
    validation_ =
        std::make_unique<TokenLoader>(loader_options(o, o.val_data, setup_.engine.model.vocabulary, false, job_));
  } catch (const TooShort& error) {
    validation_problem_ = error.what();
    return;
  }
  if (!validation_->left_out().empty()) data_warnings_.push_back(validation_->left_out());
  if (validation_->vocabulary() != loader_.vocabulary()) {
    throw UsageError("the validation shards have a vocabulary of " + std::to_string(validation_->vocabulary()) +
                     " tokens, the training shards one of " + std::to_string(loader_.vocabulary()) +
                     "; --val-data needs shards of the same tokenizer: " + o.val_data);
  }
  // A token that the model does not have is found now, not at the first evaluation.
  const int64_t all = validation_->sequences_per_epoch(), used = validation_sequences();
  for (int64_t left = used > 0 ? std::min(used, all) : all; left > 0; left -= job_.size() * o.engine.shapes.batch)
    validation_->next();
  validation_->rewind();
}

int64_t Trainer::validation_sequences() const {
  const Options& o = setup_.options;
  return o.eval_batches < 0 ? kDefaultEvalBatches * default_micro_batch(backend_.name())
                            : o.eval_batches * o.engine.shapes.batch;
}

nlohmann::ordered_json Trainer::metrics_header() const {
  return {{"options", options_to_json(setup_.options)},
          {"version", kVersion},
          {"device", backend_.description()},
          {"ranks", job_.size()},
          {"parameters", setup_.engine.model.parameter_count()},
          {"peak_flops", peak_flops_}};
}

std::string Trainer::data_summary() const {
  const Options& o = setup_.options;
  const int64_t before = loader_.position().sequence * o.engine.shapes.sequence,
                ahead = (o.steps - first_step_ + 1) * o.tokens_per_step;
  const double read = static_cast<double>(before + ahead) / static_cast<double>(loader_.tokens_per_epoch());
  char text[128];
  snprintf(text, sizeof text, "%lld shard%s, %.1fM tokens, %.2f epochs by step %lld",
           static_cast<long long>(loader_.shards()), loader_.shards() == 1 ? "" : "s",
           static_cast<double>(loader_.tokens()) / 1e6, read, static_cast<long long>(o.steps));
  return text;
}

StepResult Trainer::train_step(uint32_t t) {
  const ActivationShapes& shapes = engine_.config().shapes;
  const bool two_passes = engine_.gradients().needs_norm_pass();
  const DataPosition start = loader_.position();
  int passes = 0;
  const float lr = learning_rate(setup_.options.schedule, t, static_cast<uint32_t>(setup_.options.steps));
  return engine_.step(t, lr, [&](int i) {
    try {
      if (two_passes && i == 0 && passes++ == 1) loader_.seek(start);  // the same micro-batches once more
      const MicroBatch& batch = loader_.next();
      return HostBatch{
          shapes.batch,           shapes.sequence,           batch.inputs.data(),         batch.targets.data(),
          batch.group_ids.data(), batch.group_starts.data(), batch.group_positions.data()};
    } catch (const std::runtime_error& error) {
      throw DataError(error.what());
    }
  });
}

bool Trainer::finite_or_skipped(uint32_t t, const StepResult& result) {
  const Options& o = setup_.options;
  const bool finite_loss = std::isfinite(result.loss);
  const bool finite_norm = std::isfinite(result.grad_norm);
  if (finite_loss && finite_norm && result.applied) {
    skipped_in_a_row_ = 0;
    return true;
  }
  const std::string what = !finite_loss ? "loss" : !finite_norm ? "gradient norm" : "factor of a projection";
  // Under fused updates weights were already updated when a gradient turned out not to be finite.
  const bool undone =
      !finite_loss ||
      (!finite_norm && (o.engine.gradients.kind != GradientMode::kFused || engine_.gradients().needs_norm_pass()));
  std::string why = "step " + std::to_string(t) + ": the " + what + " is not finite";
  if (o.skip_nonfinite && undone) {
    ++skipped_;
    ++skipped_in_a_row_;
    if (skipped_in_a_row_ < o.max_skips) {
      progress_.message(why + ", update skipped (" + std::to_string(skipped_) + " so far)");
      return false;
    }
    why += ", as in every one of the last " + std::to_string(skipped_in_a_row_) + " (--max-skips)";
  }
  progress_.finish();
  throw std::runtime_error(why + "; last good checkpoint: " + last_checkpoint());
}

StepMetrics Trainer::measure(uint32_t t, const StepResult& result, double seconds) {
  const Options& o = setup_.options;
  StepMetrics m;
  m.step = t;
  // The tokens of a step may have been others before a resume.
  m.tokens = loader_.position().sequence * o.engine.shapes.sequence;
  m.loss = result.loss;
  m.grad_norm = result.grad_norm;
  m.lr = result.lr;
  m.step_ms = 1e3 * seconds;
  m.tokens_per_second = static_cast<double>(o.tokens_per_step) / seconds;
  m.mfu =
      m.tokens_per_second * setup_.engine.model.flops_per_token(o.engine.shapes.sequence) / (peak_flops_ * job_.size());
  m.device_bytes = backend_.allocated_bytes();
  m.skipped = skipped_;
  const double share = mean_step_seconds_ == 0 ? 1.0 : 0.05;
  mean_step_seconds_ += share * (seconds - mean_step_seconds_);
  return m;
}

void Trainer::evaluate(StepMetrics& metrics) {
  const Validation result = validate(engine_, *validation_, validation_sequences(), setup_.tokenizer.get(), job_);
  metrics.val_loss = static_cast<float>(result.loss);
  metrics.val_bits_per_byte = result.bits_per_byte();
  char text[128], bits[48] = "";
  if (metrics.val_bits_per_byte) snprintf(bits, sizeof bits, ", %.4f bits per byte", *metrics.val_bits_per_byte);
  snprintf(text, sizeof text, "step %u: validation loss %.4f (%lld tokens)%s", metrics.step, *metrics.val_loss,
           static_cast<long long>(result.tokens), bits);
  progress_.message(text);
}

void Trainer::print_sample(uint32_t t) {
  const Options& o = setup_.options;
  SamplingOptions options = sampling_options(o, t);
  options.to_the_end = is_spread(engine_.config());
  const std::string text = sample_text(engine_, setup_.tokenizer.get(), o.prompt, options);
  progress_.message("---- sample at step " + std::to_string(t) + "\n" + text + "\n----");
  if (metrics_) metrics_->write_sample(t, text);
}

// Something beside the training itself: when it fails, that is said and the run goes on. With several ranks it does
// not: the others are in the middle of the same.
template <typename Work>
void Trainer::try_beside(uint32_t t, const char* without, Work&& work) {
  try {
    work();
  } catch (const std::exception& error) {
    const std::string problem = "step " + std::to_string(t) + ": " + without + ": " + message_of(error);
    if (job_.size() > 1) throw std::runtime_error(problem + "; last checkpoint: " + last_checkpoint());
    warn(problem);
  }
}

// True on every rank when it is on one of them.
bool Trainer::any_rank(bool mine) {
  if (job_.size() == 1) return mine;
  for (const std::string& text : job_.gather(mine ? "1" : "0"))
    if (text == "1") return true;
  return false;
}

// Weights and states have the same bits on every rank, because each made the same updates.
void Trainer::check_ranks(uint32_t t) {
  if (job_.size() == 1) return;
  const std::string difference = first_difference(job_.gather(tensor_checksums(engine_)));
  if (difference.empty()) return;
  throw std::runtime_error("step " + std::to_string(t) + ": the ranks have drifted apart: " + difference +
                           "; last checkpoint: " + last_checkpoint());
}

// The first rank writes, the others wait for it.
void Trainer::checkpoint(uint32_t t, const DataPosition& position) {
  const Options& o = setup_.options;
  check_ranks(t);
  if (!first_rank()) {
    take_part_in_checkpoint(engine_);
    last_checkpoint_ = job_.gather("").front();
    job_.set_last_checkpoint(last_checkpoint_);
    return;
  }
  const TrainerState state{t, skipped_, position, saved_options_, backend_.tuning()};
  // In the middle of skipped updates an older checkpoint may be the last one that learned anything: all are kept.
  const int64_t keep = skipped_in_a_row_ > 0 ? 0 : o.keep_checkpoints;
  try {
    last_checkpoint_ = save_checkpoint(o.out, state, engine_, setup_.checkpoint_files, keep);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error("step " + std::to_string(t) + ": no checkpoint is written: " + message_of(error) +
                             "; last checkpoint: " + last_checkpoint());
  }
  job_.gather(last_checkpoint_);
  job_.set_last_checkpoint(last_checkpoint_);
  say_when_interrupted(t, last_checkpoint_);
}

// The state before step t, whose data could not be read: no update of step t has begun.
void Trainer::checkpoint_before(uint32_t t, const DataPosition& position) {
  progress_.finish();
  if (t == first_step_ || job_.size() > 1) return;  // nothing was learned, or the other ranks are in step t
  try {
    checkpoint(t - 1, position);
  } catch (const std::runtime_error& error) {
    warn(error.what());
  }
}

int Trainer::run() {
  const Options& o = setup_.options;
  const uint32_t steps = static_cast<uint32_t>(o.steps);
  say_when_interrupted(first_step_, last_checkpoint_);
  watch_for_interrupts();
  const auto run_start = std::chrono::steady_clock::now();
  if (o.profile) backend_.profiler = &profiler_;
  double step_seconds = 0;
  uint32_t done = steps;
  bool owed = false;  // a checkpoint that was due at a step without an update
  const auto due = [](uint32_t t, int64_t every) { return every > 0 && t % static_cast<uint32_t>(every) == 0; };
  if (first_step_ == 1 && o.sample_every > 0) try_beside(0, "no sample", [&] { print_sample(0); });
  for (uint32_t t = first_step_; t <= steps; ++t) {
    say_when_interrupted(t, last_checkpoint_);
    const auto start = std::chrono::steady_clock::now();
    const DataPosition position = loader_.position();
    StepResult result;
    try {
      result = train_step(t);
    } catch (const std::runtime_error& error) {
      if (dynamic_cast<const DataError*>(&error)) checkpoint_before(t, position);
      progress_.finish();
      throw std::runtime_error("step " + std::to_string(t) + ": " + error.what() +
                               "; last checkpoint: " + last_checkpoint());
    }
    backend_.end_tuning();
    if (const std::string slow = backend_.slow_products(); t == first_step_ && !slow.empty()) progress_.message(slow);
    const double seconds = seconds_since(start);
    step_seconds += seconds;
    const bool updated = finite_or_skipped(t, result);
    StepMetrics metrics = measure(t, result, seconds);
    const bool last = t == steps;
    // What the ranks do together is decided once a step; one process alone answers at any moment.
    const bool stop_all = any_rank(interrupted());
    const auto stopping = [&] { return job_.size() > 1 ? stop_all : interrupted(); };
    if (due(t, o.check_ranks)) check_ranks(t);
    if (updated && (due(t, o.log_every) || last || stopping()))
      progress_.step(metrics, (steps - t) * mean_step_seconds_);
    backend_.profiler = nullptr;
    // Evaluations, samples and the metrics file come beside the run: none of them may cost it its checkpoint.
    if (validation_ && (last || (due(t, o.eval_every) && !stopping())))
      try_beside(t, "no validation loss", [&] { evaluate(metrics); });
    std::string unwritten;
    try {
      if (metrics_) metrics_->write(metrics);
    } catch (const std::runtime_error& error) {
      unwritten = error.what();
    }
    const bool stop = stopping() || any_rank(!unwritten.empty());
    owed = owed || due(t, o.checkpoint_every);
    const bool saved = (owed && updated) || last || stop;
    if (saved) {
      checkpoint(t, loader_.position());
      owed = false;
    }
    if (!unwritten.empty()) {
      progress_.finish();
      throw std::runtime_error("step " + std::to_string(t) + ": " + unwritten +
                               "; last checkpoint: " + last_checkpoint_);
    }
    if ((due(t, o.sample_every) || (last && o.sample_every > 0)) && !stop)
      try_beside(t, "no sample", [&] { print_sample(t); });
    if (stopping()) {
      if (!saved) checkpoint(t, loader_.position());  // the signal came while the sample was made
      done = t;
      break;
    }
    if (o.profile) backend_.profiler = &profiler_;
  }
  backend_.profiler = nullptr;
  finish(done, step_seconds, seconds_since(run_start));
  return done < steps && job_.size() == 1 ? 128 + interrupting_signal() : 0;
}

// The last lines: what was done, and how to go on.
void Trainer::finish(uint32_t done, double step_seconds, double seconds) {
  const Options& o = setup_.options;
  progress_.finish();
  if (o.profile && first_rank()) std::fputs(profile_table(profiler_, step_seconds).c_str(), stdout);
  std::string summary = "trained " + std::to_string(done - first_step_ + 1) + " steps in " + format_duration(seconds) +
                        "; peak memory " + format_bytes(backend_.allocated_bytes()) + " on the device (planned), " +
                        format_bytes(peak_resident_bytes()) + " resident";
  const Communicator& communicator = engine_.communicator();
  if (job_.size() > 1 && done >= first_step_) {
    const double steps = done - first_step_ + 1;
    const CommunicationTimes times = communicator.times();
    char text[160];
    snprintf(text, sizeof text, "%d ranks: each sent %.1f MB a step", job_.size(),
             static_cast<double>(communicator.bytes_sent()) / 1e6 / steps);
    std::string line = text;
    if (times.busy > 0) {
      snprintf(text, sizeof text, ", %.0f ms a step on the way, of which %.0f ms waited for", 1e3 * times.busy / steps,
               1e3 * times.waited / steps);
      line += text;
    }
    progress_.message(line);
  }
  if (skipped_ > 0) summary += "; " + std::to_string(skipped_) + " updates skipped";
  progress_.message(summary);
  progress_.message("checkpoint: " + last_checkpoint_);
  if (done < o.steps) {
    progress_.message("interrupted after step " + std::to_string(done) + "; go on with: ./train_gpt2 --resume " +
                      o.out);
  }
}
