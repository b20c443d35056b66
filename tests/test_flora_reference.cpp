// test_flora_reference.cpp: the optimizers and compressed gradients against tests/fixtures/flora_reference.json.gz,
// which a numpy reference made from the formulas alone (tests/reference/README.md describes the file).
#include <gtest/gtest.h>
#include <zlib.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <vector>

#include "flora/gradients.h"
#include "flora/optimizers.h"
#include "kernels/backend.h"
#include "kernels/memory_plan.h"
#include "tests/backends.h"

namespace {

using nlohmann::json;

constexpr const char* kFixture = "tests/fixtures/flora_reference.json.gz";

std::string read_gzip(const char* path) {
  std::string text;
  gzFile file = gzopen(path, "rb");
  if (!file) return text;
  std::vector<char> buffer(1 << 16);
  for (int count; (count = gzread(file, buffer.data(), static_cast<unsigned>(buffer.size()))) > 0;) {
    text.append(buffer.data(), static_cast<size_t>(count));
  }
  gzclose(file);
  return text;
}

// Empty when the file is missing or damaged; FloraFixture.IsThere says so.
const json& fixture() {
  static const json value = json::parse(read_gzip(kFixture), nullptr, false);
  return value;
}

struct Case {
  std::string name;
  json data;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

std::vector<Case> load_cases() {
  std::vector<Case> cases;
  if (fixture().is_object()) {
    for (const json& c : fixture().at("cases")) cases.push_back({c.at("name").get<std::string>(), c});
  }
  return cases;
}

// ---- the inputs, from the formulas of the README

uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

std::vector<float> uniform_input(const std::string& name, int64_t count) {
  const uint64_t base = static_cast<uint64_t>(hash_name(name.c_str())) << 32;
  std::vector<float> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    values[static_cast<size_t>(i)] =
        static_cast<float>(splitmix64(base + static_cast<uint64_t>(i)) >> 40) * 0x1p-23f - 1.0f;
  }
  return values;
}

std::vector<float> gradient_input(const std::string& name, int64_t rows, int64_t cols, int64_t t) {
  std::vector<float> values = uniform_input(name, rows * cols);
  for (int64_t i = 0; i < rows * cols; ++i) {
    values[static_cast<size_t>(i)] *= std::exp2(-static_cast<float>((t + i / cols) % 3));
  }
  return values;
}

// ---- options by name

template <typename T>
T pick(const json& value, const std::map<std::string, T>& names) {
  return names.at(value.get<std::string>());
}

const std::map<std::string, DType> kDTypes = {
    {"fp32", DType::kF32}, {"bf16", DType::kBF16}, {"int8", DType::kI8}, {"uint8", DType::kU8}};
const std::map<std::string, ProjectionKind> kProjections = {{"gaussian", ProjectionKind::kGaussian},
                                                            {"rademacher", ProjectionKind::kRademacher},

                                                            {"cosine", ProjectionKind::kCosine}};

OptimizerConfig read_options(const json& o) {
  OptimizerConfig config;
  config.kind = pick<OptimizerKind>(o.at("kind"), {{"flora", OptimizerKind::kFlora},
                                                   {"adamw", OptimizerKind::kAdamW},
                                                   {"adafactor", OptimizerKind::kAdafactor},
                                                   {"sgd", OptimizerKind::kSgd}});
  config.state_dtype = pick(o.at("state_dtype"), kDTypes);
  config.projection = pick(o.at("projection"), kProjections);
  config.transfer = pick<TransferKind>(o.at("transfer"), {{"reencode", TransferKind::kReencode},
                                                          {"unbiased", TransferKind::kUnbiased},
                                                          {"restart", TransferKind::kRestart},
                                                          {"rescale", TransferKind::kRescale}});
  config.seed = o.at("seed").get<uint64_t>();
  config.rank = o.at("rank").get<int64_t>();
  config.kappa = o.at("kappa").get<uint32_t>();
  config.half_life = o.at("half_life").get<int64_t>();
  config.tokens_per_step = o.at("tokens_per_step").get<int64_t>();
  const std::pair<const char*, float*> numbers[] = {{"beta1", &config.beta1}, {"beta2", &config.beta2},
                                                    {"eps", &config.eps},     {"weight_decay", &config.weight_decay},
                                                    {"eps1", &config.eps1},   {"decay_rate", &config.decay_rate},
                                                    {"eps2", &config.eps2},   {"clip", &config.clip}};
  for (auto [name, field] : numbers) *field = o.at(name).get<float>();
  const std::pair<const char*, bool*> switches[] = {
      {"factored", &config.factored},           {"scale_parameter", &config.scale_parameter},
      {"relative_step", &config.relative_step}, {"warmup_init", &config.warmup_init},
      {"residual", &config.residual},           {"compress_embeddings", &config.compress_embeddings}};
  for (auto [name, field] : switches) *field = o.at(name).get<bool>();
  return config;
}

Parameter read_parameter(const json& p) {
  Parameter parameter;
  parameter.name = p.at("name").get<std::string>();
  parameter.rows = parameter.padded_rows = p.at("rows").get<int64_t>();
  parameter.cols = p.at("cols").get<int64_t>();
  parameter.matrix = p.at("matrix").get<bool>();
  parameter.decay = p.at("decay").get<bool>();
  parameter.embedding = p.at("embedding").get<bool>();
  parameter.layer = 0;
  return parameter;
}

// ---- moving numbers in and out of the device

void upload(Backend& backend, Tensor out, const std::vector<float>& values) {
  if (out.dtype == DType::kF32) {
    backend.copy(out.data, values.data(), out.bytes());
  } else {
    std::vector<bf16> rounded(values.size());
    std::transform(values.begin(), values.end(), rounded.begin(), from_float<bf16>);
    backend.copy(out.data, rounded.data(), out.bytes());
  }
  backend.synchronize();
}

std::vector<float> download(Backend& backend, Tensor in) {
  std::vector<float> values(static_cast<size_t>(in.elements()));
  if (in.dtype == DType::kF32) {
    backend.copy(values.data(), in.data, in.bytes());
    backend.synchronize();
  } else {
    std::vector<bf16> raw(values.size());
    backend.copy(raw.data(), in.data, in.bytes());
    backend.synchronize();
    std::transform(raw.begin(), raw.end(), values.begin(), [](bf16 x) { return to_float(x); });
  }
  return values;
}

// ---- comparing

double relative_error(const std::vector<float>& values, const std::vector<float>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(static_cast<double>(values[i]) - expected[i], 2);
    norm += std::pow(static_cast<double>(expected[i]), 2);
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

// Rounding may fall to the other side where the fp32 arithmetic differs in its last bit: hardly ever, and by one unit.
void expect_one_unit(const std::vector<int64_t>& values, const std::vector<int64_t>& expected,
                     const std::string& what) {
  ASSERT_EQ(values.size(), expected.size()) << what;
  int64_t differing = 0, worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    differing += values[i] != expected[i];
    worst = std::max(worst, std::abs(values[i] - expected[i]));
  }
  EXPECT_LE(worst, 1) << what << ", in units of the last place";
  EXPECT_LE(differing, static_cast<int64_t>(expected.size()) / 50) << what << ": elements that differ";
}

// The order of bf16 numbers as integers, so that neighbours differ by one.
int64_t bf16_rank(float value) {
  const int64_t bits = float_to_bits(value) >> 16;
  return bits & 0x8000 ? -(bits & 0x7fff) : bits;
}

void expect_close(Backend& backend, Tensor tensor, const json& expected_json, double tolerance,
                  const std::string& what) {
  const auto expected = expected_json.get<std::vector<float>>();
  ASSERT_EQ(tensor.elements(), static_cast<int64_t>(expected.size())) << what;
  const std::vector<float> values = download(backend, tensor);
  if (tensor.dtype == DType::kBF16) {
    std::vector<int64_t> a(values.size()), b(values.size());
    std::transform(values.begin(), values.end(), a.begin(), bf16_rank);
    std::transform(expected.begin(), expected.end(), b.begin(), bf16_rank);
    expect_one_unit(a, b, what);
  } else {
    EXPECT_LE(relative_error(values, expected), tolerance) << what;
  }
}

void expect_codes(Backend& backend, Tensor tensor, const json& expected, const std::string& what) {
  std::vector<uint8_t> raw(static_cast<size_t>(tensor.elements()));
  backend.copy(raw.data(), tensor.data, raw.size());
  const auto scales = expected.at("scales").get<std::vector<float>>();
  std::vector<float> actual_scales(static_cast<size_t>(quant_blocks(tensor.elements())));
  ASSERT_EQ(scales.size(), actual_scales.size()) << what;
  backend.copy(actual_scales.data(), tensor.scales, actual_scales.size() * sizeof(float));
  backend.synchronize();
  std::vector<int64_t> codes(raw.size());
  for (size_t i = 0; i < raw.size(); ++i) codes[i] = tensor.dtype == DType::kI8 ? static_cast<int8_t>(raw[i]) : raw[i];
  expect_one_unit(codes, expected.at("codes").get<std::vector<int64_t>>(), what);
  EXPECT_LE(relative_error(actual_scales, scales), 1e-4) << what << ", scales";
}

// One resident parameter.
class OneParameterStore : public ParameterStore {
 public:
  OneParameterStore(const Parameter& parameter) : parameters_{parameter} {}
  void set(Tensor weight, Tensor master) { weight_ = weight, master_ = master; }
  const std::vector<Parameter>& parameters() const override { return parameters_; }
  void acquire(int, Access) override {}
  void release(int, bool) override {}
  Tensor weight(const Parameter&) override { return weight_; }
  Tensor padded_weight(const Parameter&) override { return weight_; }
  Tensor stored(const Parameter&) override { return weight_; }
  DType dtype(const Parameter&) const override { return weight_.dtype; }
  Tensor master(const Parameter&) override { return master_; }

 private:
  std::vector<Parameter> parameters_;
  Tensor weight_, master_;
};

// Everything a case needs: one parameter, its optimizer and, with accumulation, compressed gradients.
class Bench {
 public:
  explicit Bench(const json& c)
      : inputs_(c.at("name").get<std::string>() + ".s" + std::to_string(c.at("options").at("seed").get<uint64_t>())),
        parameter_(read_parameter(c.at("parameter"))),
        backend_(make_test_backend()),
        optimizer_(make_optimizer(read_options(c.at("options")), {parameter_}, DType::kF32, *backend_)),
        store_(parameter_),
        lr_(c.at("lr").get<float>()) {
    const DType weight_dtype = pick(c.at("weight_dtype"), kDTypes);
    const int64_t count = parameter_.elements();
    MemoryPlan plan;
    const auto shape = [&](DType dtype) { return parameter_.tensor(nullptr, dtype); };
    plan.add(&weight_, "weight", Category::kWeights, shape(weight_dtype));
    plan.add(&gradient_, "gradient", Category::kGradients, shape(DType::kF32));
    plan.add(&scalars_, "scalars", Category::kWorkspace, sizeof(StepScalars));
    if (c.at("master").get<bool>()) plan.add(&master_, "master", Category::kWeights, shape(DType::kF32));
    const size_t workspace_bytes = backend_->workspace_bytes(
        {.batch = 1, .sequence = 64, .channels = 128, .heads = 2, .vocabulary = 128, .any_bf16 = true});
    void* workspace = nullptr;
    plan.add(&workspace, "workspace", Category::kWorkspace, workspace_bytes);
    if (const json& a = c.at("accumulation"); !a.is_null()) {
      micro_batches_ = a.at("micro_batches").get<int>();
      GradientConfig config;
      config.kind = GradientMode::kCompressed;
      config.micro_batches = micro_batches_;
      config.accumulation_rank = a.at("rank").get<int64_t>();
      config.projection = pick(a.at("projection"), kProjections);
      config.seed = c.at("options").at("seed").get<uint64_t>();
      gradients_ = std::make_unique<Gradients>(config, *optimizer_, store_, *backend_);
      gradients_->declare(plan);
    }
    optimizer_->declare(plan);
    arena_ = std::make_unique<Arena>(*backend_, std::move(plan));
    backend_->set_workspace(workspace, workspace_bytes);
    store_.set(weight_, master_);
    optimizer_->states().zero();
    const std::vector<float> initial = uniform_input(inputs_ + ".w", count);
    upload(*backend_, weight_, initial);
    // A master copy starts from the same rounded numbers as the weight.
    if (master_) upload(*backend_, master_, download(*backend_, weight_));
  }

  void step(uint32_t t) { gradients_ ? step_with_sums(t) : step_directly(t); }

  Tensor find_state(const std::string& what) {
    std::string names;
    for (const StateTensor& s : optimizer_->state()) {
      if (s.name == parameter_.name + "." + what) return s.tensor;
      names += " " + s.name;
    }
    ADD_FAILURE() << "no state \"" << parameter_.name << "." << what << "\" among:" << names;
    return {};
  }

  Backend& backend() { return *backend_; }
  Optimizer& optimizer() { return *optimizer_; }
  Tensor weight() const { return weight_; }
  Tensor master() const { return master_; }

 private:
  void step_directly(uint32_t t) {
    StepScalars scalars;
    scalars.lr = lr_;
    scalars.step = t;
    optimizer_->begin_step(t, scalars);
    backend_->copy(scalars_, &scalars, sizeof scalars);
    upload(*backend_, gradient_,
           gradient_input(inputs_ + ".g" + std::to_string(t), parameter_.rows, parameter_.cols, t));
    optimizer_->update(parameter_, weight_, master_, gradient_, scalars_);
    backend_->synchronize();
  }

  void step_with_sums(uint32_t t) {
    gradients_->begin_step({.step = t, .lr = lr_, .scalars = scalars_});
    for (int i = 0; i < micro_batches_; ++i) {
      gradients_->begin_micro_batch(i, i + 1 == micro_batches_);
      const GradientSink::Target target = gradients_->target(parameter_);
      std::vector<float> values = gradient_input(inputs_ + ".g" + std::to_string(t) + "." + std::to_string(i),
                                                 parameter_.rows, parameter_.cols, t);
      if (target.accumulate) {
        const std::vector<float> before = download(*backend_, target.tensor);
        for (size_t k = 0; k < values.size(); ++k) values[k] += before[k];
      }
      upload(*backend_, target.tensor, values);
      gradients_->ready(parameter_);
    }
    gradients_->end_step();
    backend_->synchronize();
  }

  std::string inputs_;  // how the names of the inputs begin
  Parameter parameter_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Optimizer> optimizer_;
  OneParameterStore store_;
  std::unique_ptr<Gradients> gradients_;
  std::unique_ptr<Arena> arena_;
  Tensor weight_, gradient_, master_;
  StepScalars* scalars_ = nullptr;
  float lr_;
  int micro_batches_ = 1;
};

TEST(FloraFixture, IsThere) {
  ASSERT_TRUE(fixture().is_object()) << kFixture << ": missing or damaged; run tests from the repository's root";
  EXPECT_EQ(fixture().at("format"), 1);
  EXPECT_FALSE(fixture().at("cases").empty());
}

class FloraReference : public ::testing::TestWithParam<Case> {};

TEST_P(FloraReference, MatchesTheFormulas) {
  const json& c = GetParam().data;
  const bool eight_bit = c.at("options").at("state_dtype") == "int8";
  const double tolerance = eight_bit ? 1e-4 : 1e-5;
  Bench bench(c);
  EXPECT_EQ(bench.optimizer().compressed_parameters().size(), c.at("compressed").get<bool>() ? 1u : 0u);
  for (uint32_t t = 1; t <= c.at("steps").get<uint32_t>(); ++t) {
    bench.step(t);
    if (const auto expected = c.at("weights").find(std::to_string(t)); expected != c.at("weights").end()) {
      const std::string what = "weight after step " + std::to_string(t);
      expect_close(bench.backend(), bench.master() ? bench.master() : bench.weight(), *expected, tolerance, what);
    }
  }
  for (const auto& [what, expected] : c.at("state").items()) {
    const Tensor state = bench.find_state(what);
    if (!state) continue;
    ASSERT_EQ(dtype_name(state.dtype), expected.at("dtype").get<std::string>()) << what;
    if (expected.contains("codes")) {
      expect_codes(bench.backend(), state, expected, what);
    } else {
      expect_close(bench.backend(), state, expected.at("values"), tolerance, what);
    }
  }
  if (bench.master()) {
    const std::vector<float> master = download(bench.backend(), bench.master());
    const std::vector<float> weight = download(bench.backend(), bench.weight());
    for (size_t i = 0; i < weight.size(); ++i) ASSERT_EQ(weight[i], to_float(from_float<bf16>(master[i]))) << i;
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(FloraReference);
INSTANTIATE_TEST_SUITE_P(Fixture, FloraReference, ::testing::ValuesIn(load_cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
