// weights_io.cpp: see weights_io.h. Tensors pass through host memory one at a time.
#include "train/weights_io.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "train/llmc_model.h"
#include "train/options.h"
#include "train/safetensors.h"

namespace fs = std::filesystem;

namespace {

// IEEE half precision to float, exactly.
float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu, mantissa = half & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * bits_to_float(0x33800000u);  // 2^-24
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Copies `values` to a weight and its master copy, rounding to nearest where the weight is bf16.
void store_values(const Parameter& parameter, const std::vector<float>& values, ParameterStore& store,
                  Backend& backend) {
  store.acquire(parameter.layer);
  const Tensor weight = store.weight(parameter);
  const Tensor master = store.master(parameter);
  if (weight.dtype == DType::kF32) {
    backend.copy(weight.data, values.data(), weight.bytes());
  } else {
    std::vector<bf16> rounded(values.size());
    std::transform(values.begin(), values.end(), rounded.begin(), [](float value) { return from_float<bf16>(value); });
    backend.copy(weight.data, rounded.data(), weight.bytes());
    backend.synchronize();
  }
  if (master) backend.copy(master.data, values.data(), master.bytes());
  backend.synchronize();
  store.release(parameter.layer, true);
}

std::vector<float> to_floats(const TensorEntry& entry, const std::string& path) {
  std::vector<float> values(static_cast<size_t>(entry.elements()));
  if (entry.dtype == "F32") {
    std::memcpy(values.data(), entry.data, entry.bytes());
    return values;
  }
  if (entry.dtype != "F16" && entry.dtype != "BF16") {
    throw std::runtime_error(path + ": tensor '" + entry.name + "' is " + entry.dtype +
                             "; F32, F16 and BF16 can be read");
  }
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t bits;
    std::memcpy(&bits, static_cast<const char*>(entry.data) + 2 * i, 2);
    values[i] = entry.dtype == "F16" ? half_to_float(bits) : to_float(bf16{bits});
  }
  return values;
}

// All safetensors files of a directory, opened once: model.safetensors, or those that the index names.
class DirectoryTensors {
 public:
  explicit DirectoryTensors(const std::string& directory) {
    const std::string single = directory + "/model.safetensors", index = single + ".index.json";
    if (fs::exists(single)) {
      files_.push_back(std::make_unique<SafetensorsReader>(single));
    } else {
      std::vector<std::string> names;
      try {
        const nlohmann::json json = nlohmann::json::parse(::read_file(index));
        for (const auto& [tensor, file] : json.at("weight_map").items()) names.push_back(file.get<std::string>());
      } catch (const nlohmann::json::exception& error) {
        throw std::runtime_error(index + ": not a safetensors index (" + error.what() + ")");
      }
      std::sort(names.begin(), names.end());
      names.erase(std::unique(names.begin(), names.end()), names.end());
      for (const std::string& name : names) {
        files_.push_back(std::make_unique<SafetensorsReader>(directory + "/" + name));
      }
    }
  }

  const TensorEntry* find(const std::string& name, std::string& path) const {
    for (const auto& file : files_) {
      for (const char* prefix : {"transformer.", ""}) {
        if (const TensorEntry* entry = file->find(prefix + name)) {
          path = file->path();
          return entry;
        }
      }
    }
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<SafetensorsReader>> files_;
};

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t extent : shape) text += (text.empty() ? "" : " x ") + std::to_string(extent);
  return text;
}

void load_directory(const std::string& directory, ParameterStore& store, Backend& backend) {
  const DirectoryTensors tensors(directory);
  for (const Parameter& parameter : store.parameters()) {
    std::string path = directory;
    const TensorEntry* entry = tensors.find(parameter.name, path);
    if (!entry) throw std::runtime_error(directory + ": has no tensor '" + parameter.name + "'");
    std::vector<int64_t> expected = {parameter.cols};
    if (parameter.matrix) expected.insert(expected.begin(), parameter.rows);
    if (entry->shape != expected) {
      throw std::runtime_error(path + ": tensor '" + entry->name + "' is " + shape_text(entry->shape) +
                               ", config.json asks for " + shape_text(expected));
    }
    store_values(parameter, to_floats(*entry, path), store, backend);
  }
}

std::string dtype_code(DType dtype) { return dtype == DType::kF32 ? "F32" : "BF16"; }

std::string file_name(const Parameter& parameter) {
  return parameter.name == "lm_head.weight" ? parameter.name : "transformer." + parameter.name;
}

FileSummary write_shard(const std::string& path, const std::vector<const Parameter*>& parameters, ParameterStore& store,
                        Backend& backend) {
  std::vector<TensorEntry> entries;
  for (const Parameter* parameter : parameters) {
    std::vector<int64_t> shape = {parameter->cols};
    if (parameter->matrix) shape.insert(shape.begin(), parameter->rows);
    entries.push_back({file_name(*parameter), dtype_code(store.weight(*parameter).dtype), shape, nullptr});
  }
  SafetensorsWriter writer(path, entries);
  std::vector<char> host;
  for (const Parameter* parameter : parameters) {
    store.acquire(parameter->layer);
    const Tensor weight = store.weight(*parameter);
    host.resize(weight.bytes());
    backend.copy(host.data(), weight.data, weight.bytes());
    backend.synchronize();
    store.release(parameter->layer, false);
    writer.write(host.data(), host.size());
  }
  return writer.finish();
}

}  // namespace

ModelSource find_model(const std::string& name) {
  if (is_preset(name)) return {ModelSource::Kind::kPreset, name, preset(name), false};
  if (fs::is_directory(name)) {
    const bool weights = fs::exists(name + "/model.safetensors") || fs::exists(name + "/model.safetensors.index.json");
    return {ModelSource::Kind::kDirectory, name, read_config(name + "/config.json"), weights};
  }
  if (fs::is_regular_file(name)) {
    const std::string extension = fs::path(name).extension();
    if (extension == ".json") return {ModelSource::Kind::kConfigFile, name, read_config(name), false};
    if (extension == ".bin") return {ModelSource::Kind::kLlmcBin, name, llmc_config(name), true};
  }
  try {
    return {ModelSource::Kind::kPreset, name, preset(name), false};
  } catch (const std::invalid_argument& error) {
    throw UsageError(error.what());
  }
}

void load_weights(const ModelSource& source, ParameterStore& store, Backend& backend) {
  if (source.kind == ModelSource::Kind::kLlmcBin) {
    load_llmc(source.path, store.parameters(), [&](const Parameter& parameter, const std::vector<float>& values) {
      store_values(parameter, values, store, backend);
    });
  } else {
    load_directory(source.path, store, backend);
  }
}

std::map<std::string, FileSummary> save_weights(const std::string& directory, ParameterStore& store, Backend& backend,
                                                size_t shard_bytes) {
  std::vector<std::vector<const Parameter*>> shards(1);
  size_t in_shard = 0, total = 0;
  for (const Parameter& parameter : store.parameters()) {
    const size_t bytes = store.weight(parameter).bytes();
    if (in_shard > 0 && in_shard + bytes > shard_bytes) {
      shards.emplace_back();
      in_shard = 0;
    }
    shards.back().push_back(&parameter);
    in_shard += bytes;
    total += bytes;
  }
  std::map<std::string, FileSummary> files;
  if (shards.size() == 1) {
    files["model.safetensors"] = write_shard(directory + "/model.safetensors", shards[0], store, backend);
    return files;
  }
  nlohmann::ordered_json index = {{"metadata", {{"total_size", total}}}, {"weight_map", nlohmann::json::object()}};
  for (size_t i = 0; i < shards.size(); ++i) {
    char name[64];
    snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
    files[name] = write_shard(directory + "/" + name, shards[i], store, backend);
    for (const Parameter* parameter : shards[i]) index["weight_map"][file_name(*parameter)] = name;
  }
  const std::string index_name = "model.safetensors.index.json";
  files[index_name] = write_file(directory + "/" + index_name, index.dump(2) + "\n");
  return files;
}
