// run_tokenizer.cpp: which tokenizer belongs to a run, and the files that a checkpoint takes along so that others find
// it, too: tokenizer.bin, Hugging Face's, and generation_config.json.
#include <filesystem>

#include "data/hugging_face_tokenizer.h"
#include "data/token_loader.h"
#include "train/file_io.h"
#include "train/run_setup.h"

namespace fs = std::filesystem;

namespace {

constexpr int64_t kByteVocabulary = 257;

// The folder of the shards that are trained on, or else evaluated, where there are any.
fs::path data_folder(const Options& options) {
  const std::vector<std::string> globs = split_globs(options.data.empty() ? options.val_data : options.data);
  const std::vector<std::string> shards = globs.empty() ? globs : matching_files(globs.front());
  return shards.empty() ? fs::path("/nowhere") : fs::absolute(shards.front()).parent_path();
}

// The folder or file to read a tokenizer from, empty when there is none.
fs::path find_place(const RunSetup& setup) {
  const Options& o = setup.options;
  // A resumed run has its tokenizer in its checkpoint; the file it came from may be gone.
  const std::string& checkpoint = setup.request.checkpoint;
  if (!checkpoint.empty() && !o.was_given("tokenizer")) {
    if (fs::exists(checkpoint + "/tokenizer.bin")) return checkpoint + "/tokenizer.bin";
    if (has_hugging_face_tokenizer(checkpoint)) return checkpoint;
  }
  if (!o.tokenizer.empty()) return o.tokenizer;
  if (setup.engine.model.vocabulary == kByteVocabulary) return {};
  const bool folder = setup.source.kind == ModelSource::Kind::kDirectory;
  const bool file = setup.source.kind == ModelSource::Kind::kLlmcBin;
  const fs::path model = folder ? fs::path(o.model) : file ? fs::absolute(o.model).parent_path() : "/nowhere";
  for (const fs::path& candidate : {data_folder(o) / "tokenizer.bin", model / "tokenizer.bin",
                                    model / (file ? "gpt2_tokenizer.bin" : "tokenizer.bin")}) {
    if (fs::exists(candidate)) return candidate;
  }
  return folder && has_hugging_face_tokenizer(model) ? model : fs::path();
}

void read_tokenizer(RunSetup& setup, const fs::path& place) {
  const int64_t vocabulary = setup.engine.model.vocabulary;
  const bool folder = fs::is_directory(place);
  const std::string extension = place.extension();
  if (folder || extension == ".json" || extension == ".txt") {
    if (!folder) InputFile{place};  // is one of the tokenizer's files
    const fs::path directory = folder ? place : fs::absolute(place).parent_path();
    for (const char* name : kHuggingFaceTokenizerFiles) {
      if (fs::exists(directory / name)) setup.checkpoint_files[name] = read_file(directory / name);
    }
    setup.tokenizer = std::make_shared<Tokenizer>(read_hugging_face_tokenizer(directory, vocabulary));
  } else {
    setup.tokenizer = std::make_shared<Tokenizer>(Tokenizer::from_file(place));
    setup.checkpoint_files = hugging_face_tokenizer_files(*setup.tokenizer, setup.engine.model.positions);
    setup.checkpoint_files["tokenizer.bin"] = read_file(place);
  }
  if (setup.tokenizer->vocabulary() > vocabulary) {
    throw UsageError(place.string() + ": has " + std::to_string(setup.tokenizer->vocabulary()) +
                     " tokens, the model only " + std::to_string(vocabulary));
  }
}

}  // namespace

void find_tokenizer(RunSetup& setup) {
  Gpt2Config& model = setup.engine.model;
  const fs::path place = find_place(setup);
  if (!place.empty() && fs::is_directory(place) && !setup.options.was_given("tokenizer")) {
    try {
      read_tokenizer(setup, place);
    } catch (const std::runtime_error& error) {  // of another kind: others can read it, and only prompts need it here
      setup.tokenizer = nullptr;
      setup.tokenizer_warning = std::string("no tokenizer: ") + error.what();
    }
  } else if (!place.empty()) {
    read_tokenizer(setup, place);
  } else if (model.vocabulary == kByteVocabulary) {
    setup.tokenizer = std::make_shared<Tokenizer>(Tokenizer::bytes());
    setup.checkpoint_files = hugging_face_tokenizer_files(*setup.tokenizer, model.positions);
  }
  if (model.end_of_text.empty() && setup.tokenizer) model.end_of_text = {setup.tokenizer->end_of_text()};
  const fs::path generation = fs::path(setup.source.path) / "generation_config.json";
  const bool theirs = setup.source.kind == ModelSource::Kind::kDirectory && fs::exists(generation);
  setup.checkpoint_files["generation_config.json"] = theirs ? read_file(generation) : generation_config_json(model);
}

void check_prompt(const RunSetup& setup) {
  if (setup.tokenizer || setup.options.prompt.empty()) return;
  throw UsageError("--prompt needs a tokenizer: --tokenizer FILE (tokenizer.bin, made by data/prepare.py)" +
                   (setup.tokenizer_warning.empty() ? "" : "; " + setup.tokenizer_warning));
}
