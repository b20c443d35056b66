// inference.cpp: see inference.h.
#include "train/inference.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <stdexcept>

#include "train/run_data.h"
#include "train/run_setup.h"
#include "train/sampler.h"
#include "train/standard_streams.h"
#include "train/trainer.h"

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
  if (options.val_data.empty()) std::printf("data        %s\n", resolve_evaluation_data(options).c_str());
  RunSetup setup;
  const std::unique_ptr<Engine> engine =
      open_model(options, *backend, setup, data_vocabulary(options, options.val_data, "--val-data"), false);
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
}
