// inference.cpp: see inference.h.
#include "train/inference.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>

#include "data/multiple_choice.h"
#include "train/multiple_choice_score.h"
#include "train/run_data.h"
#include "train/run_setup.h"
#include "train/sampler.h"
#include "train/standard_streams.h"
#include "train/trainer.h"
#include "train/validation.h"

namespace {

constexpr char kNoModel[] = "--model is needed: a checkpoint or another directory with weights";

// An engine without a training half, with the weights of --model.
std::unique_ptr<Engine> open_model(const Options& options, Backend& backend, RunSetup& setup, int64_t vocabulary,
                                   bool sampling) {
  if (options.was_given("memory-budget")) throw UsageError("--memory-budget is for training and plan");
  if (options.model.empty()) throw UsageError(kNoModel);
  setup = resolve({options, backend.name(), vocabulary, false, ""});
  if (!setup.source.has_weights) throw UsageError("--model " + options.model + " has no weights");
  verify_model(setup.source.path, CheckpointPart::kModel);
  setup.engine.sampling = sampling;
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

// The tokenizer of what is evaluated, for bits per byte: one that was not asked for may be missing or broken.
void find_tokenizer_if_any(RunSetup& setup) {
  try {
    find_tokenizer(setup);
    warn(setup.tokenizer_warning);
  } catch (const std::runtime_error& error) {
    if (setup.options.was_given("tokenizer")) throw;
    warn(std::string("no bits per byte: ") + error.what());
  }
}

// The loss on --val-data and, where its tokenizer is known, bits per byte.
void print_validation(Engine& engine, RunSetup& setup, int64_t vocabulary) {
  const Options& o = setup.options;
  TokenLoader loader = open_loader(o, o.val_data, setup.engine.model.vocabulary, false);
  warn(vocabulary_warning(setup, vocabulary, o.val_data));
  warn(loader.left_out());
  find_tokenizer_if_any(setup);
  const int64_t sequences = std::max<int64_t>(o.eval_batches, 0) * setup.engine.shapes.batch;
  Job job;
  const Validation result = validate(engine, loader, sequences, setup.tokenizer.get(), job);
  if (!std::isfinite(result.loss)) {
    throw std::runtime_error("the validation loss is not finite: " + o.model +
                             " holds weights that are not, or overflows in " + dtype_name(setup.engine.shapes.dtype));
  }
  std::printf("validation loss %.6f (%lld tokens)\n", result.loss, static_cast<long long>(result.tokens));
  if (const std::optional<double> bits = result.bits_per_byte())
    std::printf("bits per byte   %.6f (%lld bytes)\n", *bits, static_cast<long long>(result.bytes));
}

// How often the likeliest ending is the right one, with the standard error of a share of so many questions.
void print_score(Engine& engine, const RunSetup& setup, const MultipleChoice& file) {
  warn(vocabulary_warning(setup, file.vocabulary, setup.options.hellaswag));
  std::span<const Question> questions = file.questions;
  const int64_t batches = setup.options.eval_batches, rows = batches * setup.engine.shapes.batch;
  const auto endings = static_cast<int64_t>(questions.front().endings.size());
  if (batches > 0)
    questions = questions.first(std::min<size_t>(questions.size(), std::max<int64_t>(rows / endings, 1)));
  const MultipleChoiceScore result = score(engine, questions);
  if (result.cut > 0) {
    warn("the contexts of " + std::to_string(result.cut) + " of " + std::to_string(result.questions) +
         " questions are longer than --seq-len " + std::to_string(setup.engine.shapes.sequence) +
         " leaves room for: only their last tokens were seen");
  }
  const auto print = [&](const char* name, int64_t right) {
    const double n = static_cast<double>(result.questions), share = static_cast<double>(right) / n;
    std::printf("%s %.4f +- %.4f (%lld of %lld questions)\n", name, share, std::sqrt(share * (1 - share) / n),
                static_cast<long long>(right), static_cast<long long>(result.questions));
  };
  print("accuracy            ", result.right_by_sum);
  print("normalised accuracy ", result.right_by_mean);
}

}  // namespace

void generate(Options options) {
  check_options(options);
  options.set("micro-batch", options.engine.shapes.batch, 1);
  std::string why;
  const std::unique_ptr<Backend> backend = make_backend(options, why);
  RunSetup setup;
  const std::unique_ptr<Engine> engine = open_model(options, *backend, setup, 0, true);
  find_tokenizer(setup);
  check_prompt(setup);
  warn(setup.tokenizer_warning);
  std::printf("%s\n", sample_text(*engine, setup.tokenizer.get(), options.prompt, sampling_options(options)).c_str());
}

void evaluate(Options options) {
  check_options(options);
  std::string why;
  const std::unique_ptr<Backend> backend = make_backend(options, why);
  if (options.model.empty()) throw UsageError(kNoModel);
  std::optional<MultipleChoice> questions;
  if (!options.hellaswag.empty()) questions = read_multiple_choice(options.hellaswag);
  const bool shards = !questions || !options.val_data.empty() || !options.data.empty();
  if (shards && options.val_data.empty()) std::printf("data        %s\n", resolve_evaluation_data(options).c_str());
  const int64_t vocabulary = shards ? data_vocabulary(options, options.val_data, "--val-data") : 0;
  RunSetup setup;
  const std::unique_ptr<Engine> engine =
      open_model(options, *backend, setup, std::max(vocabulary, questions ? questions->vocabulary : 0), false);
  if (shards) print_validation(*engine, setup, vocabulary);
  if (questions) print_score(*engine, setup, *questions);
}
