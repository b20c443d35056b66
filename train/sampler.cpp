// sampler.cpp: see sampler.h.
#include "train/sampler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "kernels/philox.h"
#include "train/interrupt.h"

namespace {

// The next token: one of `allowed`, whose order breaks ties.
int32_t choose(const std::vector<float>& logits, const std::vector<int32_t>& allowed, const SamplingOptions& options,
               float uniform) {
  std::vector<int32_t> order = allowed;
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

void sample(Engine& engine, std::vector<int32_t> tokens, const std::vector<int32_t>& stops, const Tokenizer* tokenizer,
            const SamplingOptions& options, const std::function<void(int32_t)>& emit) {
  const int64_t vocabulary = engine.config().model.vocabulary;
  const int64_t window = engine.config().shapes.sequence;
  std::vector<int32_t> allowed;
  for (int32_t id = 0; id < vocabulary; ++id) {
    if (!tokenizer || tokenizer->has(id)) allowed.push_back(id);
  }
  const RandomKey key{options.seed, RandomPurpose::kSampling, hash_name("sample")};
  std::vector<float> logits(static_cast<size_t>(vocabulary));
  for (int64_t i = 0; i < options.tokens && !interrupted(); ++i) {
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
    const bool finite = std::all_of(logits.begin(), logits.end(), [](float value) { return std::isfinite(value); });
    if (!finite) throw std::runtime_error("no sample: the model's logits are not finite");
    const int32_t next = choose(logits, allowed, options, uniform);
    if (std::find(stops.begin(), stops.end(), next) != stops.end()) return;
    tokens.push_back(next);
    emit(next);
  }
}

std::string sample_text(Engine& engine, const Tokenizer* tokenizer, const std::string& prompt,
                        const SamplingOptions& options) {
  const std::vector<int64_t> known = engine.config().model.stop_tokens();
  std::vector<int32_t> stops(known.begin(), known.end());
  if (tokenizer) stops.push_back(tokenizer->end_of_text());
  std::vector<int32_t> tokens = tokenizer ? tokenizer->encode(prompt) : std::vector<int32_t>{};
  if (tokens.empty()) tokens.push_back(stops.back());
  std::string text = tokenizer ? prompt : "";
  sample(engine, tokens, stops, tokenizer, options, [&](int32_t id) {
    if (!tokenizer && !text.empty()) text += " ";
    text += tokenizer ? tokenizer->decode({&id, 1}) : std::to_string(id);
  });
  return printable(text);
}
