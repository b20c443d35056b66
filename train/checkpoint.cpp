// checkpoint.cpp: see checkpoint.h.
#include "train/checkpoint.h"

#include <zlib.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <optional>
#include <sstream>
#include <vector>

#include "train/file_io.h"
#include "train/run_folder.h"
#include "train/safetensors.h"
#include "train/standard_streams.h"
#include "train/weights_io.h"

namespace fs = std::filesystem;

namespace {

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

// "" as path: nothing is written.
FileSummary save_optimizer(const std::string& path, Engine& engine) {
  const std::vector<SavedTensor> tensors = optimizer_tensors(engine);
  std::vector<TensorEntry> entries;
  for (const SavedTensor& saved : tensors) {
    entries.push_back({saved.name, safetensors_name(saved.shape.dtype), shape_of(saved.shape), nullptr});
  }
  std::optional<SafetensorsWriter> writer;
  if (!path.empty()) writer.emplace(path, entries);
  for_each_tensor(engine, tensors, Access::kRead, [&](const SavedTensor&, const Tensor& tensor) {
    if (writer) writer->write(tensor, engine.backend());
  });
  return writer ? writer->finish() : FileSummary{};
}

void load_optimizer(const std::string& path, Engine& engine) {
  const SafetensorsReader reader(path);
  const std::vector<SavedTensor> tensors = optimizer_tensors(engine);
  for_each_tensor(engine, tensors, Access::kUpdate, [&](const SavedTensor& saved, const Tensor& tensor) {
    const TensorEntry* entry = reader.find(saved.name);
    if (!entry) throw std::runtime_error(path + ": has no tensor '" + saved.name + "'");
    if (entry->dtype != safetensors_name(saved.shape.dtype) || entry->shape != shape_of(saved.shape)) {
      throw std::runtime_error(path + ": tensor '" + saved.name + "' has another type or shape than this run's");
    }
    engine.backend().copy(tensor.data, entry->data, tensor.bytes());
  });
  if (reader.entries().size() != tensors.size()) {
    throw std::runtime_error(path + ": holds " + std::to_string(reader.entries().size()) + " tensors, this run has " +
                             std::to_string(tensors.size()));
  }
}

}  // namespace

std::string save_checkpoint(const std::string& run, const TrainerState& state, Engine& engine,
                            const std::map<std::string, std::string>& files_along, int64_t keep) {
  const std::string temporary = temporary_checkpoint(run, state.step);
  std::string path;
  try {
    fs::remove_all(temporary);
    fs::create_directories(temporary);
    std::map<std::string, FileSummary> files = save_weights(temporary, engine.store(), engine.backend());
    files["config.json"] = write_file(temporary + "/config.json", config_json(engine.config().model));
    files[kOptimizerFile] = save_optimizer(temporary + "/" + kOptimizerFile, engine);
    for (const auto& [along, contents] : files_along) files[along] = write_file(temporary + "/" + along, contents);
    write_trainer_state(temporary, state, files);
    sync_directory(temporary);
    path = publish_checkpoint(run, temporary, state.step);
  } catch (const std::exception&) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);  // a full disk gets its room back
    throw;
  }
  try {
    remove_old_checkpoints(run, keep);
  } catch (const fs::filesystem_error& error) {  // costs room, not the run
    warn(error.path1().string() + " cannot be removed: " + error.code().message());
  }
  return path;
}

void take_part_in_checkpoint(Engine& engine) {
  if (!is_spread(engine.config())) return;
  save_weights("", engine.store(), engine.backend());
  save_optimizer("", engine);
}

std::string tensor_checksums(Engine& engine) {
  ParameterStore& store = engine.store();
  std::vector<SavedTensor> tensors;
  for (const Parameter& parameter : store.parameters()) {
    const Tensor shape = parameter.tensor(nullptr, parameter.quantized ? DType::kI8 : store.dtype(parameter));
    tensors.push_back(
        {parameter.name, parameter.layer, shape, [&store, &parameter] { return store.stored(parameter); }});
  }
  for (const SavedTensor& saved : optimizer_tensors(engine)) tensors.push_back(saved);
  std::string text;
  std::vector<unsigned char> piece(size_t{1} << 20);
  for_each_tensor(engine, tensors, Access::kRead, [&](const SavedTensor& saved, const Tensor& tensor) {
    const char* const data = static_cast<const char*>(tensor.data);
    uLong checksum = crc32(0, nullptr, 0);
    for (size_t done = 0; done < tensor.bytes(); done += piece.size()) {
      const size_t bytes = std::min(piece.size(), tensor.bytes() - done);
      engine.backend().copy(piece.data(), data + done, bytes);
      engine.backend().synchronize();
      checksum = crc32(checksum, piece.data(), static_cast<uInt>(bytes));
    }
    text += saved.name + " " + std::to_string(checksum) + "\n";
  });
  return text;
}

std::string first_difference(const std::vector<std::string>& checksums) {
  for (size_t rank = 1; rank < checksums.size(); ++rank) {
    std::istringstream first(checksums[0]), other(checksums[rank]);
    for (std::string a, b; std::getline(first, a) && std::getline(other, b);)
      if (a != b) return "rank " + std::to_string(rank) + " has another " + a.substr(0, a.find(' ')) + " than rank 0";
  }
  return "";
}

TrainerState read_checkpoint(const std::string& checkpoint) {
  TrainerState state = read_trainer_state(checkpoint);
  verify_files(checkpoint, state, CheckpointPart::kEverything);
  return state;
}

void load_checkpoint(const std::string& checkpoint, Engine& engine) {
  load_weights({ModelSource::Kind::kDirectory, checkpoint, engine.config().model, true}, engine.store(),
               engine.backend());
  load_optimizer(checkpoint + "/" + kOptimizerFile, engine);  // after the weights: master copies are exact here
}
