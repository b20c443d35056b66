// test_config.cpp: presets have the sizes their names promise, a config.json survives a round trip, and what is not a
// GPT-2 as this program computes it is refused by name.
#include "model/config.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "tests/temporary_directory.h"

namespace {

#define EXPECT_HAS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

TEST(Config, PresetsHaveThePublishedNumbersOfParameters) {
  // Hugging Face's gpt2, gpt2-medium, gpt2-large and gpt2-xl.
  EXPECT_EQ(preset("d12").parameter_count(), 124439808);
  EXPECT_EQ(preset("d24").parameter_count(), 354823168);
  EXPECT_EQ(preset("d36").parameter_count(), 774030080);
  EXPECT_EQ(preset("d48").parameter_count(), 1557611200);
  EXPECT_EQ(preset("gpt2:d48").parameter_count(), preset("d48").parameter_count());
  EXPECT_NEAR(static_cast<double>(preset("gpt3:c12288").parameter_count()), 174.6e9, 0.1e9);
  EXPECT_NEAR(static_cast<double>(preset("gpt3:c4096").parameter_count()), 6.66e9, 0.01e9);
}

TEST(Config, EveryPresetIsAModel) {
  const std::string message = message_of([] { preset("nonsense"); });
  EXPECT_HAS(message, "nonsense");
  int count = 0;
  for (const char* name :
       {"tiny",       "mini",       "small",      "d6",         "d12",        "d24",        "d36",
        "d48",        "d60",        "d72",        "d84",        "gpt3:c384",  "gpt3:c768",  "gpt3:c1024",
        "gpt3:c1536", "gpt3:c2048", "gpt3:c2560", "gpt3:c4096", "gpt3:c5120", "gpt3:c12288"}) {
    ASSERT_TRUE(is_preset(name)) << name;
    EXPECT_NO_THROW(validate(preset(name))) << name;
    EXPECT_HAS(message, name);
    ++count;
  }
  EXPECT_EQ(count, 20);
  for (const char* name : {"", "d", "d13", "D12", "gpt2:", "gpt3:c5140"}) EXPECT_FALSE(is_preset(name)) << name;
}

TEST(Config, ParametersAreThoseOfHuggingFaceInTheirOrder) {
  Gpt2Config config;
  config.vocabulary = 300, config.positions = 40, config.layers = 2, config.heads = 3, config.channels = 48;
  const std::vector<Parameter> tied = gpt2_parameters(config);
  ASSERT_EQ(tied.size(), 2u + 2 * 12 + 2);
  EXPECT_EQ(tied.front().name, "wte.weight");
  EXPECT_EQ(tied.back().name, "ln_f.bias");
  std::set<std::string> names;
  int64_t elements = 0;
  for (size_t i = 0; i < tied.size(); ++i) {
    const Parameter& p = tied[i];
    EXPECT_EQ(p.index, static_cast<int>(i));
    EXPECT_TRUE(names.insert(p.name).second) << p.name;
    EXPECT_EQ(p.matrix, p.rows > 1) << p.name;
    EXPECT_EQ(p.decay, p.matrix) << p.name;
    EXPECT_EQ(p.padded_rows, p.name == "wte.weight" ? 384 : p.rows) << p.name;
    EXPECT_EQ(p.layer, p.name.starts_with("h.") ? p.name[2] - '0' : -1) << p.name;
    elements += p.elements();
  }
  EXPECT_EQ(elements, config.parameter_count());
  config.tied_head = false;
  const std::vector<Parameter> untied = gpt2_parameters(config);
  ASSERT_EQ(untied.size(), tied.size() + 1);
  EXPECT_EQ(untied.back().name, "lm_head.weight");
  EXPECT_TRUE(untied.back().long_lived);
  EXPECT_EQ(config.parameter_count(), elements + 300 * 48);
}

TEST(Config, FlopsPerToken) {
  // 6 N + 6 L C T: the second term is causal attention's.
  EXPECT_DOUBLE_EQ(preset("d12").flops_per_token(1024), 6.0 * 124439808 + 6.0 * 12 * 768 * 1024);
}

TEST(Config, JsonRoundTrip) {
  TemporaryDirectory directory;
  for (const bool tied : {true, false}) {
    Gpt2Config config = preset("gpt3:c2560");
    config.vocabulary = 257;
    config.tied_head = tied;
    const Gpt2Config read = read_config(directory.write("config.json", config_json(config)));
    EXPECT_EQ(read.vocabulary, 257);
    EXPECT_EQ(read.positions, 2048);
    EXPECT_EQ(read.layers, 32);
    EXPECT_EQ(read.heads, 32);
    EXPECT_EQ(read.channels, 2560);
    EXPECT_EQ(read.tied_head, tied);
  }
}

TEST(Config, ReadsWhatHuggingFaceLeavesOut) {
  TemporaryDirectory directory;
  const char* oldest = R"({"vocab_size": 50257, "n_ctx": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12})";
  const Gpt2Config config = read_config(directory.write("config.json", oldest));
  EXPECT_EQ(config.positions, 1024);
  EXPECT_TRUE(config.tied_head);
  EXPECT_EQ(config.parameter_count(), 124439808);
}

TEST(Config, SpecialTokensAreThoseThatWereRead) {
  TemporaryDirectory directory;
  const auto round_trip = [&](int64_t vocabulary, const nlohmann::json& bos, const nlohmann::json& eos,
                              const std::string& generation = "{}") {
    nlohmann::json json = nlohmann::json::parse(config_json(preset("tiny")));
    json["vocab_size"] = vocabulary, json["bos_token_id"] = bos, json["eos_token_id"] = eos;
    Gpt2Config config = read_config(directory.write("config.json", json.dump()));
    read_generation_config(directory.write("generation_config.json", generation), config);
    const auto written = nlohmann::json::parse(config_json(config));
    const auto beside = nlohmann::json::parse(generation_config_json(config));
    EXPECT_EQ(written["bos_token_id"], beside["bos_token_id"]);
    EXPECT_EQ(written["eos_token_id"], beside["eos_token_id"]);
    return std::pair(written["bos_token_id"], written["eos_token_id"]);
  };
  using Ids = std::pair<nlohmann::json, nlohmann::json>;
  EXPECT_EQ(round_trip(300, 7, 256), Ids(7, 256));
  EXPECT_EQ(round_trip(300, 7, {5, 6}), Ids(7, nlohmann::json({5, 6})));
  EXPECT_EQ(round_trip(50304, nullptr, nullptr), Ids(50256, 50256));
  EXPECT_EQ(round_trip(300, 50256, 50256), Ids(299, 299)) << "transformers writes GPT-2's id whatever the vocabulary";
  EXPECT_EQ(round_trip(300, nullptr, -1, R"({"bos_token_id": 3, "eos_token_id": [4]})"), Ids(3, 4));
  EXPECT_EQ(round_trip(300, 7, 8, R"({"bos_token_id": 3, "eos_token_id": 4})"), Ids(7, 8));
}

TEST(Config, TheTrainedLengthIsKeptWhereItIsLessThanThePositions) {
  TemporaryDirectory directory;
  Gpt2Config config = preset("tiny");
  config.trained_positions = 64;
  const std::string json = config_json(config);
  EXPECT_EQ(read_config(directory.write("config.json", json)).usable_positions(), 64);
  config.trained_positions = config.positions;
  EXPECT_EQ(config_json(config).find("trained_positions"), std::string::npos);
  auto damaged = nlohmann::json::parse(json);
  damaged["trained_positions"] = 257;
  EXPECT_HAS(message_of([&] { read_config(directory.write("config.json", damaged.dump())); }), "trained_positions");
}

TEST(Config, RefusesWhatItCannotCompute) {
  TemporaryDirectory directory;
  const auto error_with = [&](const std::string& key, const nlohmann::json& value) {
    nlohmann::json json = nlohmann::json::parse(config_json(preset("tiny")));
    json[key] = value;
    const std::string path = directory.write("config.json", json.dump());
    const std::string message = message_of([&] { read_config(path); });
    EXPECT_NE(message, "") << key << " " << value << " was accepted";
    EXPECT_EQ(message.rfind(path + ": ", 0), 0u) << message;
    EXPECT_HAS(message, key);
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    return message;
  };
  EXPECT_HAS(error_with("n_head", 3), "128");
  for (const char* key : {"n_head", "n_layer", "n_embd", "n_positions", "vocab_size"}) {
    error_with(key, 0);
    error_with(key, -4);
    error_with(key, "12");
    error_with(key, 1.5);
    error_with(key, nullptr);
  }
  for (const char* key : {"n_head", "n_layer", "n_embd", "n_positions", "vocab_size"}) {
    for (const int64_t huge : {int64_t{1} << 30, int64_t{1} << 62, INT64_MAX}) error_with(key, huge);
    error_with(key, UINT64_MAX);  // not -1
    error_with(key, 300.7);
    error_with(key, true);
  }
  error_with("n_layer", 100000);
  error_with("scale_attn_weights", "yes");
  error_with("n_inner", nlohmann::json::array());
  error_with("model_type", "llama");
  error_with("n_inner", 100);
  error_with("activation_function", "relu");
  error_with("activation_function", nullptr);
  error_with("layer_norm_epsilon", 1e-6);
  error_with("layer_norm_epsilon", "1e-5");
  error_with("tie_word_embeddings", "true");
  const auto error_of = [&](const std::string& text) {
    const std::string path = directory.write("config.json", text);
    const std::string message = message_of([&] { read_config(path); });
    EXPECT_EQ(message.rfind(path + ": ", 0), 0u) << message;
    EXPECT_EQ(message.find("exception"), std::string::npos) << message;
    EXPECT_LT(message.size(), path.size() + 150);
    return message;
  };
  const std::string deep(80000, '[');
  EXPECT_HAS(error_of("{\"model_type\": " + deep + std::string(80000, ']') + "}"), "nests deeper");
  EXPECT_HAS(error_of(deep), "nests deeper");
  EXPECT_HAS(error_of("{\"n_layer\": 1, \"n_layer\": 2}"), "\"n_layer\" twice");
  EXPECT_HAS(error_of("{\n \"n_layer\": 1e400}"), "not valid JSON");
  EXPECT_HAS(error_of("{\n \"n_layer\": x}"), "at line 2, column 13");
  EXPECT_HAS(error_of("{\"n_layer\": 1"), "it ends too early");
  EXPECT_HAS(error_of(""), "not valid JSON");
  EXPECT_HAS(error_of("{\"model_type\": \"\xff\"}"), "not valid JSON");
  error_of("{\"model_type\": \"" + std::string(100000, 'x') + "\", \"vocab_size\": 1}");
  EXPECT_HAS(message_of([&] { read_config(directory.path()); }), "is a directory");
  EXPECT_HAS(message_of([&] { read_config("/dev/zero"); }), "is a device");
  ASSERT_EQ(mkfifo((directory / "pipe").c_str(), 0600), 0);
  EXPECT_HAS(message_of([&] { read_config(directory / "pipe"); }), "is a pipe");
  std::filesystem::resize_file(directory.write("config.json", "{}"), uint64_t{10} << 30);
  EXPECT_HAS(message_of([&] { read_config(directory / "config.json"); }), "larger than 64 MiB");
  EXPECT_HAS(message_of([&] { read_config(directory / "absent.json"); }), "absent.json");
  EXPECT_HAS(message_of([&] { read_config(directory.write("bad.json", "{")); }), "bad.json");
  EXPECT_HAS(message_of([&] { read_config(directory.write("list.json", "[1]")); }), "list.json");
}

}  // namespace
