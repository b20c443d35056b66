// validation.cpp: see validation.h.
#include "train/validation.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numbers>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "train/interrupt.h"

namespace {

// Of one rank's micro-batches: the sum of each one's losses, in double so that the mean does not depend on how
// sequences were grouped, and the bytes of their text; -1 where that is not known.
struct BatchSums {
  std::vector<double> losses;
  int64_t bytes = 0;

  BatchSums() = default;
  explicit BatchSums(const std::string& text) {
    std::istringstream in(text);
    in >> bytes;
    for (std::string word; in >> word;) losses.push_back(std::strtod(word.c_str(), nullptr));
  }
  std::string text() const {
    std::string text = std::to_string(bytes);
    char word[40];
    for (double loss : losses) {
      snprintf(word, sizeof word, " %a", loss);
      text += word;
    }
    return text;
  }
};

}  // namespace

std::optional<double> Validation::bits_per_byte() const {
  if (bytes == 0) return std::nullopt;
  return loss * static_cast<double>(tokens) / (std::numbers::ln2 * static_cast<double>(bytes));
}

Validation validate(Engine& engine, TokenLoader& loader, int64_t sequences, const Tokenizer* tokenizer, Job& job) {
  const ActivationShapes& shapes = engine.config().shapes;
  const int64_t available = loader.sequences_per_epoch();
  const int64_t total = sequences > 0 ? std::min(sequences, available) : available;
  const int signal_before = interrupting_signal();
  loader.rewind();
  Validation result;
  result.tokens = total * shapes.sequence;
  const int64_t ranks = job.size(), micro_batches = (total + shapes.batch - 1) / shapes.batch;
  BatchSums mine;
  // Ranks that gather weights make as many passes each; what is beyond the last micro-batch is thrown away.
  const bool together = is_spread(engine.config());
  const int64_t turns = together ? (micro_batches + ranks - 1) / ranks * ranks : micro_batches;
  for (int64_t i = job.rank(); i < turns; i += ranks) {
    if (ranks == 1 && interrupting_signal() != signal_before) throw std::runtime_error("stopped by a signal");
    // The last micro-batch goes on into the next epoch; only what is left of this one is used.
    const bool counts = i < micro_batches;
    const int64_t rows = counts ? std::min(shapes.batch, total - i * shapes.batch) : 1;
    const MicroBatch& batch = loader.next();
    if (tokenizer && counts) {
      const auto bytes = tokenizer->text_bytes(std::span(batch.targets).first(rows * shapes.sequence));
      mine.bytes = bytes && mine.bytes >= 0 ? mine.bytes + *bytes : -1;
    }
    const double loss = engine.evaluate({rows, shapes.sequence, batch.inputs.data(), batch.targets.data()});
    if (counts) mine.losses.push_back(static_cast<double>(rows * shapes.sequence) * loss);
  }
  // One after another in the order of the micro-batches, whichever ranks computed them.
  std::vector<BatchSums> all;
  for (const std::string& text : job.gather(mine.text())) all.emplace_back(text);
  double sum = 0;
  for (int64_t i = 0; i < micro_batches; ++i)
    sum += all[static_cast<size_t>(i % ranks)].losses.at(static_cast<size_t>(i / ranks));
  result.loss = sum / static_cast<double>(result.tokens);
  for (const BatchSums& sums : all)
    result.bytes = std::min(sums.bytes, result.bytes) < 0 ? -1 : result.bytes + sums.bytes;
  result.bytes = std::max<int64_t>(result.bytes, 0);
  return result;
}
