// trainer_state.cpp: see trainer_state.h.
#include "train/trainer_state.h"

#include <filesystem>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "data/json_text.h"
#include "train/version.h"

namespace fs = std::filesystem;

namespace {

constexpr int kFormatVersion = 2, kFormatWithoutChecksum = 1;
constexpr char kSeal[] = "\"crc32\": ";

// An object as dump(2) writes it, with a last field: the checksum of all bytes before that field's value.
std::string sealed(std::string text) {
  text.resize(text.rfind('\n'));  // the closing brace comes after the field
  text += std::string(",\n  ") + kSeal;
  return text + std::to_string(checksum(text)) + "\n}\n";
}

bool seal_holds(const std::string& text) {
  const size_t seal = text.rfind(kSeal);
  if (seal == std::string::npos) return false;
  const std::string before = text.substr(0, seal + sizeof kSeal - 1);
  return text == before + std::to_string(checksum(before)) + "\n}\n";
}

const nlohmann::json& field(const nlohmann::json& json, const char* key) {
  const auto found = json.is_object() ? json.find(key) : json.end();
  if (found == json.end()) throw std::runtime_error(std::string("damaged: has no '") + key + "'");
  return *found;
}

std::runtime_error wrong(const char* key, const nlohmann::json& value) {
  return std::runtime_error(std::string("damaged: ") + key + " is " + value.dump().substr(0, 80));
}

// nlohmann's own conversions wrap around and cut fractions off.
template <typename T>
T integer(const nlohmann::json& json, const char* key) {
  const nlohmann::json& value = field(json, key);
  const bool fits = value.is_number_unsigned()
                        ? value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<T>::max())
                        : value.is_number_integer() && std::is_signed_v<T>;
  if (!fits) throw wrong(key, value);
  return value.get<T>();
}

const nlohmann::json& object(const nlohmann::json& json, const char* key) {
  const nlohmann::json& value = field(json, key);
  if (!value.is_object()) throw wrong(key, value);
  return value;
}

TrainerState state_of(const nlohmann::json& json, bool sealed) {
  TrainerState state;
  state.sealed = sealed;
  state.step = integer<uint32_t>(json, "step");
  state.skipped = integer<int64_t>(json, "skipped");
  const nlohmann::json& position = object(json, "data_position");
  state.position = {integer<int64_t>(position, "sequence"), integer<int64_t>(position, "sequence_length"),
                    integer<uint64_t>(position, "seed"), integer<int64_t>(position, "fingerprint")};
  state.options = object(json, "options");
  if (sealed || json.contains("tuning")) {  // early checkpoints have none
    const nlohmann::json& tuning = field(json, "tuning");
    if (!tuning.is_string()) throw wrong("tuning", tuning);
    state.tuning = tuning;
  }
  for (const auto& [name, summary] : object(json, "files").items()) {
    if (name.empty() || fs::path(name).filename() != name) throw wrong("a file's name", name);
    state.files[name] = {integer<uint64_t>(summary, "bytes"), integer<uint32_t>(summary, "crc32")};
  }
  return state;
}

TrainerState state_of(const std::string& text) {
  const nlohmann::json json = parse_json(text, "damaged");
  const int64_t format =
      json.is_object() && json.contains("format") ? integer<int64_t>(json, "format") : kFormatVersion;
  if (format != kFormatVersion && format != kFormatWithoutChecksum) {
    throw std::runtime_error("format " + std::to_string(format) + "; this program reads 1 and " +
                             std::to_string(kFormatVersion));
  }
  if (format == kFormatVersion ? !seal_holds(text) : json.contains("crc32")) {
    throw std::runtime_error("its checksum is not that of its contents: damaged, or edited");
  }
  return state_of(json, format == kFormatVersion);
}

bool is_part(const std::string& name, CheckpointPart part) {
  if (part == CheckpointPart::kConfig) return name == "config.json" || name == "generation_config.json";
  return part == CheckpointPart::kEverything || name != kOptimizerFile;
}

// What must be listed, so that nothing is read unchecked.
void check_listed(const std::string& checkpoint, const TrainerState& state, const std::string& name) {
  if (!state.files.contains(name)) {
    throw std::runtime_error(checkpoint + "/" + name + ": is none of the files that " + kStateFile +
                             " lists; the checkpoint is damaged");
  }
}

void check_shards_listed(const std::string& checkpoint, const TrainerState& state, const std::string& index) {
  const nlohmann::json json = parse_json(read_file(checkpoint + "/" + index), checkpoint + "/" + index);
  for (const auto& [tensor, file] : object(json, "weight_map").items()) {
    check_listed(checkpoint, state, file.is_string() ? file.get<std::string>() : file.dump());
  }
}

}  // namespace

void write_trainer_state(const std::string& checkpoint, const TrainerState& state,
                         const std::map<std::string, FileSummary>& files) {
  nlohmann::ordered_json json = {{"format", kFormatVersion},
                                 {"version", kVersion},
                                 {"step", state.step},
                                 {"skipped", state.skipped},
                                 {"data_position",
                                  {{"sequence", state.position.sequence},
                                   {"sequence_length", state.position.sequence_length},
                                   {"seed", state.position.seed},
                                   {"fingerprint", state.position.fingerprint}}},
                                 {"options", nlohmann::ordered_json(state.options)},
                                 {"tuning", state.tuning},
                                 {"files", nlohmann::ordered_json::object()}};
  for (const auto& [name, summary] : files) {
    json["files"][name] = {{"bytes", summary.bytes}, {"crc32", summary.crc32}};
  }
  write_file(checkpoint + "/" + kStateFile, sealed(json.dump(2)));
}

TrainerState read_trainer_state(const std::string& checkpoint) {
  const std::string path = checkpoint + "/" + kStateFile, text = read_file(path);
  try {
    return state_of(text);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
}

void verify_files(const std::string& checkpoint, const TrainerState& state, CheckpointPart part) {
  const std::string single = "model.safetensors", index = single + ".index.json";
  const bool shards = !fs::exists(checkpoint + "/" + single) && fs::exists(checkpoint + "/" + index);
  for (const std::string& name : {std::string("config.json"), shards ? index : single, std::string(kOptimizerFile)}) {
    if (is_part(name, part)) check_listed(checkpoint, state, name);
  }
  if (part == CheckpointPart::kEverything && fs::exists(checkpoint + "/tokenizer.bin")) {
    check_listed(checkpoint, state, "tokenizer.bin");
  }
  const std::string damaged =
      "; the checkpoint is damaged, or was changed (without " + std::string(kStateFile) + " it can still be a --model)";
  for (const auto& [name, expected] : state.files) {  // sizes first: they cost nothing
    const std::string file = checkpoint + "/" + name;
    if (!is_part(name, part)) continue;
    if (!fs::exists(file)) throw std::runtime_error(file + ": is missing; the checkpoint is not whole");
    if (fs::is_regular_file(file) && fs::file_size(file) != expected.bytes) {
      throw std::runtime_error(file + ": has " + std::to_string(fs::file_size(file)) + " bytes instead of " +
                               std::to_string(expected.bytes) + damaged);
    }
  }
  for (const auto& [name, expected] : state.files) {
    const std::string file = checkpoint + "/" + name;
    if (is_part(name, part) && summarize_file(file).crc32 != expected.crc32) {
      throw std::runtime_error(file + ": its checksum is not what " + kStateFile + " says" + damaged);
    }
  }
  if (shards && part != CheckpointPart::kConfig) check_shards_listed(checkpoint, state, index);
}

void verify_model(const std::string& directory, CheckpointPart part) {
  if (fs::exists(directory + "/" + kStateFile)) verify_files(directory, read_trainer_state(directory), part);
}
