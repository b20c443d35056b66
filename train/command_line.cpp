// command_line.cpp: see command_line.h.
#include "train/command_line.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <sstream>
#include <type_traits>

#include "train/version.h"

namespace {

std::string shown(const std::string& value) { return value; }
std::string shown(int64_t value) { return value == -1 ? "" : std::to_string(value); }
std::string shown(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g", value);
  return value == -1 ? "" : text;
}

constexpr size_t kNameColumn = 44, kTextColumn = 72;  // of --help

// CLI11 indents the lines of a description but does not break them.
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

struct ToCommandLine {
  CLI::App& app;
  std::string current_group;
  void group(const char* name) { current_group = name; }

  template <typename T>
  void operator()(T& field, const char* flag, const char* unit, const char* help,
                  const std::vector<std::string>& choices, OnResume) {
    const std::string name = std::string("--") + flag;
    CLI::Option* option;
    if constexpr (std::is_same_v<T, bool>) {
      option = app.add_flag(name, field, wrapped(std::string(help) + " [off]"));
    } else {
      std::string text = help;
      const bool chosen_later = text.find("default:") != std::string::npos;
      const std::string value = shown(field);
      if (!chosen_later && !value.empty()) text += " [" + value + "]";
      option = app.add_option(name, field, wrapped(text));
      std::string type = unit;
      if (!choices.empty()) {
        type = CLI::detail::join(choices, "|");
        option->check(CLI::IsMember(choices).description(""));
      } else if (type.empty()) {
        type = std::is_same_v<T, int64_t> ? "INT" : "NUMBER";
      }
      option->type_name(type);
    }
    option->group(current_group)->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  }
};

}  // namespace

Command parse_command_line(int argc, char** argv, Options& options) {
  CLI::App app{
      "Pretrains GPT-2 on one device: compressed momentum (Flora), updates fused into the backward pass (LOMO),\n"
      "and recomputed activations. Without arguments it trains a small model on text found on this machine."};
  app.name("train_gpt2");
  app.option_defaults()->always_capture_default(false);
  app.get_formatter()->column_width(kNameColumn);
  app.set_config("--config", "", "read flags from a TOML file: one 'name = value' per line")->type_name("FILE");
  app.allow_config_extras(CLI::config_extras_mode::error);
  app.footer(
      "Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end a training run after the step in progress, with a checkpoint; Ctrl-C "
      "or\n"
      "SIGTERM again ends it at once. Exit codes: 0 done, 1 failure, 2 wrong usage, 128 + signal when a signal came.");
  app.set_version_flag("--version", kVersion);
  CLI::App* plan = app.add_subcommand(
      "plan", wrapped("print the memory plan, and what each technique saves; with --memory-budget and no --model: the "
                      "largest models that fit (no device needed)"));
  CLI::App* generate = app.add_subcommand("generate", "continue --prompt with the --model given");
  CLI::App* eval = app.add_subcommand("eval", "loss of the --model given on --val-data");
  app.require_subcommand(0, 1);
  for (CLI::App* subcommand : {plan, generate, eval}) subcommand->fallthrough();
  ToCommandLine visitor{app, ""};
  describe(options, visitor);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::fputs(app.help().c_str(), stdout);
    return Command::kExit;
  } catch (const CLI::CallForVersion&) {
    std::puts(kVersion);
    return Command::kExit;
  } catch (const CLI::ParseError& error) {
    throw UsageError(std::string(error.what()) + " (./train_gpt2 --help lists the flags)");
  }
  for (const CLI::Option* option : app.get_options()) {
    if (option->count() > 0 && !option->get_lnames().empty()) options.given.push_back(option->get_lnames().front());
  }
  if (plan->parsed()) {
    options.plan = true;
    return Command::kPlan;
  }
  if (generate->parsed()) return Command::kGenerate;
  if (eval->parsed()) return Command::kEval;
  return options.plan ? Command::kPlan : Command::kTrain;
}
