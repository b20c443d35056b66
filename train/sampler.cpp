// sampler.cpp: see sampler.h.
#include "train/sampler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "kernels/philox.h"
#include "train/interrupt.h"

namespace {

// Logits of the last position as fp32, in `values`.
void read_logits(std::vector<float>& values, const Tensor& row, Backend& backend) {
  if (row.dtype == DType::kF32) {
    backend.copy(values.data(), row.data, values.size() * sizeof(float));
    backend.synchronize();
    return;
  }
  std::vector<bf16> rounded(values.size());
  backend.copy(rounded.data(), row.data, rounded.size() * sizeof(bf16));
  backend.synchronize();
  std::transform(rounded.begin(), rounded.end(), values.begin(), [](bf16 value) { return to_float(value); });
}

// Tokens from the likeliest on, each found when it is asked for: a sample seldom looks at more than a few of them.
class Ranking {
 public:
  Ranking(const std::vector<float>& logits, const std::vector<int32_t>& allowed) {
    for (const int32_t id : allowed) heap_.push_back({logits[static_cast<size_t>(id)], id});
    std::make_heap(heap_.begin(), heap_.end(), less_likely);
  }

  int64_t size() const { return static_cast<int64_t>(heap_.size()); }

  struct Entry {
    float logit;
    int32_t id;
  };
  // The one of rank i = 0, 1, ... What has been found is at the end of the heap's memory, the likeliest last.
  const Entry& at(int64_t i) {
    for (; found_ <= i; ++found_) std::pop_heap(heap_.begin(), heap_.end() - found_, less_likely);
    return *(heap_.end() - 1 - i);
  }

 private:
  static bool less_likely(const Entry& a, const Entry& b) {
    return a.logit != b.logit ? a.logit < b.logit : a.id > b.id;
  }

  std::vector<Entry> heap_;
  int64_t found_ = 0;
};

}  // namespace

SamplingOptions sampling_options(const Options& options, uint32_t step) {
  return {.tokens = options.sample_tokens,
          .temperature = static_cast<float>(options.temperature),
          .top_k = options.top_k,
          .top_p = static_cast<float>(options.top_p),
          .seed = static_cast<uint64_t>(options.seed),
          .step = step};
}

int64_t context_begin(int64_t length, int64_t window) {
  if (length <= window) return 0;
  const int64_t half = std::max<int64_t>(window / 2, 1);
  return divide_up(length - window, half) * half;
}

int32_t choose_token(const std::vector<float>& logits, const std::vector<int32_t>& allowed,
                     const SamplingOptions& options, float uniform) {
  Ranking ranking(logits, allowed);
  const float largest = ranking.at(0).logit;
  if (options.temperature == 0) return ranking.at(0).id;
  const auto weight = [&](float logit) {
    return std::exp((static_cast<double>(logit) - largest) / options.temperature);
  };
  int64_t candidates = ranking.size();
  double total = 0;
  if (options.top_k > 0 && options.top_k < candidates) {
    candidates = options.top_k;
    for (int64_t i = 0; i < candidates; ++i) total += weight(ranking.at(i).logit);
  } else {
    for (const int32_t id : allowed) total += weight(logits[static_cast<size_t>(id)]);
  }
  if (options.top_p < 1) {
    const double enough = options.top_p * total;
    int64_t kept = 0;
    for (total = 0; kept < candidates && (kept == 0 || total < enough); ++kept) total += weight(ranking.at(kept).logit);
    candidates = kept;
  }
  double left = uniform * total;
  for (int64_t i = 0; i + 1 < candidates; ++i) {
    left -= weight(ranking.at(i).logit);
    if (left < 0) return ranking.at(i).id;
  }
  return ranking.at(candidates - 1).id;
}

void sample(Engine& engine, std::vector<int32_t> tokens, const std::vector<int32_t>& stops, const Tokenizer* tokenizer,
            const SamplingOptions& options, const std::function<void(int32_t)>& emit) {
  const int64_t vocabulary = engine.config().model.vocabulary, window = engine.config().shapes.sequence;
  std::vector<int32_t> allowed;
  for (int32_t id = 0; id < vocabulary; ++id) {
    if (!tokenizer || tokenizer->has(id)) allowed.push_back(id);
  }
  const RandomKey key{options.seed, RandomPurpose::kSampling, hash_name("sample")};
  std::vector<float> logits(static_cast<size_t>(vocabulary));
  int64_t begin = -1;
  for (int64_t i = 0; i < options.tokens && (options.to_the_end || !interrupted()); ++i) {
    const int64_t length = static_cast<int64_t>(tokens.size()), before = begin;
    begin = context_begin(length, window);
    const int64_t count = length - begin, cached = begin == before ? count - 1 : 0;
    read_logits(logits, engine.sampler().logits(tokens.data() + begin, count, 1, cached), engine.backend());
    const bool finite = std::all_of(logits.begin(), logits.end(), [](float value) { return std::isfinite(value); });
    if (!finite) throw std::runtime_error("no sample: the model's logits are not finite");
    const PhiloxWords words = philox_block(key, options.step, static_cast<uint64_t>(i / 4));
    const int32_t next = choose_token(logits, allowed, options, uniform_from_word(words.w[i % 4]));
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
  return printable(whole_characters(text));
}
