// weights_io.cpp: see weights_io.h. Tensors pass through host memory one at a time.
#include "train/weights_io.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>

#include "data/json_text.h"
#include "train/llmc_model.h"
#include "train/options.h"
#include "train/safetensors.h"
#include "train/trainer_state.h"

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

// Elements [begin, begin + count) of a tensor of a file, as floats.
using ReadValues = std::function<void(float* values, int64_t begin, int64_t count)>;

constexpr int64_t kPiece = int64_t{1} << 21;  // elements in host memory at a time

// Copies a tensor to rows of a weight or its master copy, rounding to nearest where those are bf16.
void copy_rows(const Parameter& parameter, Tensor rows, int64_t begin, const ReadValues& read, Backend& backend) {
  std::vector<float> values;
  std::vector<bf16> rounded;
  for (int64_t done = 0; done < rows.elements(); done += kPiece) {
    const int64_t count = std::min(kPiece, rows.elements() - done);
    values.resize(static_cast<size_t>(count));
    read(values.data(), begin * parameter.cols + done, count);
    const void* from = values.data();
    if (rows.dtype == DType::kBF16) {
      rounded.resize(values.size());
      std::transform(values.begin(), values.end(), rounded.begin(), from_float<bf16>);
      from = rounded.data();
    }
    const size_t size = dtype_size(rows.dtype);
    backend.copy(rows.as<char>() + static_cast<size_t>(done) * size, from, static_cast<size_t>(count) * size);
    backend.synchronize();
  }
}

// The parameter's layer is acquired.
void store_values(const Parameter& parameter, const ReadValues& read, ParameterStore& store, Backend& backend) {
  const auto fill = [&](Tensor rows, int64_t begin) { copy_rows(parameter, rows, begin, read, backend); };
  store.assign(parameter, fill);
  const Tensor master = store.master(parameter);
  if (master) fill(master, 0);
  backend.synchronize();
}

ReadValues values_of(const TensorEntry& entry, const std::string& path) {
  if (entry.dtype != "F32" && entry.dtype != "F16" && entry.dtype != "BF16") {
    throw std::runtime_error(path + ": tensor '" + entry.name + "' is " + entry.dtype +
                             "; F32, F16 and BF16 can be read");
  }
  return
      [data = static_cast<const char*>(entry.data), dtype = entry.dtype](float* values, int64_t begin, int64_t count) {
        if (dtype == "F32") {
          std::memcpy(values, data + 4 * begin, static_cast<size_t>(count) * sizeof(float));
          return;
        }
        for (int64_t i = 0; i < count; ++i) {
          uint16_t bits;
          std::memcpy(&bits, data + 2 * (begin + i), 2);
          values[i] = dtype == "F16" ? half_to_float(bits) : to_float(bf16{bits});
        }
      };
}

// The parameter's name without what frameworks put before it: Hugging Face's "transformer.", torch.compile's
// "_orig_mod.", DataParallel's "module.", in any order.
std::string bare_name(std::string name) {
  for (bool found = true; found;) {
    found = false;
    for (const std::string prefix : {"transformer.", "_orig_mod.", "module."}) {
      if (name.rfind(prefix, 0) != 0) continue;
      name.erase(0, prefix.size());
      found = true;
    }
  }
  return name;
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
        const nlohmann::json json = parse_json(::read_file(index), index);
        for (const auto& [tensor, file] : json.at("weight_map").items()) names.push_back(file.get<std::string>());
      } catch (const nlohmann::json::exception& error) {
        throw std::runtime_error(index + ": not a safetensors index (" + problem_of(error) + ")");
      }
      for (const std::string& name : names) {
        if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos) {
          throw std::runtime_error(index + ": '" + name + "' is no name of a file beside it");
        }
      }
      std::sort(names.begin(), names.end());
      names.erase(std::unique(names.begin(), names.end()), names.end());
      for (const std::string& name : names) {
        files_.push_back(std::make_unique<SafetensorsReader>(directory + "/" + name));
      }
    }
    list_tensors();
  }

  const TensorEntry* find(const std::string& name, std::string& path) const {
    const auto found = by_name_.find(name);
    if (found == by_name_.end()) return nullptr;
    path = found->second.path;
    return found->second.entry;
  }

 private:
  struct Place {
    const TensorEntry* entry;
    std::string path;
  };

  void list_tensors() {
    for (const auto& file : files_) {
      for (const auto& [name, entry] : file->entries()) {
        const auto [place, fresh] = by_name_.try_emplace(bare_name(name), Place{&entry, file->path()});
        if (!fresh) {
          throw std::runtime_error(file->path() + ": tensor '" + name + "' is there again, as '" +
                                   place->second.entry->name + "' of " + place->second.path);
        }
      }
    }
  }

  std::vector<std::unique_ptr<SafetensorsReader>> files_;
  std::map<std::string, Place> by_name_;  // by bare name
};

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t extent : shape) text += (text.empty() ? "" : " x ") + std::to_string(extent);
  return text;
}

void load_directory(const std::string& directory, bool tied_head, ParameterStore& store, Backend& backend) {
  const DirectoryTensors tensors(directory);
  HeldLayer<ParameterStore> held(store);
  for (const Parameter& parameter : store.parameters()) {
    std::string path = directory;
    const TensorEntry* entry = tensors.find(parameter.name, path);
    // Of a tied pair safetensors' save_model keeps one name only, the first in the alphabet.
    if (!entry && tied_head && parameter.name == "wte.weight") entry = tensors.find("lm_head.weight", path);
    if (!entry) throw std::runtime_error(directory + ": has no tensor '" + parameter.name + "'");
    std::vector<int64_t> expected = {parameter.cols};
    if (parameter.matrix) expected.insert(expected.begin(), parameter.rows);
    if (entry->shape != expected) {
      throw std::runtime_error(path + ": tensor '" + entry->name + "' is " + shape_text(entry->shape) +
                               ", config.json asks for " + shape_text(expected));
    }
    held.hold(parameter.layer, Access::kOverwrite);
    store_values(parameter, values_of(*entry, path), store, backend);
  }
}

std::string file_name(const Parameter& parameter) {
  return parameter.name == "lm_head.weight" ? parameter.name : "transformer." + parameter.name;
}

// "" as path: nothing is written.
FileSummary write_shard(const std::string& path, const std::vector<const Parameter*>& parameters, ParameterStore& store,
                        Backend& backend) {
  std::vector<TensorEntry> entries;
  for (const Parameter* parameter : parameters) {
    std::vector<int64_t> shape = {parameter->cols};
    if (parameter->matrix) shape.insert(shape.begin(), parameter->rows);
    entries.push_back({file_name(*parameter), safetensors_name(store.dtype(*parameter)), shape, nullptr});
  }
  std::optional<SafetensorsWriter> writer;
  if (!path.empty()) writer.emplace(path, entries);
  HeldLayer<ParameterStore> held(store);
  for (const Parameter* parameter : parameters) {
    held.hold(parameter->layer, Access::kRead);
    if (writer) writer->write(store.weight(*parameter), backend);
  }
  return writer ? writer->finish() : FileSummary{};
}

// PyTorch's files are ZIP archives, or in its first years pickles.
bool is_pytorch_file(const std::string& path) {
  InputFile file(path);
  char start[2] = {};
  return file.read(start, sizeof start) == sizeof start && ((start[0] == 'P' && start[1] == 'K') || start[0] == '\x80');
}

// Whether a file holds weights, in a format that is not read here, by its name; .bin means many things, token shards
// among them.
bool weights_of_another_kind(const fs::path& path) {
  const std::string name = path.filename();
  for (const char* other : {"optimizer", "scheduler", "training_args", "rng_state", "scaler"}) {
    if (name.rfind(other, 0) == 0) return false;  // of a trainer, not of a model
  }
  for (const char* part : {"pytorch_model", ".ckpt"}) {
    if (name.find(part) != std::string::npos) return true;
  }
  const std::string extension = path.extension();
  for (const char* known : {".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".npz"}) {
    if (extension == known) return true;
  }
  return extension == ".bin" && is_pytorch_file(path);
}

// What to do about a folder's weights of another kind.
std::string conversion(const std::string& directory, const std::string& file) {
  const std::string extension = fs::path(file).extension();
  std::string how;
  if (extension == ".h5" || file.find(".ckpt") != std::string::npos) how = ", from_tf=True";
  if (extension == ".msgpack") how = ", from_flax=True";
  if (extension == ".gguf") how = ", gguf_file='" + file + "'";
  const std::string from = directory.empty() ? "." : directory;
  return file + " cannot be read, model.safetensors can: python3 -c \"from transformers import GPT2LMHeadModel as M; " +
         "M.from_pretrained('" + from + "'" + how + ").save_pretrained('" + from + "-safetensors')\" makes it";
}

// Whether there are weights to be read; throws UsageError where there are only others, so that a model is not trained
// from scratch by mistake.
bool has_weights(const std::string& directory) {
  for (const char* file : {"/model.safetensors", "/model.safetensors.index.json"}) {
    const fs::path path = directory + file;
    if (fs::exists(path)) return true;
    if (fs::is_symlink(path)) throw UsageError(path.string() + ": is a link to a file that is not there");
  }
  std::vector<fs::path> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory)) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  for (const fs::path& path : files) {
    if (weights_of_another_kind(path)) throw UsageError(directory + ": " + conversion(directory, path.filename()));
    if (path.filename() == kOptimizerFile) throw UsageError(directory + "/model.safetensors: is missing");
    if (path.extension() == ".safetensors") {
      throw UsageError(path.string() +
                       ": is not named model.safetensors, and there is no model.safetensors.index.json " +
                       "that names it");
    }
  }
  return false;
}

}  // namespace

ModelSource find_model(const std::string& name) {
  if (is_preset(name)) return {ModelSource::Kind::kPreset, name, preset(name), false};
  if (fs::is_directory(name)) {
    const std::string path = fs::canonical(name);  // of a running run, where `latest` may move before all is read
    verify_model(path, CheckpointPart::kConfig);
    ModelSource source{ModelSource::Kind::kDirectory, path, read_config(path + "/config.json"), false};
    const std::string generation = path + "/generation_config.json";
    if (fs::exists(generation)) read_generation_config(generation, source.config);
    source.has_weights = has_weights(path);
    return source;
  }
  if (fs::is_regular_file(name)) {
    const std::string extension = fs::path(name).extension();
    if (extension == ".json") return {ModelSource::Kind::kConfigFile, name, read_config(name), false};
    if (extension == ".bin" && !is_pytorch_file(name)) {
      return {ModelSource::Kind::kLlmcBin, name, llmc_config(name), true};
    }
    if (weights_of_another_kind(name)) {
      throw UsageError(name + ": " + conversion(fs::path(name).parent_path().string(), fs::path(name).filename()));
    }
    if (extension == ".safetensors") {
      throw UsageError(name + ": --model takes the folder with model.safetensors and config.json, not the file");
    }
  }
  try {
    return {ModelSource::Kind::kPreset, name, preset(name), false};
  } catch (const std::invalid_argument& error) {
    throw UsageError(error.what());
  }
}

void load_weights(const ModelSource& source, ParameterStore& store, Backend& backend) {
  if (source.kind == ModelSource::Kind::kLlmcBin) {
    HeldLayer<ParameterStore> held(store);
    load_llmc(source.path, store.parameters(), [&](const Parameter& parameter, const std::vector<float>& values) {
      held.hold(parameter.layer, Access::kUpdate);
      const auto read = [&](float* out, int64_t begin, int64_t count) {
        std::copy_n(&values[static_cast<size_t>(begin)], count, out);
      };
      store_values(parameter, read, store, backend);
    });
  } else {
    load_directory(source.path, source.config.tied_head, store, backend);
  }
}

std::map<std::string, FileSummary> save_weights(const std::string& directory, ParameterStore& store, Backend& backend,
                                                size_t shard_bytes) {
  std::vector<std::vector<const Parameter*>> shards(1);
  size_t in_shard = 0, total = 0;
  for (const Parameter& parameter : store.parameters()) {
    const size_t bytes = static_cast<size_t>(parameter.elements()) * dtype_size(store.dtype(parameter));
    if (in_shard > 0 && in_shard + bytes > shard_bytes) {
      shards.emplace_back();
      in_shard = 0;
    }
    shards.back().push_back(&parameter);
    in_shard += bytes;
    total += bytes;
  }
  std::map<std::string, FileSummary> files;
  if (directory.empty()) {
    for (const auto& shard : shards) write_shard("", shard, store, backend);
    return files;
  }
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
