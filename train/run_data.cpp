// run_data.cpp: see run_data.h.
#include "train/run_data.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <vector>

#include "data/system_text.h"
#include "data/token_loader.h"
#include "train/trainer.h"
#include "train/trainer_state.h"

namespace fs = std::filesystem;

namespace {

constexpr char kTrain[] = "train";
constexpr size_t kTrainLength = sizeof kTrain - 1;

bool is_glob(const std::string& text) { return text.find_first_of("*?[") != std::string::npos; }
bool has_digit(const std::string& text) { return text.find_first_of("0123456789") != std::string::npos; }

// "_000012-of-20.bin" -> "_*-of-*.bin"
std::string starred(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (!std::isdigit(static_cast<unsigned char>(c))) {
      out += c;
    } else if (out.empty() || out.back() != '*') {
      out += '*';
    }
  }
  return out;
}

// What may stand after "val" where `rest` stands after "train".
std::vector<std::string> endings(const std::string& rest) {
  std::vector<std::string> forms;
  if (is_glob(rest) || !has_digit(rest)) forms.push_back(rest);
  if (has_digit(rest) && rest.find('[') == std::string::npos) forms.push_back(starred(rest));
  if (!rest.empty() && (rest[0] == '_' || rest[0] == '-')) {
    forms.push_back(rest[0] + ("*" + fs::path(rest).extension().string()));
  }
  return forms;
}

// Where the last "train" that is a word of its own begins, else the last one, else npos.
size_t last_train(const std::string& name) {
  const auto in_a_word = [&](size_t at) {
    return at < name.size() && std::isalnum(static_cast<unsigned char>(name[at]));
  };
  for (size_t at = name.rfind(kTrain); at != std::string::npos; at = at == 0 ? at - 1 : name.rfind(kTrain, at - 1)) {
    if ((at == 0 || !in_a_word(at - 1)) && !in_a_word(at + kTrainLength)) return at;
  }
  return name.rfind(kTrain);
}

// The validation patterns that have files, for all training patterns, with commas between; `looked_for` says what had
// none.
std::string find_validation(const std::string& training, std::string& looked_for) {
  std::string found;
  for (const std::string& pattern : split_globs(training)) {
    const std::vector<std::string> candidates = validation_patterns(pattern);
    const auto with_files = std::find_if(candidates.begin(), candidates.end(),
                                         [](const std::string& c) { return !matching_files(c).empty(); });
    if (with_files != candidates.end()) {
      if (("," + found + ",").find("," + *with_files + ",") == std::string::npos) {
        found += (found.empty() ? "" : ",") + *with_files;
      }
    } else if (looked_for.empty()) {
      looked_for = candidates.empty() ? pattern + " has no 'train' in its name to look for 'val' instead"
                                      : "no file matches " + candidates.front();
    }
  }
  return found;
}

// The options of the run that a model is a checkpoint of, or null.
nlohmann::json options_of_run(const std::string& model) {
  return fs::exists(fs::path(model) / kStateFile) ? read_trainer_state(model).options : nlohmann::json();
}

}  // namespace

std::vector<std::string> validation_patterns(const std::string& training_pattern) {
  const size_t slash = training_pattern.rfind('/');
  const size_t name_at = slash == std::string::npos ? 0 : slash + 1;
  const std::string folder = training_pattern.substr(0, name_at), name = training_pattern.substr(name_at);
  std::vector<std::string> names;
  const size_t at = last_train(name);
  if (at != std::string::npos) {
    const size_t end = at + kTrainLength + (name.compare(at + kTrainLength, 3, "ing") == 0 ? 3 : 0);  // "training"
    for (const std::string& ending : endings(name.substr(end))) {
      for (const char* word : {"val", "valid", "validation"}) names.push_back(name.substr(0, at) + word + ending);
    }
  }
  std::vector<std::string> patterns;
  for (const std::string& candidate : names) patterns.push_back(folder + candidate);
  // "x/train/*.bin" -> "x/val/*.bin"
  const size_t folder_at = ("/" + folder).rfind("/train/");
  if (folder_at != std::string::npos) {
    names.push_back(starred(name));
    for (const char* word : {"val", "valid", "validation"}) {
      const std::string beside = folder.substr(0, folder_at) + word + folder.substr(folder_at + kTrainLength);
      for (const std::string& candidate : names) patterns.push_back(beside + candidate);
    }
  }
  return patterns;
}

std::string resolve_data(Options& options) {
  if (options.data.empty()) {
    const SystemTextPaths paths = make_system_text("data");
    if (paths.created) std::printf("no --data: made shards of the text found on this machine, as bytes, under data/\n");
    options.data = paths.train;
    if (options.val_data.empty()) options.val_data = paths.validation;
  }
  if (!options.val_data.empty()) return "";
  std::string looked_for;
  const std::string found = find_validation(options.data, looked_for);
  if (found.empty()) return looked_for;
  const std::vector<std::string> training = expand_globs(options.data);
  for (const std::string& path : expand_globs(found, "--val-data")) {
    if (std::binary_search(training.begin(), training.end(), path)) return path + " is among the training shards";
  }
  options.val_data = found;
  return "";
}

std::string resolve_evaluation_data(Options& options) {
  if (!options.data.empty()) {
    resolve_data(options);
    if (!options.val_data.empty()) return options.val_data + " (the validation shards beside --data)";
    options.val_data = options.data;
    return options.val_data + " (the training shards)";
  }
  const nlohmann::json run = options_of_run(options.model);
  if (run.is_null())
    throw UsageError("eval needs --val-data: " + options.model + " does not say what it was trained on");
  std::string val_data;
  DataFormat format = options.data_format;
  try {
    val_data = run.value("val_data", "");
    read(format, "data-format", run.value("data_format", name_of(kDataFormatNames, format)), kDataFormatNames);
  } catch (const std::exception&) {
    throw std::runtime_error(options.model + "/trainer_state.json: damaged (val_data and data_format are texts)");
  }
  if (val_data.empty())
    throw UsageError("eval needs --val-data: the run of " + options.model + " had no validation shards");
  for (const std::string& pattern : split_globs(val_data)) {
    if (matching_files(pattern).empty()) {
      throw UsageError("eval needs --val-data: the run's own validation shards, " + pattern + ", are not there");
    }
  }
  options.val_data = val_data;
  if (!options.was_given("data-format")) options.data_format = format;
  return options.val_data + " (the validation shards of the model's run)";
}

int64_t data_vocabulary(const Options& options, const std::string& pattern, const std::string& flag) {
  if (options.data_format == DataFormat::kNanogpt) return options.vocab_size;
  Options probe = options;
  probe.engine.shapes.batch = probe.engine.shapes.sequence = 1;
  const int64_t declared = open_loader(probe, pattern, 0, flag == "--data").vocabulary();
  if (options.vocab_size == 0) return declared;
  if (options.vocab_size < declared) {
    throw UsageError("--vocab-size " + std::to_string(options.vocab_size) + " is less than the " +
                     std::to_string(declared) + " tokens that the shards of " + flag + " declare");
  }
  return options.vocab_size;
}

std::string vocabulary_warning(const RunSetup& setup, int64_t data, const std::string& pattern) {
  const int64_t model = setup.engine.model.vocabulary;
  if (setup.source.has_weights && data > 0) {
    // A vocabulary is often padded: to a multiple of 128, or by a few in a hundred.
    const bool padded = model <= (data + 127) / 128 * 128 || model - data <= model / 16;
    if (!padded) {
      return "the data has a vocabulary of " + std::to_string(data) + " tokens, the model one of " +
             std::to_string(model) + ": is it of another tokenizer? " + pattern;
    }
  }
  if (setup.options.data_format != DataFormat::kNanogpt || setup.options.vocab_size > 0) return "";
  if (setup.source.kind != ModelSource::Kind::kPreset) return "";
  const fs::path pickle = fs::path(expand_globs(pattern).front()).parent_path() / "meta.pkl";
  if (!fs::exists(pickle)) return "";
  return pickle.string() + " is not opened, as no pickle is: a vocabulary of " + std::to_string(model) +
         " is assumed; --vocab-size N gives the one that it holds (nanoGPT's vocab_size)";
}
