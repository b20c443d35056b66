// llmc_model.cpp: see llmc_model.h.
#include "train/llmc_model.h"

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>

#include "data/input_file.h"

namespace {

constexpr int32_t kMagic = 20240326;

struct Header {
  int32_t version;
  Gpt2Config config;
  int64_t padded_vocabulary;
};

// The header, once it is known that the file has as many weights as it promises.
Header read_header(InputFile& file) {
  const std::string& path = file.path();
  std::array<int32_t, 256> words{};
  if (file.read(words.data(), sizeof words) < sizeof words) {
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
  const int64_t padding = (header.padded_vocabulary - header.config.vocabulary) * header.config.channels;
  const uint64_t weights = static_cast<uint64_t>(header.config.parameter_count() + padding);
  const uint64_t promised = sizeof words + weights * (header.version == 3 ? sizeof(float) : sizeof(bf16));
  if (file.bytes() != promised) {
    throw std::runtime_error(path + (file.bytes() < promised ? ": truncated" : ": longer than its header promises") +
                             ": " + std::to_string(file.bytes()) + " bytes, the header promises " +
                             std::to_string(promised));
  }
  return header;
}

std::vector<float> read_values(InputFile& file, int32_t version, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  const auto read = [&](void* to, size_t bytes) {
    if (file.read(to, bytes) < bytes) throw std::runtime_error(file.path() + ": truncated while it was read");
  };
  if (version == 3) {
    read(values.data(), values.size() * sizeof(float));
  } else {
    std::vector<bf16> rounded(values.size());
    read(rounded.data(), rounded.size() * sizeof(bf16));
    for (size_t i = 0; i < values.size(); ++i) values[i] = to_float(rounded[i]);
  }
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
  InputFile file(path);
  return read_header(file).config;
}

void load_llmc(const std::string& path, const std::vector<Parameter>& parameters,
               const std::function<void(const Parameter&, const std::vector<float>&)>& set) {
  InputFile file(path);
  const Header header = read_header(file);
  std::map<std::string, const Parameter*> by_name;
  for (const Parameter& parameter : parameters) by_name[parameter.name] = &parameter;

  const auto embedding = [&](const std::string& name, int64_t rows_in_file) {
    const Parameter& parameter = *by_name.at(name);
    std::vector<float> values = read_values(file, header.version, rows_in_file * parameter.cols);
    values.resize(static_cast<size_t>(parameter.elements()));
    set(parameter, values);
  };
  const auto every_layer = [&](const std::string& role) {
    for (int64_t l = 0; l < header.config.layers; ++l) {
      const Parameter& parameter = *by_name.at("h." + std::to_string(l) + "." + role);
      std::vector<float> values = read_values(file, header.version, parameter.elements());
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
}
