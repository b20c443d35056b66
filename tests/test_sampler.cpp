// test_sampler.cpp: samples of text: which token is chosen by given logits, against sums over sorted probabilities; and
// that keys and values which are kept give what a full forward pass for each token gives.
#include "train/sampler.h"

#include <algorithm>
#include <random>
#include <set>

#include "tests/training_run.h"

namespace {

// ---- the choice of a token

std::vector<int32_t> all_of(int64_t vocabulary) {
  std::vector<int32_t> ids(static_cast<size_t>(vocabulary));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

Floats random_logits(uint32_t seed, int64_t vocabulary, float stddev) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, stddev);
  Floats logits(static_cast<size_t>(vocabulary));
  for (float& logit : logits) logit = normal(generator);
  return logits;
}

struct Likely {
  double probability;
  int32_t id;
};

// The tokens that may be drawn, the likeliest first, with the probabilities they are drawn by. All steps as they are
// defined, each over a list that is sorted in full.
std::vector<Likely> reference(const Floats& logits, const std::vector<int32_t>& allowed, const SamplingOptions& o) {
  std::vector<Likely> list;
  for (const int32_t id : allowed)
    list.push_back({static_cast<double>(logits[static_cast<size_t>(id)]) / o.temperature, id});
  std::sort(list.begin(), list.end(), [](const Likely& a, const Likely& b) {
    return a.probability != b.probability ? a.probability > b.probability : a.id < b.id;
  });
  if (o.top_k > 0 && o.top_k < static_cast<int64_t>(list.size())) list.resize(static_cast<size_t>(o.top_k));
  const auto normalize = [&] {
    double sum = 0;
    for (const Likely& token : list) sum += token.probability;
    for (Likely& token : list) token.probability /= sum;
  };
  const double largest = list[0].probability;
  for (Likely& token : list) token.probability = std::exp(token.probability - largest);
  normalize();
  if (o.top_p < 1) {
    double sum = 0;
    size_t kept = 0;
    while (kept < list.size() && sum < o.top_p) sum += list[kept++].probability;
    list.resize(kept);
    normalize();
  }
  return list;
}

// Every token that can be drawn is drawn for the uniform numbers in its share of [0, 1), and no other.
TEST(ChooseToken, FollowsTemperatureThenTopKThenTopP) {
  const int64_t V = 300;
  std::vector<int32_t> some;
  for (int32_t id = 3; id < V; id += 4) some.push_back(id);
  for (const float temperature : {0.4f, 1.0f, 3.0f}) {
    for (const int64_t top_k : {0, 1, 7, 1000}) {
      for (const float top_p : {1e-6f, 0.3f, 0.9f, 0.999f, 1.0f}) {
        for (const std::vector<int32_t>& allowed : {all_of(V), some}) {
          const SamplingOptions options{.temperature = temperature, .top_k = top_k, .top_p = top_p};
          const Floats logits = random_logits(7, V, 2.0f);
          const std::vector<Likely> expected = reference(logits, allowed, options);
          double begin = 0;
          for (const Likely& token : expected) {
            const double share = token.probability;
            for (const double part : {0.01, 0.5, 0.99}) {
              if (share < 1e-5) continue;  // a step of a float
              const float uniform = static_cast<float>(begin + part * share);
              ASSERT_EQ(choose_token(logits, allowed, options, uniform), token.id)
                  << "temperature " << temperature << " top-k " << top_k << " top-p " << top_p << " at " << uniform;
            }
            begin += share;
          }
          EXPECT_EQ(choose_token(logits, allowed, options, 0.0f), expected.front().id);
        }
      }
    }
  }
}

// Probabilities 1/2, 1/4, 1/8, 1/8: exact sums, so that it shows which token reaches p.
TEST(ChooseToken, TopPIsTheSmallestSetThatReachesIt) {
  const float step = std::log(2.0f);
  const Floats logits = {-2 * step, 0, -step, -2 * step};
  const auto drawn = [&](float top_p, int64_t top_k) {
    std::vector<int32_t> ids;
    for (int i = 0; i < 1024; ++i) {
      const float uniform = static_cast<float>(i) / 1024;
      const int32_t id = choose_token(logits, all_of(4), {.temperature = 1, .top_k = top_k, .top_p = top_p}, uniform);
      if (ids.empty() || ids.back() != id) ids.push_back(id);
    }
    return ids;
  };
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(drawn(0.4f, 0), Ids({1}));
  EXPECT_EQ(drawn(0.6f, 0), Ids({1, 2}));
  EXPECT_EQ(drawn(0.74f, 0), Ids({1, 2}));
  EXPECT_EQ(drawn(0.8f, 0), Ids({1, 2, 0}));  // of two that are alike the lower id
  EXPECT_EQ(drawn(0.9f, 0), Ids({1, 2, 0, 3}));
  EXPECT_EQ(drawn(1.0f, 0), Ids({1, 2, 0, 3}));
  EXPECT_EQ(drawn(0.6f, 2), Ids({1}));  // of the two that top-k has left it has 2/3
  EXPECT_EQ(drawn(0.7f, 2), Ids({1, 2}));
}

TEST(ChooseToken, TheLikeliestOfWhatIsAllowed) {
  const Floats logits = {5, 9, 7, 7};
  EXPECT_EQ(choose_token(logits, all_of(4), {.temperature = 0}, 0.9f), 1);
  EXPECT_EQ(choose_token(logits, {0, 2, 3}, {.temperature = 0}, 0.9f), 2);
  EXPECT_EQ(choose_token(logits, {0, 3, 2}, {.top_k = 1}, 0.9f), 2);
  EXPECT_EQ(choose_token({-3e38f, 3e38f, 0}, all_of(3), {.temperature = 1e-3f, .top_k = 0}, 0.99f), 1);
}

// ---- which tokens it is chosen by

TEST(ContextBegin, DropsTheOlderHalfOfAFullWindow) {
  EXPECT_EQ(context_begin(1, 8), 0);
  EXPECT_EQ(context_begin(8, 8), 0);
  EXPECT_EQ(context_begin(9, 8), 4);
  EXPECT_EQ(context_begin(12, 8), 4);
  EXPECT_EQ(context_begin(13, 8), 8);
  EXPECT_EQ(context_begin(1000, 8), 992);
  for (const int64_t window : {1, 2, 3, 8, 13}) {
    for (int64_t length = 1, before = 0; length < 5 * window; ++length) {
      const int64_t begin = context_begin(length, window), count = length - begin;
      EXPECT_LE(count, window);
      EXPECT_GE(count, length <= window ? length : window - std::max<int64_t>(window / 2, 1) + 1);
      EXPECT_TRUE(begin == before || length - before > window) << "dropped before the window was full";
      before = begin;
    }
  }
}

// ---- kept keys and values against full forward passes

EngineConfig sampling_config(DType dtype, DType weight_dtype, int64_t window) {
  EngineConfig config;
  config.model.vocabulary = 131, config.model.positions = 40, config.model.layers = 2;
  config.model.heads = 3, config.model.channels = 72, config.model.tied_head = false;
  config.shapes = {.sequence = window, .head_chunk = 2, .dtype = dtype, .training = false};
  config.weight_dtype = weight_dtype;
  config.sampling = true;
  return config;
}

// Random weights that bf16 can hold, and large ones, so that what comes next depends on all of the text before: with a
// head of its own the likeliest tokens are many.
void randomize(Engine& engine, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  HeldLayer<ParameterStore> held(engine.store());
  for (const Parameter& p : engine.store().parameters()) {
    held.hold(p.layer, Access::kOverwrite);
    const bool scale = p.name.find("ln_") != std::string::npos && p.name.find("weight") != std::string::npos;
    Floats values(static_cast<size_t>(p.elements()));
    for (float& value : values) value = to_float(from_float<bf16>(normal(generator) + (scale ? 1.0f : 0.0f)));
    engine.store().assign(p, [&](Tensor rows, int64_t begin) {
      const auto first = values.begin() + begin * p.cols;
      upload_floats(engine.backend(), rows, Floats(first, first + rows.elements()));
    });
  }
}

std::vector<int32_t> random_tokens(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<int32_t>(generator() % 131));
  return tokens;
}

Floats last_logits(Engine& engine, Gpt2& model, const int32_t* tokens, int64_t count, int64_t cached) {
  const Tensor row = model.logits(tokens, count, 1, cached);
  Floats values = download_floats(engine.backend(), row);
  values.resize(static_cast<size_t>(engine.config().model.vocabulary));
  return values;
}

// 21 tokens one by one, after prompts of several lengths.
void expect_logits_of_full_passes(Engine& engine, double allowed) {
  constexpr int64_t kTokens = 21;
  const std::vector<int32_t> tokens = random_tokens(kTokens, 5);
  const std::vector<int64_t> prompts = {1, 12, kTokens};
  std::vector<std::vector<Floats>> kept;  // all of them first, because a full pass takes the memory
  for (const int64_t prompt : prompts) {
    kept.emplace_back(kTokens + 1);
    for (int64_t count = prompt; count <= kTokens; ++count) {
      const int64_t cached = count > prompt ? count - 1 : 0;
      kept.back()[static_cast<size_t>(count)] = last_logits(engine, engine.sampler(), tokens.data(), count, cached);
    }
  }
  for (int64_t count = 1; count <= kTokens; ++count) {
    const Floats full = last_logits(engine, engine.model(), tokens.data(), count, 0);
    for (size_t i = 0; i < prompts.size(); ++i) {
      if (count < prompts[i]) continue;
      EXPECT_LE(distance(kept[i][static_cast<size_t>(count)], full), allowed)
          << "prompt " << prompts[i] << ", token " << count;
    }
  }
}

// The likeliest tokens, each by a full forward pass over its context.
std::vector<int32_t> greedy_by_full_passes(Engine& engine, std::vector<int32_t> tokens, int64_t count) {
  std::vector<int32_t> chosen;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = static_cast<int64_t>(tokens.size());
    const int64_t begin = context_begin(length, engine.config().shapes.sequence);
    const Floats logits = last_logits(engine, engine.model(), &tokens[static_cast<size_t>(begin)], length - begin, 0);
    chosen.push_back(static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    tokens.push_back(chosen.back());
  }
  return chosen;
}

std::vector<int32_t> greedy_sample(Engine& engine, const std::vector<int32_t>& prompt, int64_t count) {
  std::vector<int32_t> chosen;
  const SamplingOptions options{.tokens = count, .temperature = 0};
  sample(engine, prompt, {}, nullptr, options, [&](int32_t id) { chosen.push_back(id); });
  return chosen;
}

struct Setting {
  DType dtype, weight_dtype;
  double allowed;
};
const Setting kSettings[] = {{DType::kF32, DType::kF32, 2e-5},
                             {DType::kF32, DType::kI8, 2e-5},
                             {DType::kF32, DType::kBF16, 2e-5},
                             {DType::kBF16, DType::kBF16, 2e-2},
                             {DType::kBF16, DType::kI8, 2e-2}};

TEST(Cache, LogitsAreThoseOfAFullPass) {
  for (const Setting& setting : kSettings) {
    SCOPED_TRACE(std::string(dtype_name(setting.dtype)) + ", weights " + dtype_name(setting.weight_dtype));
    EngineConfig config = sampling_config(setting.dtype, setting.weight_dtype, 21);
    config.model.tied_head = setting.weight_dtype == DType::kF32;
    const std::unique_ptr<Backend> backend = make_test_backend();
    Engine engine(config, *backend);
    engine.allocate();
    EXPECT_EQ(backend->allocated_bytes(), engine.plan().device_bytes());
    randomize(engine, 2);
    expect_logits_of_full_passes(engine, setting.allowed);
  }
}

// Odd windows, prompts that are shorter, as long and much longer, and texts that outgrow the window several times.
TEST(Cache, SameTokensAsByFullPasses) {
  for (const auto& [weights, window] : std::initializer_list<std::pair<DType, int64_t>>{
           {DType::kF32, 1}, {DType::kF32, 2}, {DType::kF32, 13}, {DType::kI8, 13}}) {
    const std::unique_ptr<Backend> backend = make_test_backend();
    Engine engine(sampling_config(DType::kF32, weights, window), *backend);
    engine.allocate();
    randomize(engine, 3);
    for (const int64_t length : {1, 13, 50}) {
      const std::vector<int32_t> prompt = random_tokens(length, static_cast<uint32_t>(length));
      const std::vector<int32_t> chosen = greedy_sample(engine, prompt, 45);
      EXPECT_EQ(chosen, greedy_by_full_passes(engine, prompt, 45)) << "window " << window << ", prompt " << length;
      const size_t different = std::set<int32_t>(chosen.begin(), chosen.end()).size();
      EXPECT_GT(different, window == 13 ? 10u : 0u);
      // A text goes on as it would have when it comes in two parts.
      std::vector<int32_t> longer = prompt;
      longer.insert(longer.end(), chosen.begin(), chosen.begin() + 25);
      EXPECT_EQ(greedy_sample(engine, longer, 20), std::vector<int32_t>(chosen.begin() + 25, chosen.end()));
    }
  }
}

TEST(Cache, OneTokenComesAfterWhatIsKept) {
  const std::unique_ptr<Backend> backend = make_test_backend();
  Engine engine(sampling_config(DType::kF32, DType::kF32, 5), *backend);
  engine.allocate();
  randomize(engine, 3);
  const std::vector<int32_t> tokens = random_tokens(6, 1);
  EXPECT_THROW(engine.sampler().logits(tokens.data(), 6, 1), std::logic_error);
  EXPECT_THROW(engine.sampler().logits(tokens.data(), 6, 1, 5), std::logic_error);
  EXPECT_THROW(engine.sampler().logits(tokens.data(), 4, 1, 2), std::logic_error);
  EXPECT_THROW(engine.model().logits(tokens.data(), 4, 1, 3), std::logic_error);
}

// ---- between the steps of a run

// At every recompute level and with everything in host memory: what a run learns does not depend on samples, the plan
// is what is allocated, and a sample has the tokens of full passes.
TEST(SamplesOfARun, ChangeNothing) {
  const Offload everything = {.activations = true, .state = true, .weights = true};
  for (const Offload& offload : {Offload{}, everything}) {
    for (const auto& [level, name] : kRecomputeNames) {
      if (offload.weights && level != Recompute::kNone && level != Recompute::kBlock) continue;
      SCOPED_TRACE(std::string(name) + ", offload " + std::to_string(offload.weights));
      EngineConfig config = small_config(DType::kF32);
      config.gradients.kind = GradientMode::kFused;
      config.shapes.recompute = level;
      config.offload = offload;
      const Outcome without = train(test_backend_name(), config, 2e-3f, 2);
      config.sampling = true;
      const std::vector<int32_t> prompt = {4, 5, 6};
      const Outcome with = train(test_backend_name(), config, 2e-3f, 2, [&](Engine& engine) {
        expect_logits_of_full_passes(engine, 2e-5);
        const std::vector<int32_t> chosen = greedy_sample(engine, prompt, 35);
        EXPECT_EQ(chosen, greedy_by_full_passes(engine, prompt, 35));
      });
      EXPECT_EQ(with.losses, without.losses);
      EXPECT_TRUE(with.bits == without.bits);
      EXPECT_EQ(with.planned, with.allocated);
      EXPECT_EQ(with.planned, without.planned);  // it all lies where a step has its activations and gradients
    }
  }
}

// ---- the text

// A model that writes the tokens of a script, whatever the text before: blocks of zeros, one channel for each position,
// and a head that has learned by heart what comes after it.
class Script {
 public:
  explicit Script(const std::vector<int32_t>& script) : backend_(make_test_backend()) {
    EngineConfig config;
    config.model.vocabulary = 257, config.model.positions = config.model.channels = 32, config.model.layers = 1;
    config.model.heads = 1, config.model.tied_head = false;
    config.shapes = {.sequence = 32, .training = false};
    config.sampling = true;
    engine_ = std::make_unique<Engine>(config, *backend_);
    engine_->allocate();
    for (const Parameter& p : engine_->store().parameters()) {
      Floats values(static_cast<size_t>(p.elements()), p.name == "ln_f.weight" ? 1.0f : 0.0f);
      for (size_t i = 0; i < 32 && p.name == "wpe.weight"; ++i) values[33 * i] = 1.0f;
      for (size_t i = 0; i < script.size() && p.name == "lm_head.weight"; ++i)
        values[static_cast<size_t>(script[i]) * 32 + i] = 1.0f;
      upload_floats(*backend_, engine_->store().weight(p), values);
    }
  }

  std::string text(const Tokenizer* tokenizer, const std::string& prompt, int64_t tokens) {
    return sample_text(*engine_, tokenizer, prompt, {.tokens = tokens, .temperature = 0});
  }

 private:
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Engine> engine_;
};

TEST(SampleText, StopsAtTheEndOfTheText) {
  const Tokenizer bytes = Tokenizer::bytes();
  Script script({'a', 'b', 'c', 256, 'd', 'e'});
  EXPECT_EQ(script.text(&bytes, "x", 2), "xab");
  EXPECT_EQ(script.text(&bytes, "x", 30), "xabc");
  EXPECT_EQ(script.text(&bytes, "", 30), "abc");          // begins behind an end of text
  EXPECT_EQ(script.text(&bytes, "12345", 2), "12345de");  // as it stands in the script behind five tokens
  EXPECT_EQ(script.text(nullptr, "", 3), "97 98 99");
}

TEST(SampleText, EndsWithAWholeCharacter) {
  const Tokenizer bytes = Tokenizer::bytes();
  Script euro({'a', 0xe2, 0x82, 0xac, 0xff, 'b'});
  EXPECT_EQ(euro.text(&bytes, "x", 1), "xa");
  EXPECT_EQ(euro.text(&bytes, "x", 2), "xa");
  EXPECT_EQ(euro.text(&bytes, "x", 3), "xa");
  EXPECT_EQ(euro.text(&bytes, "x", 4), "xa\xe2\x82\xac");
  EXPECT_EQ(euro.text(&bytes, "x", 5), "xa\xe2\x82\xac\xef\xbf\xbd");  // no character begins with this byte
  EXPECT_EQ(euro.text(&bytes, "x", 6),
            "xa\xe2\x82\xac\xef\xbf\xbd"
            "b");
  Script broken({0xe2, 0x82, 'b', 0xc3, 256});
  EXPECT_EQ(broken.text(&bytes, "x", 3),
            "x\xef\xbf\xbd\xef\xbf\xbd"
            "b");
  EXPECT_EQ(broken.text(&bytes, "x", 30),
            "x\xef\xbf\xbd\xef\xbf\xbd"
            "b");  // the model itself left it at that
}

}  // namespace
