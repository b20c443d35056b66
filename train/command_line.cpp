// command_line.cpp: see command_line.h. CLI11 finds the flags and lays out --help; what their values mean, and the file
// of --config, is ours.
#include "train/command_line.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <functional>
#include <map>
#include <numeric>
#include <set>
#include <sstream>
#include <type_traits>
#include <utility>

#include "train/config_file.h"
#include "train/option_json.h"
#include "train/version.h"

namespace {

// A default in --help; nothing for one that is chosen later.
std::string shown(const nlohmann::ordered_json& value) {
  if (value == -1) return "";
  if (!value.is_number_float()) return value.is_string() ? value.get<std::string>() : value.dump();
  char text[32];
  snprintf(text, sizeof text, "%g", value.get<double>());
  return text;
}

// What stands for a value in --help.
std::string type_of(const std::string& unit, bool whole, const Range&) {
  return !unit.empty() ? unit : whole ? "INT" : "NUMBER";
}
template <typename T, size_t N>
std::string type_of(const std::string&, bool, const std::pair<T, const char*> (&names)[N]) {
  std::string all;
  for (const auto& [value, name] : names) all += (all.empty() ? "" : "|") + std::string(name);
  return all;
}
template <typename Values>
std::string type_of(const std::string& unit, bool, const Values&) {
  return unit;
}

constexpr size_t kNameColumn = 44, kTextColumn = 72;  // of --help

// With the line ends that --help shows.
std::string wrapped(const std::string& text) {
  std::string out;
  size_t line = 0;
  std::istringstream words(text);
  for (std::string word; words >> word; line += word.size() + 1) {
    const bool full = line + word.size() > kTextColumn;
    if (!out.empty()) out += full ? '\n' : ' ';
    if (full) line = 0;
    out += word;
  }
  return out;
}

// What --help of a subcommand shows; the others are accepted, so that a file of --config serves all.
const std::set<std::string>& flags_of(Command command) {
  static const std::set<std::string> generate = {
      "model",   "prompt", "sample-tokens", "temperature",      "top-k",  "top-p",   "tokenizer", "seed",
      "seq-len", "dtype",  "weight-dtype",  "activation-dtype", "device", "threads", "tf32"};
  static const std::set<std::string> eval = {
      "model",   "data",  "val-data",     "data-format",      "eval-batches", "hellaswag", "tokenizer", "micro-batch",
      "seq-len", "dtype", "weight-dtype", "activation-dtype", "head-chunk",   "device",    "threads",   "tf32"};
  static const std::set<std::string> selftest = {"model",        "micro-batch",      "seq-len",        "dtype",
                                                 "weight-dtype", "activation-dtype", "gradient-dtype", "rank",
                                                 "device",       "threads",          "tf32",           "no-autotune"};
  return command == Command::kGenerate ? generate : command == Command::kEval ? eval : selftest;
}

const std::set<std::string>& not_of_plan() {
  static const std::set<std::string> flags = {
      "val-data",         "tokenizer",  "hellaswag",      "plan",    "out",         "resume", "checkpoint-every",
      "keep-checkpoints", "eval-every", "eval-batches",   "prompt",  "temperature", "top-k",  "top-p",
      "sample-tokens",    "log-every",  "skip-nonfinite", "profile", "peak-tflops"};
  return flags;
}

// Changes of one character that make one word of the other.
size_t distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t changed = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({changed, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

// ", did you mean --rank?", or nothing where no name is near.
std::string suggestion(std::string word, const std::vector<std::string>& names, const std::string& dashes) {
  constexpr size_t kLongest = 100;
  if (word.empty() || word.size() > kLongest) return "";
  std::replace(word.begin(), word.end(), '_', '-');
  std::string nearest;
  size_t least = std::min(std::max<size_t>(2, word.size() / 3) + 1, word.size());  // a letter must stay
  for (const std::string& name : names) {
    const size_t changes = distance(word, name);
    if (changes < least) least = changes, nearest = name;
  }
  return nearest.empty() ? "" : ", did you mean " + dashes + nearest + "?";
}

[[noreturn]] void refuse(const std::string& flag, const std::string& why) { throw UsageError("--" + flag + " " + why); }

struct ToCommandLine {
  CLI::App& app;
  std::map<std::string, std::function<void(const std::string&)>> setters;  // by flag, from the text of a value
  std::map<std::string, std::string> switches;                             // by flag: "true", or the text given
  std::string current_group;
  void group(const char* name) { current_group = name; }

  template <typename T, typename Values>
  void operator()(T& field, const char* flag, const char* unit, const char* help, const Values& values, OnResume) {
    const std::string name = flag;
    const std::function<void(const std::string&)> set = [&field, name, values](const std::string& text) {
      read(field, name, text, values);
    };
    setters[name] = set;
    std::string text = help;
    const bool chosen_later = text.find("default:") != std::string::npos;
    CLI::Option* option;
    if constexpr (std::is_same_v<Values, Switch>) {
      option = app.add_flag("--" + name, switches[name], wrapped(chosen_later ? text : text + " [off]"));
    } else {
      const std::string value = shown(written(field, values));
      if (!chosen_later && !value.empty()) text += " [" + value + "]";
      option = app.add_option_function<std::string>("--" + name, set, wrapped(text));
      option->type_name(type_of(unit, std::is_integral_v<T>, values));
    }
    option->group(current_group)->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  }
};

class Parser {
 public:
  explicit Parser(Options& options) : options_(options), visitor_{app_, {}, {}, ""} {
    app_.name("train_gpt2");
    app_.option_defaults()->always_capture_default(false);
    app_.get_help_ptr()->group("options");
    app_.add_option("--config", config_, "read flags from a TOML file: one 'name = value' per line")
        ->type_name("FILE")
        ->group("options");
    app_.set_version_flag("--version", kVersion)->group("options");
    add(Command::kPlan, "plan",
        "print the memory plan, and what each technique saves; with --memory-budget and no --model: the largest models "
        "that fit (no device needed)");
    add(Command::kGenerate, "generate", "continue --prompt with the --model given");
    add(Command::kEval, "eval",
        "loss and bits per byte of the --model given on --val-data, or its accuracy on --hellaswag");
    add(Command::kSelftest, "selftest",
        "compare every operation of the device with its formula, at odd shapes and those of the --model given; exit "
        "code 1 when one is wrong");
    app_.require_subcommand(0, 1);
    describe(options_, visitor_);
    for (const auto& [name, set] : visitor_.setters) names_.push_back(name);
  }

  Command parse(int argc, char** argv) {
    refuse_flags_as_values(argc, argv);
    try {
      app_.parse(argc, argv);
    } catch (const CLI::CallForHelp&) {
      print_help(command());
      return Command::kExit;
    } catch (const CLI::CallForVersion&) {
      std::puts(kVersion);
      return Command::kExit;
    } catch (const CLI::ExtrasError&) {
      throw UsageError(surplus());
    } catch (const CLI::ArgumentMismatch& error) {
      const std::string what = error.what();
      const std::string flag = what.substr(0, what.find(": "));
      throw UsageError(flag + " needs a value (./train_gpt2 --help lists the flags)");
    } catch (const CLI::ParseError& error) {
      throw UsageError(std::string(error.what()) + " (./train_gpt2 --help lists the flags)");
    }
    for (const std::string& name : names_) {
      if (app_.get_option("--" + name)->count() == 0) continue;
      options_.given.push_back(name);
      const auto found = visitor_.switches.find(name);
      if (found != visitor_.switches.end()) visitor_.setters.at(name)(found->second);
    }
    if (app_.get_option("--config")->count() > 0) take_config_file();
    const Command found = command();
    if (found == Command::kPlan) options_.plan = true;
    return options_.plan && found == Command::kTrain ? Command::kPlan : found;
  }

 private:
  void add(Command command, const char* name, const std::string& help) {
    CLI::App* subcommand = app_.add_subcommand(name, wrapped(help));
    subcommand->fallthrough();
    subcommands_[command] = subcommand;
  }

  Command command() const {
    for (const auto& [command, subcommand] : subcommands_) {
      if (subcommand->parsed()) return command;
    }
    return Command::kTrain;
  }

  // CLI11 would take the next flag for the value of one that lacks it.
  void refuse_flags_as_values(int argc, char** argv) const {
    for (int i = 1; i + 1 < argc; ++i) {
      const std::string word = argv[i], next = argv[i + 1];
      const CLI::Option* const option = word.starts_with("--") ? app_.get_option_no_throw(word) : nullptr;
      if (option && option->get_items_expected_min() > 0 && next.starts_with("--")) {
        throw UsageError(word + " needs a value, not " + next + " (what begins with -- is given as " + word + "=" +
                         next + ")");
      }
    }
  }

  // What is neither a flag nor a subcommand.
  std::string surplus() {
    const std::string help = " (./train_gpt2 --help lists the flags)";
    for (const std::string& word : app_.remaining(true)) {
      if (word == "--") continue;
      if (!word.starts_with("-")) {
        std::vector<std::string> names;
        for (const auto& [command, subcommand] : subcommands_) names.push_back(subcommand->get_name());
        if (std::count(names.begin(), names.end(), word) > 0) return "'" + word + "' is one subcommand too many" + help;
        return "'" + word + "' is no flag and no subcommand" + suggestion(word, names, "") + help;
      }
      const std::string flag = word.substr(0, word.find('='));
      const size_t dashes = std::min(flag.find_first_not_of('-'), flag.size());
      return "there is no flag " + flag + suggestion(flag.substr(dashes), names_, "--") + help;
    }
    return "a word too many" + help;
  }

  // What is on the command line as well is taken from there.
  void take_config_file() {
    if (config_.empty()) refuse("config", "needs a value");
    for (const ConfigLine& line : read_config_file(config_)) {
      const auto set = visitor_.setters.find(line.name);
      if (set == visitor_.setters.end()) {
        throw UsageError(line.where + ": there is no flag '" + line.name + "'" + suggestion(line.name, names_, ""));
      }
      if (options_.was_given(line.name)) continue;
      try {
        set->second(line.value);
      } catch (const UsageError& error) {
        throw UsageError(line.where + ": " + error.what());
      }
      options_.given.push_back(line.name);
    }
  }

  // CLI11's own lays the same out differently from version to version.
  void print_help(Command command) {
    std::string text =
        "Pretrains GPT-2 on one device or several: compressed momentum (Flora), updates fused into the backward pass\n"
        "(LOMO), and recomputed activations. Without arguments it trains a small model on text found on this machine.\n"
        "Usage: train_gpt2 [OPTIONS] [SUBCOMMAND]\n";
    if (command != Command::kTrain) {
      const CLI::App& subcommand = *subcommands_.at(command);
      text = subcommand.get_description() + "\nUsage: train_gpt2 " + subcommand.get_name() + " [OPTIONS]\n";
      for (const std::string& name : names_) {
        const bool shown = command == Command::kPlan ? !not_of_plan().contains(name) : flags_of(command).contains(name);
        if (!shown) app_.get_option("--" + name)->group("");  // hidden
      }
    }
    for (const std::string& group : app_.get_groups()) {
      if (group.empty()) continue;
      text += "\n" + group + ":\n";
      for (const CLI::Option* option : app_.get_options([&](auto* each) { return each->get_group() == group; })) {
        const bool takes_value = option->get_type_size() != 0;
        text += row(option->get_name(false, true) + (takes_value ? " " + option->get_type_name() : ""),
                    option->get_description());
      }
    }
    if (command == Command::kTrain) {
      text += "\nsubcommands:\n";
      for (const auto& [_, each] : subcommands_) text += row(each->get_name(), each->get_description());
    }
    std::fputs(text.c_str(), stdout);
    std::fputs(
        "\nCtrl-C, SIGTERM, SIGHUP and SIGUSR1 end a training run after the step in progress, with a checkpoint;\n"
        "Ctrl-C or SIGTERM again ends it at once. Exit codes: 0 done, 1 failure, 2 wrong usage, 128 + signal when a\n"
        "signal came.\n",
        stdout);
  }

  // A line of the help, the description's lines below each other.
  static std::string row(const std::string& name, const std::string& description) {
    std::string text = "  " + name;
    text +=
        text.size() < kNameColumn ? std::string(kNameColumn - text.size(), ' ') : "\n" + std::string(kNameColumn, ' ');
    for (const char c : description) text += c == '\n' ? "\n" + std::string(kNameColumn, ' ') : std::string(1, c);
    return text + "\n";
  }

  Options& options_;
  CLI::App app_;
  ToCommandLine visitor_;
  std::string config_;
  std::map<Command, CLI::App*> subcommands_;
  std::vector<std::string> names_;  // of all flags, without the dashes
};

}  // namespace

Command parse_command_line(int argc, char** argv, Options& options) { return Parser(options).parse(argc, argv); }
