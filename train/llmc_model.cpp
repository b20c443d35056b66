// llmc_model.cpp: see llmc_model.h.
#include "train/llmc_model.h"

#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>

namespace {

constexpr int32_t kMagic = 20240326;

struct Header {
  int32_t version;
  Gpt2Config config;
  int64_t padded_vocabulary;
};

Header read_header(std::ifstream& file, const std::string& path) {
  std::array<int32_t, 256> words{};
  if (!file || !file.read(reinterpret_cast<char*>(words.data()), sizeof words)) {
    throw std::runtime_error(path + ": shorter than the header of an llm.c model");
  }
  if (words[0] != kMagic) {
    throw std::runtime_error(path + ": not an llm.c model (magic " + std::to_string(words[0]) + ", expected " +
                             std::to_string(kMagic) + ")");
  }
  if (words[1] != 3 && words[1] != 5) {
    throw std::runtime_error(path + ": llm.c model version " + std::to_string(words[1]) +
                             " is not supported; 3 (fp32) and 5 (bf16) are");
  }
  Header header{words[1], {}, words[7]};
  header.config.positions = words[2];
  header.config.vocabulary = words[3];
  header.config.layers = words[4];
  header.config.heads = words[5];
  header.config.channels = words[6];
  try {
    validate(header.config);
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
  if (header.padded_vocabulary < header.config.vocabulary) {
    throw std::runtime_error(path + ": the padded vocabulary is smaller than the vocabulary");
  }
  return header;
}

std::vector<float> read_values(std::ifstream& file, const std::string& path, int32_t version, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  if (version == 3) {
    file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
  } else {
    std::vector<bf16> rounded(values.size());
    file.read(reinterpret_cast<char*>(rounded.data()), static_cast<std::streamsize>(rounded.size() * sizeof(bf16)));
    for (size_t i = 0; i < values.size(); ++i) values[i] = to_float(rounded[i]);
  }
  if (!file) throw std::runtime_error(path + ": truncated: the header promises more weights than there are");
  return values;
}

std::vector<float> transposed(const std::vector<float>& values, int64_t rows, int64_t cols) {
  std::vector<float> out(values.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) out[i * cols + j] = values[j * rows + i];
  }
  return out;
}

}  // namespace

Gpt2Config llmc_config(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return read_header(file, path).config;
}

void load_llmc(const std::string& path, const std::vector<Parameter>& parameters,
               const std::function<void(const Parameter&, const std::vector<float>&)>& set) {
  std::ifstream file(path, std::ios::binary);
  const Header header = read_header(file, path);
  std::map<std::string, const Parameter*> by_name;
  for (const Parameter& parameter : parameters) by_name[parameter.name] = &parameter;

  const auto embedding = [&](const std::string& name, int64_t rows_in_file) {
    const Parameter& parameter = *by_name.at(name);
    std::vector<float> values = read_values(file, path, header.version, rows_in_file * parameter.cols);
    values.resize(static_cast<size_t>(parameter.elements()));
    set(parameter, values);
  };
  const auto every_layer = [&](const std::string& role) {
    for (int64_t l = 0; l < header.config.layers; ++l) {
      const Parameter& parameter = *by_name.at("h." + std::to_string(l) + "." + role);
      std::vector<float> values = read_values(file, path, header.version, parameter.elements());
      set(parameter, parameter.matrix ? transposed(values, parameter.rows, parameter.cols) : values);
    }
  };
  embedding("wte.weight", header.padded_vocabulary);
  embedding("wpe.weight", header.config.positions);
  for (const char* role :
       {"ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
        "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"}) {
    every_layer(role);
  }
  embedding("ln_f.weight", 1);
  embedding("ln_f.bias", 1);
  file.peek();
  if (!file.eof()) throw std::runtime_error(path + ": longer than its header promises");
}
