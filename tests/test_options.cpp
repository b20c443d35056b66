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
  template <typename T, typename Values>
  void operator()(T& field, const char* flag, const char*, const char* help, const Values& values, OnResume) {
    EXPECT_TRUE(flags.insert(flag).second) << flag << " is there twice";
    EXPECT_GT(std::string(help).size(), 4u) << flag;
    ++count;
    set(field, values);
  }
  static void set(bool& field, Switch) { field = !field; }
  static void set(std::string& field, Text) { field = "a value"; }
  static void set(Offload& field, OffloadList) { field = {.state = true, .weights = true}; }
  template <typename T>
  static void set(T& field, const Range& range) {
    const bool fraction = range.below == 1 || range.at_most == 1;
    field = static_cast<T>(range.below == 0 ? -0.5 : fraction ? 0.5 : static_cast<double>(field) + 3);
  }
  template <typename T, size_t N>
  static void set(T& field, const std::pair<T, const char*> (&names)[N]) {
    field = names[N - 1].first;
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
  for (const char* key : {"plan", "json", "profile", "resume", "memory_budget", "devices"}) {
    EXPECT_EQ(again[key], options_to_json(Options())[key]) << key;
    again[key] = json[key];
  }
  EXPECT_EQ(again, json);
}

TEST(Options, NumbersComeBackExactly) {
  Options options;
  options.schedule.peak = 0.1f + 0.2f;
  options.temperature = 0.1 + 0.2;
  options.engine.optimizer.eps1 = 1e-30f;
  options.seed = (int64_t{1} << 62) + 1;
  Options restored;
  restore_options(restored, nlohmann::json::parse(options_to_json(options).dump()));
  EXPECT_EQ(restored.schedule.peak, options.schedule.peak);
  EXPECT_EQ(restored.temperature, options.temperature);
  EXPECT_EQ(restored.engine.optimizer.eps1, options.engine.optimizer.eps1);
  EXPECT_EQ(restored.seed, options.seed);
}

TEST(Options, WhatWasGivenIsKeptOrContradicts) {
  Options saved;
  saved.engine.optimizer.rank = 64, saved.steps = 100, saved.schedule.peak = 1e-3f;
  saved.engine.shapes.recompute = Recompute::kBlock;
  const nlohmann::json json = options_to_json(saved);

  Options now = parse({"--steps", "200", "--recompute", "gelu", "--rank", "64"}).options;
  EXPECT_EQ(restore_options(now, json).changes, std::vector<std::string>{"steps was 100, is now 200"});
  EXPECT_EQ(now.steps, 200);
  EXPECT_EQ(now.engine.shapes.recompute, Recompute::kGelu);
  EXPECT_EQ(now.engine.optimizer.rank, 64);
  EXPECT_EQ(now.schedule.peak, 1e-3f);

  now = parse({"--rank", "32"}).options;
  const std::string message = message_of([&] { restore_options(now, json); });
  for (const char* part : {"--rank", "32", "64", "cannot change on resume"}) EXPECT_HAS(message, part);
  EXPECT_THROW(restore_options(now, json), UsageError);

  now = parse({"--rank", "256"}).options;  // the default, but said
  EXPECT_THROW(restore_options(now, json), UsageError);
}

TEST(Options, WhatChangesTheTrainingIsSaid) {
  Options saved;
  saved.schedule.peak = 1e-3f, saved.tokens_per_step = 1024;
  saved.engine.shapes.batch = 4, saved.engine.optimizer.weight_decay = 0.1f;
  const nlohmann::json json = options_to_json(saved);
  Options now = parse({"--lr", "5e-4", "--schedule", "linear", "--micro-batch", "2", "--tokens-per-step", "1024",
                       "--weight-decay", "0"})
                    .options;
  const std::vector<std::string> changes = restore_options(now, json).changes;
  EXPECT_EQ(changes, (std::vector<std::string>{"micro-batch was 4, is now 2", "lr was 0.001, is now 0.0005",
                                               "schedule was \"cosine\", is now \"linear\"",
                                               "weight-decay was 0.1, is now 0.0"}));
  EXPECT_EQ(now.schedule.peak, 5e-4f);
  EXPECT_EQ(now.schedule.kind, ScheduleKind::kLinear);
  EXPECT_EQ(now.engine.shapes.batch, 2);
  EXPECT_EQ(now.engine.optimizer.weight_decay, 0);
  for (const char* flag : {"--seq-len", "--seed", "--kappa", "--head-chunk"}) {
    Options other = parse({flag, "77"}).options;
    EXPECT_HAS(message_of([&] { restore_options(other, json); }), "cannot change on resume");
  }
}

TEST(Options, ASavedOptionOfTheWrongTypeIsDamage) {
  nlohmann::json json = options_to_json(Options());
  for (const nlohmann::json& wrong : {nlohmann::json("often"), nlohmann::json(300.7), nlohmann::json(true),
                                      nlohmann::json(uint64_t{1} << 63), nlohmann::json(nullptr)}) {
    json["kappa"] = wrong;
    Options now;
    EXPECT_HAS(message_of([&] { restore_options(now, json); }), "kappa") << wrong;
  }
  json = options_to_json(Options());
  for (const char* key : {"optimizer", "recompute"}) {
    json[key] = "";
    Options now;
    EXPECT_HAS(message_of([&] { restore_options(now, json); }), std::string(key) + "' is ''; the file is damaged");
    json.erase(key);
  }
}

TEST(Options, WhatIsNotSavedIsSaid) {
  nlohmann::json json = options_to_json(Options());
  json.erase("kappa");
  json.erase("checkpoint_every");
  Options now = parse({"--checkpoint-every", "7"}).options;
  EXPECT_EQ(restore_options(now, json).missing, std::vector<std::string>{"kappa"});
  EXPECT_EQ(now.engine.optimizer.kappa, OptimizerConfig().kappa);
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
  EXPECT_TRUE(parse({"--no-factored=false"}).options.engine.optimizer.factored);
  EXPECT_HAS(message_of([] { parse({"--tf32=maybe"}); }), "--tf32");
  EXPECT_EQ(options.engine.optimizer.rank, 8);
}

TEST(Options, CommandLineMistakesAreUsageErrors) {
  const std::vector<std::vector<std::string>> mistakes = {
      {"--ranks", "8"}, {"--rank"},       {"--rank", "eight"},      {"--rank", "8.5"},
      {"train"},        {"eval", "plan"}, {"--optimizer", "Flora"}, {"--lr", "1e-3x"}};
  for (const auto& mistake : mistakes) EXPECT_THROW(parse(mistake), UsageError) << mistake[0];
}

TEST(Options, AnUnknownWordSuggestsTheNearestOne) {
  const std::vector<std::pair<const char*, const char*>> words = {{"--ranks", "--rank?"},
                                                                  {"--tokens_per_step", "--tokens-per-step?"},
                                                                  {"--optimzer=sgd", "--optimizer?"},
                                                                  {"evl", "eval?"},
                                                                  {"genrate", "generate?"}};
  for (const auto& [word, nearest] : words) EXPECT_HAS(message_of([&] { parse({word}); }), nearest);
  for (const char* word : {"--frobnicate", "-x", "--x=3", "-5"}) {
    const std::string far = message_of([&] { parse({word}); });
    EXPECT_HAS(far, std::string(word).substr(0, std::string(word).find('=')));
    EXPECT_EQ(far.find("did you mean"), std::string::npos) << far;
  }
  EXPECT_HAS(message_of([] { parse({"eval", "plan"}); }), "one subcommand too many");
}

TEST(Options, AFlagIsNoValue) {
  EXPECT_HAS(message_of([] { parse({"--resume", "--steps", "5"}); }), "--resume needs a value, not --steps");
  EXPECT_HAS(message_of([] { parse({"--config", "--plan"}); }), "--config needs a value");
  EXPECT_EQ(parse({"--prompt=--steps", "--tf32", "--steps", "5"}).options.prompt, "--steps");
  EXPECT_EQ(message_of([] { parse({"--lr", "-1"}); }), "--lr must be above 0");
  EXPECT_HAS(message_of([] { parse({"--out", "r\xff"}); }), "not UTF-8");
  EXPECT_EQ(parse({"--out", "r\u00e9"}).options.out, "r\u00e9");
}

// Every flag that takes a text, but the prompt, names something.
struct EmptyStrings {
  void group(const char*) {}
  template <typename T, typename Values>
  void operator()(T&, const char* flag, const char*, const char*, const Values&, OnResume) {
    const std::string name = flag;
    if (std::is_same_v<T, bool> || name == "prompt") return;
    EXPECT_EQ(message_of([&] { parse({"--" + name, ""}); }), "--" + name + " needs a value");
    EXPECT_HAS(message_of([&] { parse({"--" + name + "="}); }), "--" + name + " needs a value");
    EXPECT_HAS(message_of([&] { parse({"--" + name}); }), "--" + name + " needs a value");
    EXPECT_THROW(parse({"--" + name, ""}), UsageError);
  }
};

TEST(Options, AnEmptyValueIsAMistake) {
  Options options;
  EmptyStrings visitor;
  describe(options, visitor);
  EXPECT_EQ(parse({"--prompt", ""}).options.prompt, "");
}

TEST(Options, NumbersAreTakenAsTheyAreOrRefused) {
  EXPECT_EQ(parse({"--seed", "9223372036854775807"}).options.seed, INT64_MAX);
  EXPECT_EQ(parse({"--lr", "1e-3"}).options.schedule.peak, 1e-3f);
  EXPECT_EQ(parse({"--rank", "3", "--rank", "5"}).options.engine.optimizer.rank, 5);  // the last one
  for (const char* text : {"9223372036854775808", "18446744073709551616", "-9223372036854775809"}) {
    EXPECT_HAS(message_of([&] { parse({"--seed", text}); }), "out of range");
  }
  for (const char* text : {"1e400", "-1e400", "1e-400"}) {
    EXPECT_HAS(message_of([&] { parse({"--lr", text}); }), "out of range");
  }
  for (const char* text : {"8.5", "1e3", "0x10", " 8", "8 ", "8,9", "eight"}) {
    EXPECT_HAS(message_of([&] { parse({"--rank", text}); }), std::string("whole number, not '") + text);
  }
}

TEST(Options, AConfigurationFileIsReadStrictly) {
  const TemporaryDirectory directory;
  const auto read = [&](const std::string& text, std::vector<std::string> arguments = {}) {
    arguments.insert(arguments.end(), {"--config", directory.write("run.toml", text)});
    return parse(arguments).options;
  };
  const Options o = read(
      "\xef\xbb\xbf# a run\r\n\n  rank = 8 # small\r\nlr=3e-3\ntokens-per-step = 1_024\nno-factored = true\n"
      "tf32 = false\noptimizer = adamw\nprompt = \"a \\\"b\\\" # \\\\ \\n[c]\"\nout = 'C:\\x'\nseed = 5",
      {"--seed", "6"});
  EXPECT_EQ(o.engine.optimizer.rank, 8);
  EXPECT_EQ(o.schedule.peak, 3e-3f);
  EXPECT_EQ(o.tokens_per_step, 1024);
  EXPECT_FALSE(o.engine.optimizer.factored);
  EXPECT_FALSE(o.tf32);
  EXPECT_EQ(o.engine.optimizer.kind, OptimizerKind::kAdamW);
  EXPECT_EQ(o.prompt, "a \"b\" # \\ \n[c]");
  EXPECT_EQ(o.out, "C:\\x");
  EXPECT_EQ(o.seed, 6);  // the command line goes first
  for (const char* flag : {"rank", "no-factored", "tf32", "seed"}) EXPECT_TRUE(o.was_given(flag)) << flag;
  EXPECT_FALSE(o.was_given("kappa"));

  const std::vector<std::pair<std::string, const char*>> mistakes = {
      {"rank = [a#b", "not a list"},
      {"data = [\"a.bin\", \"b.bin\"]", "not a list"},
      {"rank = [\n8]", "not a list"},
      {"[optimizer]\nrank = 8", "sections"},
      {"rank", "name = value"},
      {"= 8", "name = value"},
      {"rank =", "needs a value"},
      {"rank = # 8", "needs a value"},
      {"out = \"\"", "--out needs a value"},
      {"ranks = 8", "did you mean rank?"},
      {"config = \"other.toml\"", "no flag 'config'"},
      {"help = true", "no flag 'help'"},
      {"rank = 8\nlr = 1\nrank = 9", "line 1"},
      {"rank = 8 9", "more after the value"},
      {"prompt = \"a\" b", "more after the value"},
      {"prompt = \"a", "no closing"},
      {"prompt = \"a\\", "after a \\"},
      {"prompt = \"\\q\"", "after a \\"},
      {"data = x_[0-9].bin", "quotes"},
      {"rank = 8.5", "whole number"},
      {"rank = \"many\"", "many"},
      {"seed = 99999999999999999999", "out of range"},
      {"tf32 = 1", "true or false"},
      {"optimizer = lion", "none of"},
      {std::string("rank\0 = 8", 9), "no text"},
      {"rank = 8\x01", "no text"},
  };
  for (const auto& [text, part] : mistakes) {
    EXPECT_THROW(read(text), UsageError) << text;
    const std::string message = message_of([&] { read(text); });
    EXPECT_HAS(message, part);
    EXPECT_HAS(message, directory / "run.toml:");
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
  for (const std::string& path : {directory.path(), std::string("/dev/zero"), directory / "absent"}) {
    EXPECT_THROW(parse({"--config", path}), UsageError) << path;
  }
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
    EXPECT_HAS(error_of({std::string("--") + flag, "2147483648"}), "at most");
    EXPECT_HAS(error_of({std::string("--") + flag, "99999999999999999999999"}), std::string("--") + flag);
  }
  EXPECT_EQ(error_of({"--seed", "9999999999"}), "");
  for (const char* value : {"1", "0.9", "1e-6"}) EXPECT_EQ(error_of({"--top-p", value}), "") << value;
  for (const char* value : {"0", "-0.5", "1.5", "90"}) {
    EXPECT_HAS(error_of({"--top-p", value}), "--top-p must be above 0 and at most 1");
  }
  for (const char* flag : {"lr", "weight-decay", "eps", "beta2", "temperature", "final-lr", "clip-norm"}) {
    EXPECT_HAS(error_of({std::string("--") + flag, "1e-46"}), std::string("--") + flag);
    EXPECT_HAS(error_of({std::string("--") + flag, "1e-40"}), "less than fp32 holds");
    EXPECT_HAS(error_of({std::string("--") + flag, "1e39"}), "more than fp32 holds");
    EXPECT_HAS(error_of({std::string("--") + flag, "0.99999999"}), "would be 1");
  }
  EXPECT_HAS(error_of({"--beta1", "0.99999999"}), "would be 1");
  EXPECT_EQ(error_of({"--beta1", "0.9999999"}), "");
  EXPECT_HAS(error_of({"--decay-rate", "0.8"}), "--decay-rate");
  EXPECT_HAS(error_of({"--optimizer", "adamw", "--rank", "8"}), "--optimizer adamw");
  EXPECT_HAS(error_of({"--optimizer", "adamw", "--kappa", "8", "--gradients", "compressed"}), "--kappa");
  EXPECT_EQ(error_of({"--optimizer", "adamw", "--gradients", "compressed", "--rank", "8"}), "");
  EXPECT_EQ(error_of({"--optimizer", "adamw", "--beta2", "0.9"}), "");
  EXPECT_EQ(error_of({"--optimizer", "adafactor", "--relative-step", "--warmup-init"}), "");
  EXPECT_EQ(error_of({"--schedule", "wsd", "--cooldown-steps", "5"}), "");
}

}  // namespace
