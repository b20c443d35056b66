// checkpoint.cpp: see checkpoint.h.
#include "train/checkpoint.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <vector>

#include "data/json_text.h"
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

// A tensor of optimizer.safetensors: its place is asked for when its layer has been acquired.
struct SavedTensor {
  std::string name;
  int layer;
  Tensor shape;  // dtype and shape
  std::function<Tensor()> find;
};

// Optimizer states, then what weights are more exactly than model.safetensors has them: master copies and 8-bit codes;
// then the scales of them all as tensors of their own.
std::vector<SavedTensor> optimizer_tensors(Engine& engine) {
  std::vector<SavedTensor> tensors;
  StateStore& states = engine.optimizer().states();
  for (size_t i = 0; i < states.list().size(); ++i) {
    const StateTensor& state = states.list()[i];
    tensors.push_back(
        {state.name, state.layer, state.tensor, [&states, i] { return states.get(static_cast<int>(i)); }});
  }
  ParameterStore& store = engine.store();
  for (const Parameter& parameter : store.parameters()) {
    if (engine.config().master_weights)
      tensors.push_back({parameter.name + ".master", parameter.layer, parameter.tensor(nullptr, DType::kF32),
                         [&store, &parameter] { return store.master(parameter); }});
    if (parameter.quantized)
      tensors.push_back({parameter.name + ".codes", parameter.layer, parameter.tensor(nullptr, DType::kI8),
                         [&store, &parameter] { return store.stored(parameter); }});
  }
  const size_t count = tensors.size();
  for (size_t i = 0; i < count; ++i) {
    const SavedTensor of = tensors[i];
    if (of.shape.dtype != DType::kI8 && of.shape.dtype != DType::kU8) continue;
    const Tensor scales = Tensor::of(nullptr, DType::kF32, {quant_blocks(of.shape.elements())});
    tensors.push_back({of.name + ".scales", of.layer, scales, [of, scales] {
                         Tensor found = scales;
                         found.data = of.find().scales;
                         return found;
                       }});
  }
  return tensors;
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  return {tensor.shape.begin(), tensor.shape.begin() + tensor.rank};
}

// f(tensor) for each of them, its layer's weights and states acquired; waits for the device after each.
template <typename F>
void for_each_tensor(Engine& engine, const std::vector<SavedTensor>& tensors, Access access, F&& f) {
  HeldLayer<ParameterStore> held(engine.store());
  for (const SavedTensor& saved : tensors) {
    held.hold(saved.layer, access);
    engine.optimizer().states().hold(saved.layer, access);
    f(saved, saved.find());
    engine.backend().synchronize();
  }
  engine.optimizer().states().hold(-1, access);
}

FileSummary save_optimizer(const std::string& path, Engine& engine) {
  const std::vector<SavedTensor> tensors = optimizer_tensors(engine);
  std::vector<TensorEntry> entries;
  for (const SavedTensor& saved : tensors) {
    entries.push_back({saved.name, dtype_code(saved.shape.dtype), shape_of(saved.shape), nullptr});
  }
  SafetensorsWriter writer(path, entries);
  for_each_tensor(engine, tensors, Access::kRead,
                  [&](const SavedTensor&, const Tensor& tensor) { writer.write(tensor, engine.backend()); });
  return writer.finish();
}

void load_optimizer(const std::string& path, Engine& engine) {
  const SafetensorsReader reader(path);
  const std::vector<SavedTensor> tensors = optimizer_tensors(engine);
  for_each_tensor(engine, tensors, Access::kUpdate, [&](const SavedTensor& saved, const Tensor& tensor) {
    const TensorEntry* entry = reader.find(saved.name);
    if (!entry) throw std::runtime_error(path + ": has no tensor '" + saved.name + "'");
    if (entry->dtype != dtype_code(saved.shape.dtype) || entry->shape != shape_of(saved.shape)) {
      throw std::runtime_error(path + ": tensor '" + saved.name + "' has another type or shape than this run's");
    }
    engine.backend().copy(tensor.data, entry->data, tensor.bytes());
  });
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
                            const std::map<std::string, std::string>& files_along, int64_t keep) {
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
    for (const auto& [along, contents] : files_along) files[along] = write_file(temporary + "/" + along, contents);
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
    json = parse_json(read_file(path), path);
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
    throw std::runtime_error(path + ": damaged (" + problem_of(error) + ")");
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
