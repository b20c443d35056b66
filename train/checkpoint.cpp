// checkpoint.cpp: see checkpoint.h.
#include "train/checkpoint.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include "train/file_io.h"
#include "train/safetensors.h"
#include "train/version.h"
#include "train/weights_io.h"

namespace fs = std::filesystem;

namespace {

constexpr char kStateFile[] = "trainer_state.json";
constexpr char kOptimizerFile[] = "optimizer.safetensors";
constexpr char kStepPrefix[] = "step_";
constexpr char kTemporaryPrefix[] = ".tmp-";
constexpr int kFormatVersion = 1;

std::string dtype_code(DType dtype) {
  switch (dtype) {
    case DType::kF32: return "F32";
    case DType::kBF16: return "BF16";
    case DType::kI8: return "I8";
    case DType::kU8: return "U8";
    case DType::kI32: return "I32";
  }
  return "";
}

// Optimizer state and master copies, each with its scales as a tensor of its own.
std::vector<StateTensor> optimizer_tensors(Engine& engine) {
  std::vector<StateTensor> tensors = engine.optimizer().state();
  for (const Parameter& parameter : engine.store().parameters()) {
    const Tensor master = engine.store().master(parameter);
    if (master) tensors.push_back({parameter.name + ".master", master});
  }
  std::vector<StateTensor> scales;
  for (const StateTensor& state : tensors) {
    if (!state.tensor.scales) continue;
    const int64_t blocks = quant_blocks(state.tensor.elements());
    scales.push_back({state.name + ".scales", Tensor::of(state.tensor.scales, DType::kF32, {blocks})});
  }
  tensors.insert(tensors.end(), scales.begin(), scales.end());
  return tensors;
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  return {tensor.shape.begin(), tensor.shape.begin() + tensor.rank};
}

FileSummary save_optimizer(const std::string& path, Engine& engine) {
  const std::vector<StateTensor> tensors = optimizer_tensors(engine);
  std::vector<TensorEntry> entries;
  for (const StateTensor& state : tensors) {
    entries.push_back({state.name, dtype_code(state.tensor.dtype), shape_of(state.tensor), nullptr});
  }
  SafetensorsWriter writer(path, entries);
  std::vector<char> host;
  for (const StateTensor& state : tensors) {
    host.resize(state.tensor.bytes());
    engine.backend().copy(host.data(), state.tensor.data, host.size());
    engine.backend().synchronize();
    writer.write(host.data(), host.size());
  }
  return writer.finish();
}

void load_optimizer(const std::string& path, Engine& engine) {
  const SafetensorsReader reader(path);
  const std::vector<StateTensor> tensors = optimizer_tensors(engine);
  for (const StateTensor& state : tensors) {
    const TensorEntry* entry = reader.find(state.name);
    if (!entry) throw std::runtime_error(path + ": has no tensor '" + state.name + "'");
    if (entry->dtype != dtype_code(state.tensor.dtype) || entry->shape != shape_of(state.tensor)) {
      throw std::runtime_error(path + ": tensor '" + state.name + "' has another type or shape than this run's");
    }
    engine.backend().copy(state.tensor.data, entry->data, state.tensor.bytes());
  }
  engine.backend().synchronize();
  if (reader.entries().size() != tensors.size()) {
    throw std::runtime_error(path + ": holds " + std::to_string(reader.entries().size()) + " tensors, this run has " +
                             std::to_string(tensors.size()));
  }
}

std::vector<fs::path> finished_checkpoints(const std::string& run) {
  std::vector<fs::path> found;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(run, error)) {
    if (entry.path().filename().string().rfind(kStepPrefix, 0) == 0 && fs::exists(entry.path() / kStateFile)) {
      found.push_back(entry.path());
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

// Under its temporary name a half-removed checkpoint is not taken for a whole one.
void remove_checkpoint(const fs::path& path) {
  const fs::path doomed = path.parent_path() / (std::string(kTemporaryPrefix) + "removed-" + path.filename().string());
  fs::rename(path, doomed);
  fs::remove_all(doomed);
}

}  // namespace

std::string save_checkpoint(const std::string& run, const TrainerState& state, Engine& engine,
                            const std::string& tokenizer, int64_t keep) {
  char name[32];
  snprintf(name, sizeof name, "%s%08u", kStepPrefix, state.step);
  const std::string final_path = run + "/" + name;
  const std::string temporary = run + "/" + kTemporaryPrefix + name;
  try {
    fs::remove_all(temporary);
    fs::create_directories(temporary);
    std::map<std::string, FileSummary> files = save_weights(temporary, engine.store(), engine.backend());
    files["config.json"] = write_file(temporary + "/config.json", config_json(engine.config().model));
    files[kOptimizerFile] = save_optimizer(temporary + "/" + kOptimizerFile, engine);
    if (!tokenizer.empty()) files["tokenizer.bin"] = write_file(temporary + "/tokenizer.bin", tokenizer);
    nlohmann::ordered_json json = {{"format", kFormatVersion},
                                   {"version", kVersion},
                                   {"step", state.step},
                                   {"skipped", state.skipped},
                                   {"data_position",
                                    {{"sequence", state.position.sequence},
                                     {"sequence_length", state.position.sequence_length},
                                     {"seed", state.position.seed},
                                     {"fingerprint", state.position.fingerprint}}},
                                   {"options", state.options},
                                   {"tuning", state.tuning},
                                   {"files", nlohmann::json::object()}};
    for (const auto& [file, summary] : files) {
      json["files"][file] = {{"bytes", summary.bytes}, {"crc32", summary.crc32}};
    }
    write_file(temporary + "/" + kStateFile, json.dump(2) + "\n");
    sync_directory(temporary);
    if (fs::exists(final_path)) remove_checkpoint(final_path);
    fs::rename(temporary, final_path);
    sync_directory(run);
    replace_symlink(run + "/latest", name);
    sync_directory(run);
  } catch (const std::exception&) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);  // a full disk gets its room back
    throw;
  }
  const std::vector<fs::path> checkpoints = finished_checkpoints(run);
  for (size_t i = 0; keep > 0 && i + static_cast<size_t>(keep) < checkpoints.size(); ++i) {
    remove_checkpoint(checkpoints[i]);
  }
  return final_path;
}

std::string find_checkpoint(const std::string& path) {
  if (fs::exists(path + "/" + kStateFile)) return fs::canonical(path);
  const std::vector<fs::path> checkpoints = finished_checkpoints(path);
  if (!checkpoints.empty()) return fs::canonical(checkpoints.back());
  throw std::runtime_error(path + ": holds no checkpoint (neither " + kStateFile + " nor step_*/" + kStateFile + ")");
}

TrainerState read_checkpoint(const std::string& checkpoint) {
  const std::string path = checkpoint + "/" + kStateFile;
  TrainerState state;
  nlohmann::json json;
  try {
    json = nlohmann::json::parse(read_file(path));
    if (json.at("format") != kFormatVersion) {
      throw std::runtime_error(path + ": format " + json["format"].dump() + ", this program reads " +
                               std::to_string(kFormatVersion));
    }
    state.step = json.at("step");
    state.skipped = json.at("skipped");
    const nlohmann::json& position = json.at("data_position");
    state.position = {position.at("sequence"), position.at("sequence_length"), position.at("seed"),
                      position.at("fingerprint")};
    state.options = json.at("options");
    state.tuning = json.value("tuning", "");  // older checkpoints have none
    for (const auto& [name, expected] : json.at("files").items()) {
      const std::string file = checkpoint + "/" + name;
      if (!fs::exists(file)) throw std::runtime_error(file + ": is missing; the checkpoint is not whole");
      const FileSummary found = summarize_file(file);
      if (found.bytes != expected.at("bytes").get<uint64_t>()) {
        throw std::runtime_error(file + ": has " + std::to_string(found.bytes) + " bytes instead of " +
                                 expected["bytes"].dump() + "; the checkpoint is damaged");
      }
      if (found.crc32 != expected.at("crc32").get<uint32_t>()) {
        throw std::runtime_error(file + ": its checksum is not what " + kStateFile +
                                 " says; the checkpoint is damaged");
      }
    }
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(path + ": damaged (" + error.what() + ")");
  }
  return state;
}

void load_checkpoint(const std::string& checkpoint, Engine& engine) {
  load_weights({ModelSource::Kind::kDirectory, checkpoint, engine.config().model, true}, engine.store(),
               engine.backend());
  load_optimizer(checkpoint + "/" + kOptimizerFile, engine);  // after the weights: master copies are exact here
}

uint32_t newest_step(const std::string& run) {
  const std::vector<fs::path> checkpoints = finished_checkpoints(run);
  if (checkpoints.empty()) return 0;
  const std::string name = checkpoints.back().filename();
  return static_cast<uint32_t>(std::strtoul(name.c_str() + sizeof kStepPrefix - 1, nullptr, 10));
}

void clean_run(const std::string& run) {
  std::vector<fs::path> leftovers;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(run, error)) {
    if (entry.path().filename().string().rfind(kTemporaryPrefix, 0) == 0) leftovers.push_back(entry.path());
  }
  for (const fs::path& path : leftovers) fs::remove_all(path, error);
}
