// test_weights_io.cpp: weights go to files and come back with every bit, in one file or in shards with an index, and a
// directory that does not fit the model is refused by the name of the tensor.
#include "train/weights_io.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/gpt2_bench.h"
#include "tests/temporary_directory.h"
#include "train/options.h"
#include "train/safetensors.h"

namespace {

#define EXPECT_HAS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

Gpt2Config small_config(bool tied = true) {
  Gpt2Config config;
  config.vocabulary = 131, config.positions = 9, config.layers = 2, config.heads = 2, config.channels = 16;
  config.tied_head = tied;
  return config;
}

// Weights alone.
class Weights {
 public:
  explicit Weights(const Gpt2Config& config, DType dtype = DType::kF32, bool master = false)
      : backend(make_cpu_backend({.threads = 1})),
        store(gpt2_parameters(config), {.dtype = dtype, .master_weights = master}, *backend) {
    MemoryPlan plan;
    store.declare(plan);
    arena_ = std::make_unique<Arena>(*backend, std::move(plan));
    store.zero_padding();
  }

  void randomize(uint32_t seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (const Parameter& p : store.parameters()) {
      Floats values(static_cast<size_t>(p.elements()));
      for (float& value : values) value = normal(generator);
      upload_floats(*backend, store.weight(p), values);
    }
  }

  std::vector<Floats> values() {
    std::vector<Floats> all;
    for (const Parameter& p : store.parameters()) all.push_back(download_floats(*backend, store.weight(p)));
    return all;
  }

  std::map<std::string, FileSummary> save(const std::string& directory, size_t shard_bytes = size_t{5} << 30) {
    return save_weights(directory, store, *backend, shard_bytes);
  }
  void load(const std::string& directory, const Gpt2Config& config) {
    load_weights({ModelSource::Kind::kDirectory, directory, config, true}, store, *backend);
  }

  std::unique_ptr<Backend> backend;
  WeightStore store;

 private:
  std::unique_ptr<Arena> arena_;
};

class WeightsRoundTrip : public ::testing::TestWithParam<std::tuple<DType, bool, size_t>> {};

TEST_P(WeightsRoundTrip, KeepsEveryBit) {
  const auto [dtype, tied, shard_bytes] = GetParam();
  TemporaryDirectory directory;
  const Gpt2Config config = small_config(tied);
  Weights saved(config, dtype), loaded(config, dtype);
  saved.randomize(1);
  loaded.randomize(2);
  const auto files = saved.save(directory.path(), shard_bytes);
  const bool sharded = shard_bytes < 100000;
  EXPECT_EQ(files.count("model.safetensors.index.json"), sharded ? 1u : 0u);
  EXPECT_EQ(files.count("model.safetensors"), sharded ? 0u : 1u);
  for (const auto& [name, summary] : files) {
    const FileSummary found = summarize_file(directory / name);
    EXPECT_EQ(found.bytes, summary.bytes) << name;
    EXPECT_EQ(found.crc32, summary.crc32) << name;
  }
  if (sharded) {
    EXPECT_GT(files.size(), 4u);
    const auto index = nlohmann::json::parse(read_file(directory / "model.safetensors.index.json"));
    EXPECT_EQ(index["weight_map"].size(), saved.store.parameters().size());
    EXPECT_EQ(index["metadata"]["total_size"], config.parameter_count() * static_cast<int64_t>(dtype_size(dtype)));
    for (const auto& [tensor, file] : index["weight_map"].items()) {
      EXPECT_NE(SafetensorsReader(directory / file.get<std::string>()).find(tensor), nullptr) << tensor;
    }
  }
  loaded.load(directory.path(), config);
  EXPECT_EQ(loaded.values(), saved.values());
}

INSTANTIATE_TEST_SUITE_P(All, WeightsRoundTrip,
                         ::testing::Combine(::testing::Values(DType::kF32, DType::kBF16), ::testing::Bool(),
                                            ::testing::Values(size_t{5} << 30, size_t{4000}, size_t{1})),
                         [](const auto& info) {
                           return std::string(dtype_name(std::get<0>(info.param))) +
                                  (std::get<1>(info.param) ? "_tied_" : "_untied_") +
                                  std::to_string(std::get<2>(info.param));
                         });

TEST(WeightsIo, PaddingIsNeitherWrittenNorTouched) {
  TemporaryDirectory directory;
  Weights weights(small_config());
  weights.randomize(1);
  weights.save(directory.path());
  const SafetensorsReader reader(directory / "model.safetensors");
  EXPECT_EQ(reader.find("transformer.wte.weight")->shape, (std::vector<int64_t>{131, 16}));
  weights.load(directory.path(), small_config());
  const Parameter& wte = weights.store.parameters()[0];
  const Floats padded = download_floats(*weights.backend, weights.store.padded_weight(wte));
  ASSERT_EQ(padded.size(), 256u * 16);
  for (size_t i = 131 * 16; i < padded.size(); ++i) ASSERT_EQ(padded[i], 0.0f) << i;
}

TEST(WeightsIo, AnFp32FileIsRoundedToNearestAndTheMasterCopyIsExact) {
  TemporaryDirectory directory;
  Weights exact(small_config()), rounded(small_config(), DType::kBF16, true);
  exact.randomize(3);
  exact.save(directory.path());
  rounded.load(directory.path(), small_config());
  for (const Parameter& p : exact.store.parameters()) {
    const Floats values = download_floats(*exact.backend, exact.store.weight(p));
    EXPECT_EQ(download_floats(*rounded.backend, rounded.store.master(p)), values) << p.name;
    const Floats weight = download_floats(*rounded.backend, rounded.store.weight(p));
    for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(weight[i], to_float(from_float<bf16>(values[i]))) << p.name;
  }
}

TEST(WeightsIo, EveryHalfPrecisionNumberIsReadExactly) {
  // All 65536 bit patterns of fp16 as rows of the token embedding, against the definition of the format.
  TemporaryDirectory directory;
  Gpt2Config config = small_config();
  config.vocabulary = 4096;
  Weights weights(config);
  weights.randomize(4);
  weights.save(directory.path());
  SafetensorsReader whole(directory / "model.safetensors");
  std::vector<TensorEntry> entries;
  for (const Parameter& p : weights.store.parameters()) {
    TensorEntry entry = *whole.find("transformer." + p.name);
    entry.name = p.name;  // without the prefix, too
    if (p.name == "wte.weight") entry.dtype = "F16";
    entries.push_back(entry);
  }
  std::filesystem::create_directory(directory / "half");
  SafetensorsWriter writer(directory / "half/model.safetensors", entries);
  std::vector<uint16_t> halves(65536);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  for (const TensorEntry& entry : entries) {
    writer.write(entry.dtype == "F16" ? static_cast<const void*>(halves.data()) : entry.data, entry.bytes());
  }
  writer.finish();
  weights.load(directory / "half", config);
  const Floats values = download_floats(*weights.backend, weights.store.weight(weights.store.parameters()[0]));
  for (int i = 0; i < 65536; ++i) {
    const int exponent = (i >> 10) & 31, mantissa = i & 1023;
    double expected = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) expected = mantissa ? NAN : INFINITY;
    if (i & 0x8000) expected = -expected;
    const float value = values[static_cast<size_t>(i)];
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << i;
    } else {
      ASSERT_EQ(value, static_cast<float>(expected)) << i;
      ASSERT_EQ(std::signbit(value), std::signbit(expected)) << i;
    }
  }
}

TEST(WeightsIo, WhatDoesNotFitIsRefusedByName) {
  TemporaryDirectory directory;
  Weights weights(small_config());
  weights.randomize(1);
  weights.save(directory.path());
  const auto error_with = [&](const Gpt2Config& config) {
    Weights other(config);
    return message_of([&] { other.load(directory.path(), config); });
  };
  Gpt2Config config = small_config();
  config.layers = 3;
  EXPECT_HAS(error_with(config), "h.2.ln_1.weight");
  config = small_config();
  config.vocabulary = 132;
  const std::string message = error_with(config);
  for (const char* part : {"wte.weight", "131 x 16", "132 x 16"}) EXPECT_HAS(message, part);
  EXPECT_HAS(error_with(small_config(false)), "lm_head.weight");
  std::filesystem::remove(directory / "model.safetensors");
  EXPECT_HAS(error_with(small_config()), "model.safetensors");
}

// Copies a directory's weights under other names.
void rename_tensors(const std::string& from, const std::string& to,
                    const std::function<std::string(const std::string&)>& name) {
  std::filesystem::create_directories(std::filesystem::path(to).parent_path());
  const SafetensorsReader whole(from);
  std::vector<TensorEntry> entries;
  for (const auto& [old_name, entry] : whole.entries()) {
    entries.push_back(entry);
    entries.back().name = name(old_name);
  }
  SafetensorsWriter writer(to, entries);
  for (const TensorEntry& entry : entries) writer.write(entry.data, entry.bytes());
  writer.finish();
}

TEST(WeightsIo, NamesOfCompiledWrappedAndTiedModels) {
  TemporaryDirectory directory;
  Weights weights(small_config());
  weights.randomize(1);
  weights.save(directory.path());
  const auto load = [&](const std::function<std::string(const std::string&)>& name, bool tied = true) {
    rename_tensors(directory / "model.safetensors", directory / "renamed/model.safetensors", name);
    Weights loaded(small_config(tied));
    const std::string message = message_of([&] { loaded.load(directory / "renamed", small_config(tied)); });
    if (message.empty()) {
      EXPECT_EQ(loaded.values(), weights.values());
    }
    return message;
  };
  for (const char* prefix : {"_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."}) {
    EXPECT_EQ(load([&](const std::string& name) { return prefix + name; }), "") << prefix;
  }
  EXPECT_EQ(load([](const std::string& name) { return "transformer._orig_mod." + name.substr(12); }), "");
  const auto head = [](const std::string& name) {
    return name == "transformer.wte.weight" ? "_orig_mod.lm_head.weight" : "_orig_mod." + name;
  };
  EXPECT_EQ(load(head), "");
  EXPECT_HAS(load(head, false), "wte.weight");
  EXPECT_HAS(load([](const std::string& name) {
               return name == "transformer.ln_f.bias" ? "module.transformer.ln_f.weight" : name;
             }),
             "is there again");
}

TEST(WeightsIo, WeightsOfAnotherKindAreRefusedWithTheWayToConvertThem) {
  TemporaryDirectory directory;
  const auto error_with = [&](const std::string& file, const std::string& contents) {
    directory.write("m/config.json", config_json(small_config()));
    directory.write("m/" + file, contents);
    std::string message;
    try {
      find_model(directory / "m");
    } catch (const UsageError& error) {
      message = error.what();
    }
    std::filesystem::remove_all(directory / "m");
    return message;
  };
  for (const char* file : {"pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin",
                           "tf_model.h5", "flax_model.msgpack", "model.ckpt.index", "ckpt.pt", "consolidated.00.pth",
                           "gpt2.Q8_0.gguf", "rust_model.ot", "weights.npz"}) {
    const std::string message = error_with(file, "x");
    EXPECT_HAS(message, std::string(file) + " cannot be read");
    EXPECT_HAS(message, "M.from_pretrained('" + directory / "m'");
    EXPECT_HAS(message, ".save_pretrained(");
  }
  EXPECT_HAS(error_with("tf_model.h5", "x"), "from_tf=True");
  EXPECT_HAS(error_with("weights.bin", "PK\3\4"), "weights.bin");
  EXPECT_HAS(error_with("optimizer.safetensors", "x"), "model.safetensors: is missing");
  EXPECT_HAS(error_with("model-00001-of-00002.safetensors", "x"), "no model.safetensors.index.json");
  for (const char* file :
       {"training_args.bin", "optimizer.pt", "text_train_000000.bin", "tokenizer.json", "vocab.json"})
    EXPECT_EQ(error_with(file, "x"), "") << file;
  directory.write("l/config.json", config_json(small_config()));
  std::filesystem::create_symlink("nowhere", directory / "l/model.safetensors");
  EXPECT_HAS(message_of([&] { find_model(directory / "l"); }), "a link to a file that is not there");
  EXPECT_HAS(message_of([&] { find_model(directory.write("p/pytorch_model.bin", "PK")); }), "save_pretrained");
}

TEST(WeightsIo, DamagedShardsAreRefused) {
  TemporaryDirectory directory;
  Weights weights(small_config());
  weights.randomize(1);
  weights.save(directory.path(), 4000);
  const auto error = [&] { return message_of([&] { weights.load(directory.path(), small_config()); }); };
  EXPECT_EQ(error(), "");
  const std::string index = directory / "model.safetensors.index.json";
  const auto map = nlohmann::json::parse(read_file(index))["weight_map"];
  const std::string first = map["transformer.wte.weight"];
  std::filesystem::rename(directory / first, directory / "elsewhere");
  EXPECT_HAS(error(), first);
  std::filesystem::rename(directory / "elsewhere", directory / first);
  std::filesystem::resize_file(directory / first, std::filesystem::file_size(directory / first) - 1);
  EXPECT_HAS(error(), first);
  for (const char* text : {"", "{", "[]", R"({"weight_map": 3})", R"({"weight_map": {"a": 3}})", "{}"}) {
    directory.write("model.safetensors.index.json", text);
    EXPECT_NE(error(), "") << text;
  }
  // Even a good file is not read outside the folder.
  for (const std::string& name : {"../" + std::filesystem::path(directory.path()).filename().string() + "/" + first,
                                  directory / first, "./" + first, std::string(".."), std::string()}) {
    nlohmann::json moved = map;
    for (const auto& [tensor, file] : map.items()) {
      if (file == first) moved[tensor] = name;
    }
    directory.write("model.safetensors.index.json", nlohmann::json{{"weight_map", moved}}.dump());
    EXPECT_HAS(error(), "is no name of a file beside it");
  }
}

TEST(WeightsIo, FindsWhatAModelIs) {
  TemporaryDirectory directory;
  EXPECT_EQ(find_model("d12").kind, ModelSource::Kind::kPreset);
  EXPECT_FALSE(find_model("d12").has_weights);
  EXPECT_THROW(find_model("d13"), UsageError);
  EXPECT_THROW(find_model(directory / "absent"), UsageError);
  EXPECT_THROW(find_model(directory.path()), std::runtime_error);
  directory.write("config.json", config_json(small_config()));
  EXPECT_EQ(find_model(directory / "config.json").kind, ModelSource::Kind::kConfigFile);
  EXPECT_EQ(find_model(directory.path()).kind, ModelSource::Kind::kDirectory);
  EXPECT_FALSE(find_model(directory.path()).has_weights);
  EXPECT_EQ(find_model(directory.path()).config.channels, 16);
  Weights weights(small_config());
  weights.save(directory.path(), 4000);
  EXPECT_TRUE(find_model(directory.path()).has_weights);
  EXPECT_THROW(find_model(directory.write("model.bin", "x")), std::runtime_error);
  EXPECT_THROW(find_model(directory.write("model.txt", "x")), UsageError);
}

}  // namespace
