// test_options.cpp: options survive the way through JSON, a checkpoint's options come back unless they were given anew,
// and contradictions are found.
#include "train/options.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>

#include "tests/temporary_directory.h"
#include "train/command_line.h"

namespace {

#define EXPECT_HAS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

struct Parsed {
  Options options;
  Command command;
};

Parsed parse(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "train_gpt2");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  Parsed parsed;
  parsed.command = parse_command_line(static_cast<int>(argv.size()), argv.data(), parsed.options);
  return parsed;
}

// Gives every option a value that is not its default.
struct SetAll {
  int count = 0;
  std::set<std::string> flags;
  void group(const char*) {}
  template <typename T>
  void operator()(T& field, const char* flag, const char*, const char* help, const std::vector<std::string>& choices,
                  OnResume) {
    EXPECT_TRUE(flags.insert(flag).second) << flag << " is there twice";
    EXPECT_GT(std::string(help).size(), 4u) << flag;
    ++count;
    if constexpr (std::is_same_v<T, bool>) {
      field = !field;
    } else if constexpr (std::is_same_v<T, std::string>) {
      field = choices.empty() ? "a value" : choices.back();
    } else {
      field = static_cast<T>(field + static_cast<T>(3));
    }
  }
};

TEST(Options, JsonRoundTrip) {
  Options options;
  SetAll visitor;
  describe(options, visitor);
  const nlohmann::ordered_json json = options_to_json(options);
  EXPECT_EQ(static_cast<int>(json.size()), visitor.count);
  EXPECT_EQ(json["tokens_per_step"], 3);
  EXPECT_EQ(json["optimizer"], "sgd");
  Options restored;
  restore_options(restored, nlohmann::json::parse(json.dump()));
  nlohmann::ordered_json again = options_to_json(restored);
  // What is asked for now is not what was asked for then.
  for (const char* key : {"plan", "json", "profile", "resume", "memory_budget"}) {
    EXPECT_EQ(again[key], options_to_json(Options())[key]) << key;
    again[key] = json[key];
  }
  EXPECT_EQ(again, json);
}

TEST(Options, NumbersComeBackExactly) {
  Options options;
  options.lr = 0.1 + 0.2;
  options.eps1 = 1e-30;
  options.seed = (int64_t{1} << 62) + 1;
  Options restored;
  restore_options(restored, nlohmann::json::parse(options_to_json(options).dump()));
  EXPECT_EQ(restored.lr, options.lr);
  EXPECT_EQ(restored.eps1, options.eps1);
  EXPECT_EQ(restored.seed, options.seed);
}

TEST(Options, WhatWasGivenIsKeptOrContradicts) {
  Options saved;
  saved.rank = 64, saved.steps = 100, saved.recompute = "block", saved.lr = 1e-3;
  const nlohmann::json json = options_to_json(saved);

  Options now = parse({"--steps", "200", "--recompute", "gelu", "--rank", "64"}).options;
  restore_options(now, json);
  EXPECT_EQ(now.steps, 200);
  EXPECT_EQ(now.recompute, "gelu");
  EXPECT_EQ(now.rank, 64);
  EXPECT_EQ(now.lr, 1e-3);

  now = parse({"--rank", "32"}).options;
  const std::string message = message_of([&] { restore_options(now, json); });
  for (const char* part : {"--rank", "32", "64", "cannot change on resume"}) EXPECT_HAS(message, part);
  EXPECT_THROW(restore_options(now, json), UsageError);

  now = parse({"--rank", "256"}).options;  // the default, but said
  EXPECT_THROW(restore_options(now, json), UsageError);
}

TEST(Options, ASavedOptionOfTheWrongTypeIsDamage) {
  nlohmann::json json = options_to_json(Options());
  json["kappa"] = "often";
  Options now;
  EXPECT_HAS(message_of([&] { restore_options(now, json); }), "kappa");
}

TEST(Options, WhatIsNotSavedIsSaid) {
  nlohmann::json json = options_to_json(Options());
  json.erase("kappa");
  json.erase("checkpoint_every");
  Options now = parse({"--checkpoint-every", "7"}).options;
  EXPECT_EQ(restore_options(now, json).missing, std::vector<std::string>{"kappa"});
  EXPECT_EQ(now.kappa, 1000);
  EXPECT_EQ(now.checkpoint_every, 7);
  json["kappb"] = 5;  // a key with a flipped bit, or of a newer version
  EXPECT_HAS(message_of([&] { restore_options(now, json); }), "kappb");
}

TEST(Options, CommandsAndGivenFlags) {
  EXPECT_EQ(parse({}).command, Command::kTrain);
  EXPECT_EQ(parse({"--plan"}).command, Command::kPlan);
  EXPECT_EQ(parse({"plan", "--rank", "8"}).command, Command::kPlan);
  EXPECT_TRUE(parse({"plan"}).options.plan);
  EXPECT_EQ(parse({"--rank", "8", "eval"}).command, Command::kEval);
  EXPECT_EQ(parse({"generate", "--prompt", "To be"}).options.prompt, "To be");
  const Options options = parse({"plan", "--rank", "8", "--no-factored"}).options;
  EXPECT_TRUE(options.was_given("rank"));
  EXPECT_TRUE(options.was_given("no-factored"));
  EXPECT_FALSE(options.was_given("kappa"));
  EXPECT_EQ(options.rank, 8);
}

TEST(Options, CommandLineMistakesAreUsageErrors) {
  const std::vector<std::vector<std::string>> mistakes = {
      {"--ranks", "8"}, {"--rank"},       {"--rank", "eight"},      {"--rank", "8.5"},
      {"train"},        {"eval", "plan"}, {"--optimizer", "Flora"}, {"--lr", "1e-3x"}};
  for (const auto& mistake : mistakes) EXPECT_THROW(parse(mistake), UsageError) << mistake[0];
}

TEST(Options, DefaultsAreLegal) { EXPECT_NO_THROW(check_options(parse({}).options)); }

TEST(Options, ContradictionsAreFound) {
  const auto error_of = [](std::vector<std::string> arguments) {
    return message_of([&] { check_options(parse(arguments).options); });
  };
  for (const char* flag : {"seq-len", "micro-batch", "tokens-per-step", "head-chunk", "rank", "kappa",
                           "accumulation-rank", "steps", "vocab-size", "sample-tokens", "log-every"}) {
    EXPECT_HAS(error_of({std::string("--") + flag, "0"}), std::string("--") + flag);
  }
  for (const char* flag :
       {"checkpoint-every", "keep-checkpoints", "eval-every", "eval-batches", "sample-every", "threads", "top-k",
        "warmup-steps", "weight-decay", "clip-norm", "temperature", "final-lr", "seed", "beta1"}) {
    EXPECT_EQ(error_of({std::string("--") + flag, "0"}), "") << flag;
    EXPECT_HAS(error_of({std::string("--") + flag, "-1"}), std::string("--") + flag);
  }
  for (const char* flag : {"lr", "weight-decay", "temperature", "update-clip", "clip-norm", "beta1", "final-lr"}) {
    EXPECT_HAS(error_of({std::string("--") + flag, "nan"}), std::string("--") + flag);
  }
  for (const char* flag : {"seq-len", "micro-batch", "steps", "rank", "threads", "head-chunk"}) {
    EXPECT_HAS(error_of({std::string("--") + flag, "9999999999"}), "at most");
    EXPECT_HAS(error_of({std::string("--") + flag, "99999999999999999999999"}), std::string("--") + flag);
  }
  EXPECT_EQ(error_of({"--seed", "9999999999"}), "");
  EXPECT_HAS(error_of({"--decay-rate", "0.8"}), "--decay-rate");
  EXPECT_HAS(error_of({"--optimizer", "adamw", "--rank", "8"}), "--optimizer adamw");
  EXPECT_HAS(error_of({"--optimizer", "adamw", "--kappa", "8", "--gradients", "compressed"}), "--kappa");
  EXPECT_EQ(error_of({"--optimizer", "adamw", "--gradients", "compressed", "--rank", "8"}), "");
  EXPECT_EQ(error_of({"--optimizer", "adamw", "--beta2", "0.9"}), "");
  EXPECT_EQ(error_of({"--optimizer", "adafactor", "--relative-step", "--warmup-init"}), "");
  EXPECT_EQ(error_of({"--schedule", "wsd", "--cooldown-steps", "5"}), "");
}

}  // namespace
