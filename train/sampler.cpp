// sampler.cpp: see sampler.h.
#include "train/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/philox.h"

namespace {

int32_t choose(std::vector<float>& logits, const SamplingOptions& options, float uniform) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  // Ties go to the lower id, so that the order is one only.
  const auto likelier = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
  if (options.temperature == 0) return *std::min_element(order.begin(), order.end(), likelier);
  const size_t candidates =
      options.top_k > 0 ? std::min<size_t>(static_cast<size_t>(options.top_k), order.size()) : order.size();
  std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(candidates), order.end(), likelier);
  double total = 0;
  std::vector<double> weights(candidates);
  for (size_t i = 0; i < candidates; ++i) {
    weights[i] = std::exp((static_cast<double>(logits[order[i]]) - logits[order[0]]) / options.temperature);
    total += weights[i];
  }
  double left = uniform * total;
  for (size_t i = 0; i < candidates; ++i) {
    left -= weights[i];
    if (left < 0) return order[i];
  }
  return order[candidates - 1];
}

}  // namespace

void sample(Engine& engine, std::vector<int32_t> tokens, int32_t end_of_text, const SamplingOptions& options,
            const std::function<void(int32_t)>& emit) {
  const int64_t vocabulary = engine.config().model.vocabulary;
  const int64_t window = engine.config().shapes.sequence;
  if (tokens.empty()) tokens.push_back(end_of_text);
  const RandomKey key{options.seed, RandomPurpose::kSampling, hash_name("sample")};
  std::vector<float> logits(static_cast<size_t>(vocabulary));
  for (int64_t i = 0; i < options.tokens; ++i) {
    const int64_t count = std::min<int64_t>(window, static_cast<int64_t>(tokens.size()));
    const Tensor row = engine.model().logits(tokens.data() + tokens.size() - count, count, 1);
    std::vector<bf16> rounded;
    if (row.dtype == DType::kF32) {
      engine.backend().copy(logits.data(), row.data, logits.size() * sizeof(float));
    } else {
      rounded.resize(logits.size());
      engine.backend().copy(rounded.data(), row.data, rounded.size() * sizeof(bf16));
    }
    engine.backend().synchronize();
    std::transform(rounded.begin(), rounded.end(), logits.begin(), [](bf16 value) { return to_float(value); });
    const PhiloxWords words = philox_block(key, options.step, static_cast<uint64_t>(i / 4));
    const float uniform = uniform_from_word(words.w[i % 4]);
    const int32_t next = choose(logits, options, uniform);
    if (next == end_of_text) return;
    tokens.push_back(next);
    emit(next);
  }
}

std::string sample_text(Engine& engine, const Tokenizer* tokenizer, const std::string& prompt,
                        const SamplingOptions& options) {
  const int32_t end_of_text =
      tokenizer ? tokenizer->end_of_text() : static_cast<int32_t>(engine.config().model.vocabulary - 1);
  std::vector<int32_t> tokens = tokenizer ? tokenizer->encode(prompt) : std::vector<int32_t>{};
  std::string text = prompt;
  sample(engine, tokens, end_of_text, options, [&](int32_t id) {
    text += tokenizer ? tokenizer->decode({&id, 1}) : " " + std::to_string(id);
  });
  return printable(text);
}
