// config.cpp: presets, Hugging Face's config.json, and the list of parameters that follows from a configuration.
#include "model/config.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "data/input_file.h"
#include "data/json_text.h"

namespace {

// Ten times what any model has, and small enough that sizes are sums and products far below 2^63.
constexpr int64_t kMostTokens = int64_t{1} << 24, kMostBlocks = 1024, kMostChannels = int64_t{1} << 17;
constexpr int64_t kGpt2Vocabulary = 50257;  // its last token is end-of-text

struct Shape {
  int64_t layers, channels, head_dim, positions;
};

// gpt2:dN and gpt3:cN are the tables of llm.c (train_gpt2.cu); 5120 is the width most 13B models use.
const std::map<std::string, Shape>& presets() {
  static const std::map<std::string, Shape> table = {
      {"tiny", {2, 128, 64, 256}},           {"mini", {4, 256, 64, 256}},
      {"small", {4, 384, 64, 256}},          {"gpt2:d6", {6, 384, 64, 1024}},
      {"gpt2:d12", {12, 768, 64, 1024}},     {"gpt2:d24", {24, 1024, 64, 1024}},
      {"gpt2:d36", {36, 1280, 64, 1024}},    {"gpt2:d48", {48, 1600, 64, 1024}},
      {"gpt2:d60", {60, 1920, 64, 1024}},    {"gpt2:d72", {72, 2880, 80, 1024}},
      {"gpt2:d84", {84, 3456, 96, 1024}},    {"gpt3:c384", {6, 384, 64, 2048}},
      {"gpt3:c768", {12, 768, 64, 2048}},    {"gpt3:c1024", {24, 1024, 64, 2048}},
      {"gpt3:c1536", {24, 1536, 96, 2048}},  {"gpt3:c2048", {24, 2048, 128, 2048}},
      {"gpt3:c2560", {32, 2560, 80, 2048}},  {"gpt3:c4096", {32, 4096, 128, 2048}},
      {"gpt3:c5120", {40, 5120, 128, 2048}}, {"gpt3:c12288", {96, 12288, 128, 2048}},
  };
  return table;
}

// "d12" is short for "gpt2:d12".
std::string full_name(const std::string& name) {
  if (name.size() >= 2 && name[0] == 'd' && name.find_first_not_of("0123456789", 1) == std::string::npos) {
    return "gpt2:" + name;
  }
  return name;
}

// A token id or a list of them; what is no id of this vocabulary (Hugging Face writes GPT-2's into every small model's
// config.json) is not known.
void read_ids(std::vector<int64_t>& ids, const nlohmann::json& json, const char* key, int64_t vocabulary) {
  if (!json.is_object() || !json.contains(key)) return;
  const nlohmann::json list = json[key].is_array() ? json[key] : nlohmann::json::array({json[key]});
  for (const nlohmann::json& id : list) {
    if (id.is_number_integer() && id >= 0 && id < vocabulary) ids.push_back(id.get<int64_t>());
  }
}

void read_special_tokens(Gpt2Config& config, const nlohmann::json& json) {
  std::vector<int64_t> begin;
  if (config.begin_of_text < 0) read_ids(begin, json, "bos_token_id", config.vocabulary);
  if (!begin.empty()) config.begin_of_text = begin.front();
  if (config.end_of_text.empty()) read_ids(config.end_of_text, json, "eos_token_id", config.vocabulary);
}

int64_t begin_id(const Gpt2Config& config) {
  return config.begin_of_text >= 0 ? config.begin_of_text : config.stop_tokens().front();
}

nlohmann::ordered_json one_or_list(const std::vector<int64_t>& ids) {
  return ids.size() == 1 ? nlohmann::ordered_json(ids[0]) : nlohmann::ordered_json(ids);
}

}  // namespace

std::vector<int64_t> Gpt2Config::stop_tokens() const {
  if (!end_of_text.empty()) return end_of_text;
  return {vocabulary >= kGpt2Vocabulary ? kGpt2Vocabulary - 1 : vocabulary - 1};
}

int64_t Gpt2Config::parameter_count() const {
  int64_t count = 0;
  for (const Parameter& parameter : gpt2_parameters(*this)) count += parameter.elements();
  return count;
}

double Gpt2Config::flops_per_token(int64_t sequence) const {
  return 6.0 * static_cast<double>(parameter_count()) + 6.0 * static_cast<double>(layers * channels * sequence);
}

bool is_preset(const std::string& name) { return presets().count(full_name(name)) > 0; }

std::vector<std::string> preset_names() {
  std::vector<std::string> names;
  for (const auto& [name, shape] : presets()) names.push_back(name);
  return names;
}

Gpt2Config preset(const std::string& name) {
  if (name == "gpt3:c5140") {
    throw std::invalid_argument("model gpt3:c5140: 5140 channels do not divide into heads of 128; use gpt3:c5120");
  }
  const auto entry = presets().find(full_name(name));
  if (entry == presets().end()) {
    std::string known;
    for (const auto& [key, shape] : presets()) known += " " + key;
    throw std::invalid_argument("unknown model '" + name +
                                "': neither a directory with config.json nor a .json or .bin file nor one of" + known +
                                " (d12 is short for gpt2:d12)");
  }
  const Shape& shape = entry->second;
  Gpt2Config config;
  config.layers = shape.layers;
  config.channels = shape.channels;
  config.heads = shape.channels / shape.head_dim;
  config.positions = shape.positions;
  return config;
}

Gpt2Config read_config(const std::string& path) {
  std::string text;
  try {
    text = read_file(path);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(error.what()) + "; a model directory needs a config.json");
  }
  nlohmann::json json = parse_json(text, path);
  const auto integer = [&](const char* key) -> int64_t {
    if (!json.contains(key) || !json[key].is_number_integer()) {
      throw std::runtime_error(path + ": has no integer '" + key + "'; is it the config.json of a GPT-2?");
    }
    // Above what an int64_t holds it would come out negative.
    return json[key].is_number_unsigned()
               ? static_cast<int64_t>(std::min<uint64_t>(json[key].get<uint64_t>(), INT64_MAX))
               : json[key].get<int64_t>();
  };
  const auto optional = [&](const char* key, const auto& otherwise) {
    try {
      return json.value(key, otherwise);
    } catch (const nlohmann::json::exception&) {
      throw std::runtime_error(path + ": " + key + " cannot be " + json[key].dump().substr(0, 100));
    }
  };
  Gpt2Config config;
  config.vocabulary = integer("vocab_size");
  config.positions = json.contains("n_positions") ? integer("n_positions") : integer("n_ctx");
  config.layers = integer("n_layer");
  config.heads = integer("n_head");
  config.channels = integer("n_embd");
  try {
    validate(config);
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
  config.tied_head = optional("tie_word_embeddings", true);
  if (json.contains("model_type") && json["model_type"] != "gpt2") {
    throw std::runtime_error(path + ": model_type is " + json["model_type"].dump().substr(0, 100) +
                             ", this program trains gpt2");
  }
  if (json.contains("n_inner") && !json["n_inner"].is_null() && json["n_inner"] != 4 * config.channels) {
    throw std::runtime_error(path + ": n_inner must be null or 4 * n_embd");
  }
  const auto activation = optional("activation_function", std::string("gelu_new"));
  if (activation != "gelu_new" && activation != "gelu_pytorch_tanh" && activation != "gelu_fast") {
    throw std::runtime_error(path + ": activation_function '" + activation.substr(0, 100) +
                             "' is not supported (gelu_new is)");
  }
  if (optional("layer_norm_epsilon", 1e-5) != 1e-5) {
    throw std::runtime_error(path + ": layer_norm_epsilon must be 1e-5");
  }
  if (!optional("scale_attn_weights", true) || optional("scale_attn_by_inverse_layer_idx", false)) {
    throw std::runtime_error(path + ": scale_attn_weights must be true and scale_attn_by_inverse_layer_idx false");
  }
  read_special_tokens(config, json);
  if (json.contains("trained_positions")) config.trained_positions = integer("trained_positions");
  if (config.trained_positions < 0 || config.trained_positions > config.positions) {
    throw std::runtime_error(path + ": trained_positions must be at most n_positions");
  }
  return config;
}

void read_generation_config(const std::string& path, Gpt2Config& config) {
  read_special_tokens(config, parse_json(read_file(path), path));
}

std::string generation_config_json(const Gpt2Config& config) {
  const nlohmann::ordered_json eos = one_or_list(config.stop_tokens());
  const nlohmann::ordered_json json = {
      {"_from_model_config", true},
      {"bos_token_id", begin_id(config)},
      {"eos_token_id", eos},
  };
  return json.dump(2) + "\n";
}

std::string config_json(const Gpt2Config& config) {
  const nlohmann::ordered_json eos = one_or_list(config.stop_tokens());
  nlohmann::ordered_json json = {
      {"architectures", {"GPT2LMHeadModel"}},
      {"model_type", "gpt2"},
      {"vocab_size", config.vocabulary},
      {"n_positions", config.positions},
      {"n_ctx", config.positions},
      {"n_embd", config.channels},
      {"n_layer", config.layers},
      {"n_head", config.heads},
      {"n_inner", nullptr},
      {"activation_function", "gelu_new"},
      {"layer_norm_epsilon", 1e-5},
      {"initializer_range", 0.02},
      {"attn_pdrop", 0.0},
      {"embd_pdrop", 0.0},
      {"resid_pdrop", 0.0},
      {"tie_word_embeddings", config.tied_head},
      {"bos_token_id", begin_id(config)},
      {"eos_token_id", eos},
  };
  if (config.usable_positions() < config.positions) json["trained_positions"] = config.trained_positions;
  return json.dump(2) + "\n";
}

void validate(const Gpt2Config& config) {
  const auto bounded = [](int64_t value, int64_t most, const char* what) {
    if (value <= 0) throw std::invalid_argument(std::string("a model needs a positive ") + what);
    if (value > most) {
      throw std::invalid_argument(std::string("the ") + what + " can be at most " + std::to_string(most) + ", not " +
                                  std::to_string(value));
    }
  };
  bounded(config.vocabulary, kMostTokens, "vocabulary (vocab_size)");
  bounded(config.positions, kMostTokens, "number of positions (n_positions)");
  bounded(config.layers, kMostBlocks, "number of layers (n_layer)");
  bounded(config.channels, kMostChannels, "width (n_embd)");
  bounded(config.heads, kMostChannels, "number of heads (n_head)");
  if (config.channels % config.heads != 0) {
    throw std::invalid_argument("the width " + std::to_string(config.channels) + " (n_embd) is not divisible by " +
                                std::to_string(config.heads) + " heads (n_head)");
  }
}

std::vector<Parameter> gpt2_parameters(const Gpt2Config& config) {
  std::vector<Parameter> parameters;
  const auto add = [&](const std::string& name, int layer, int64_t rows, int64_t cols, bool matrix) -> Parameter& {
    Parameter parameter;
    parameter.index = static_cast<int>(parameters.size());
    parameter.name = name;
    parameter.layer = layer;
    parameter.rows = rows;
    parameter.cols = cols;
    parameter.padded_rows = rows;
    parameter.matrix = matrix;
    parameter.decay = matrix;
    parameters.push_back(parameter);
    return parameters.back();
  };
  const int64_t C = config.channels;
  Parameter& wte = add("wte.weight", -1, config.vocabulary, C, true);
  wte.padded_rows = config.padded_vocabulary();
  wte.embedding = true;
  wte.long_lived = true;
  add("wpe.weight", -1, config.positions, C, true).embedding = true;
  for (int64_t l = 0; l < config.layers; ++l) {
    const std::string block = "h." + std::to_string(l) + ".";
    const int layer = static_cast<int>(l);
    add(block + "ln_1.weight", layer, 1, C, false);
    add(block + "ln_1.bias", layer, 1, C, false);
    add(block + "attn.c_attn.weight", layer, C, 3 * C, true);
    add(block + "attn.c_attn.bias", layer, 1, 3 * C, false);
    add(block + "attn.c_proj.weight", layer, C, C, true);
    add(block + "attn.c_proj.bias", layer, 1, C, false);
    add(block + "ln_2.weight", layer, 1, C, false);
    add(block + "ln_2.bias", layer, 1, C, false);
    add(block + "mlp.c_fc.weight", layer, C, 4 * C, true);
    add(block + "mlp.c_fc.bias", layer, 1, 4 * C, false);
    add(block + "mlp.c_proj.weight", layer, 4 * C, C, true);
    add(block + "mlp.c_proj.bias", layer, 1, C, false);
  }
  add("ln_f.weight", -1, 1, C, false);
  add("ln_f.bias", -1, 1, C, false);
  if (!config.tied_head) {
    Parameter& head = add("lm_head.weight", -1, config.vocabulary, C, true);
    head.padded_rows = config.padded_vocabulary();
    head.long_lived = true;
  }
  return parameters;
}
