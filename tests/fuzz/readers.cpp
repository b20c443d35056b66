// readers.cpp: everything that reads what a user or another program wrote, for libFuzzer. The environment variable
// READER chooses which; corpus/<reader>/ has seeds. A reader takes any bytes or throws std::runtime_error with one
// line; whatever else happens is a finding: another exception, a memory error, undefined behaviour, a message of a
// library.
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "data/hugging_face_tokenizer.h"
#include "data/input_file.h"
#include "data/json_text.h"
#include "data/multiple_choice.h"
#include "data/shard.h"
#include "data/tokenizer.h"
#include "model/config.h"
#include "tests/temporary_directory.h"
#include "train/command_line.h"
#include "train/llmc_model.h"
#include "train/memory_size.h"
#include "train/metrics.h"
#include "train/options.h"
#include "train/safetensors.h"
#include "train/trainer_state.h"

namespace {

// The path of a file in memory with these bytes; the same file each time.
std::string file_with(const std::string& bytes) {
  static const int descriptor = memfd_create("input", MFD_CLOEXEC);
  const bool written = ftruncate(descriptor, 0) == 0 &&
                       pwrite(descriptor, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size());
  if (!written) std::abort();
  return "/proc/self/fd/" + std::to_string(descriptor);
}

Options parsed(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "train_gpt2");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  Options options;
  parse_command_line(static_cast<int>(argv.size()), argv.data(), options);
  return options;
}

// One argument per line.
void command_line(const std::string& input) {
  std::vector<std::string> arguments(1);
  for (const char c : input) {
    if (c == '\n') {
      arguments.emplace_back();
    } else if (c != '\0') {  // the end of an argument
      arguments.back() += c;
    }
  }
  check_options(parsed(arguments));
}

void config_file(const std::string& input) { check_options(parsed({"--config", file_with(input)})); }

void config(const std::string& input) { gpt2_parameters(read_config(file_with(input))); }

void safetensors(const std::string& input) {
  const SafetensorsReader reader(file_with(input));
  unsigned sum = 0;
  for (const auto& [name, entry] : reader.entries()) {
    for (size_t i = 0; i < entry.bytes(); ++i) sum += static_cast<const unsigned char*>(entry.data)[i];
  }
  volatile unsigned read_all = sum;
  (void)read_all;
}

void llmc(const std::string& input) {
  const std::string path = file_with(input);
  load_llmc(path, gpt2_parameters(llmc_config(path)), [](const Parameter&, const std::vector<float>&) {});
}

void tokenizer(const std::string& input) {
  const Tokenizer tokenizer = Tokenizer::from_file(file_with(input));
  tokenizer.decode(tokenizer.encode("It was the best of times, it was the worst of times.\n"));
}

void shard(const std::string& input) {
  for (const DataFormat format : {DataFormat::kLlmc, DataFormat::kNanogpt}) {
    const Shard shard(file_with(input), format);
    std::vector<int32_t> tokens(static_cast<size_t>(shard.tokens()));
    shard.read(tokens, 0);
  }
}

void multiple_choice(const std::string& input) {
  const MultipleChoice choice = read_multiple_choice(file_with(input));
  for (const Question& question : choice.questions) {
    const bool whole = !question.context.empty() && question.endings.size() >= 2 &&
                       question.right < static_cast<int64_t>(question.endings.size());
    if (!whole) std::abort();
  }
}

// The options that trainer_state.json keeps.
void saved_options(const std::string& input) {
  Options options;
  restore_options(options, parse_json(input, "trainer_state.json"));
  check_options(options);
}

void metrics(const std::string& input) {
  static const TemporaryDirectory directory;
  directory.write("metrics.jsonl", input);
  MetricsFile(directory.path(), {}, 5, directory.path());
}

// A checkpoint's own file: one of the first format needs no checksum to be read.
void trainer_state(const std::string& input) {
  static const TemporaryDirectory directory;
  directory.write(kStateFile, input);
  const TrainerState state = read_trainer_state(directory.path());
  Options options;
  restore_options(options, state.options);
}

void hugging_face_tokenizer(const std::string& input) {
  static const TemporaryDirectory directory;
  directory.write("tokenizer.json", input);
  const Tokenizer tokenizer = read_hugging_face_tokenizer(directory.path(), 1000);
  tokenizer.decode(tokenizer.encode("It was the best of times, it was the worst of times.\n"));
  hugging_face_tokenizer_files(tokenizer, 64);
}

void generation_config(const std::string& input) {
  Gpt2Config config;
  read_generation_config(file_with(input), config);
  generation_config_json(config);
}

void memory_size(const std::string& input) { parse_memory_size("memory-budget", input); }

void text(const std::string& input) {
  printable(whole_characters(input));
  const Tokenizer bytes = Tokenizer::bytes();
  if (bytes.decode(bytes.encode(input)) != input) std::abort();
}

using Reader = void (*)(const std::string&);

Reader chosen_reader() {
  const std::map<std::string, Reader> readers = {{"command_line", command_line},
                                                 {"config_file", config_file},
                                                 {"config", config},
                                                 {"safetensors", safetensors},
                                                 {"llmc", llmc},
                                                 {"tokenizer", tokenizer},
                                                 {"shard", shard},
                                                 {"multiple_choice", multiple_choice},
                                                 {"saved_options", saved_options},
                                                 {"metrics", metrics},
                                                 {"trainer_state", trainer_state},
                                                 {"hugging_face_tokenizer", hugging_face_tokenizer},
                                                 {"generation_config", generation_config},
                                                 {"memory_size", memory_size},
                                                 {"text", text}};
  const char* const name = std::getenv("READER");
  const auto reader = readers.find(name ? name : "");
  if (reader != readers.end()) return reader->second;
  std::fputs("READER must be one of", stderr);
  for (const auto& [known, unused] : readers) std::fprintf(stderr, " %s", known.c_str());
  std::fputs("\n", stderr);
  std::exit(2);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Reader reader = chosen_reader();
  try {
    reader(std::string(reinterpret_cast<const char*>(data), size));
  } catch (const std::runtime_error&) {
    // Refused, as it should be; UsageError is one, too.
  }
  return 0;
}
