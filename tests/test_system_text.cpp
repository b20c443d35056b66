// test_system_text.cpp: the default data is made of what text there is, evenly, without binaries, links and
// repetitions, the same each time; and a machine without text gets an error that says what to do.
#include "data/system_text.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "data/shard.h"
#include "data/tokenizer.h"
#include "tests/temporary_directory.h"

namespace {

namespace fs = std::filesystem;

#define EXPECT_HAS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

// `bytes` of lines that no other name has.
std::string prose(const std::string& name, size_t bytes) {
  std::string text;
  for (unsigned line = 0; text.size() < bytes; ++line) {
    text += "the story of " + name + " has a line about";
    for (unsigned n = line + 1; n > 0; n /= 7) text += std::string(" ") + static_cast<char>('a' + n % 7) + "oo";
    text += "\n";
  }
  return text;
}

std::vector<int32_t> read_tokens(const std::string& path) {
  const Shard shard(path);
  EXPECT_EQ(shard.vocabulary(), 257);
  std::vector<int32_t> tokens(static_cast<size_t>(shard.tokens()));
  shard.read(tokens, 0);
  return tokens;
}

// The documents of both shards, sorted.
std::vector<std::string> documents_of(const SystemTextPaths& paths) {
  std::vector<std::string> documents;
  for (const std::string& path : {paths.train, paths.validation}) {
    std::vector<int32_t> tokens = read_tokens(path);
    EXPECT_EQ(tokens.front(), 256);
    for (const int32_t token : tokens)
      if (token == 256)
        documents.emplace_back();
      else
        documents.back() += static_cast<char>(token);
  }
  std::sort(documents.begin(), documents.end());
  return documents;
}

// Two sources, "headers" and "notes", of the given options and size.
class SystemTextTest : public testing::Test {
 protected:
  SystemTextTest() {
    options_.sources = {{.roots = directory_ / "headers*", .extensions = {".h"}, .file_name = ""},
                        {.roots = directory_ / "notes", .extensions = {}, .file_name = "copyright"}};
    options_.min_bytes = 1000;
  }

  std::string add(const std::string& path, const std::string& text) {
    directory_.write(path, text);
    return text;
  }

  SystemTextPaths make(const std::string& name = "out") { return make_system_text(directory_ / name, options_); }

  TemporaryDirectory directory_;
  SystemTextOptions options_;
};

TEST_F(SystemTextTest, TakesTextOnceAndLeavesOutTheRest) {
  std::vector<std::string> expected;
  for (const std::string name : {"oak", "elm", "ash", "fir", "yew", "box"})
    expected.push_back(add("headers/" + name + "/a.h", prose(name, 3000)));
  expected.push_back(add("notes/deep/er/copyright", prose("caf\u00e9", 500)));
  add("headers/copy.h", expected[0]);
  std::string reworded = expected[1];
  for (char& c : reworded) c = c == ' ' ? '\t' : c;
  add("headers/reworded.h", "Copyright 2024 somebody else\n" + reworded);
  add("headers/binary.h", std::string("\0\1\2", 3) + prose("binary", 3000));
  add("headers/latin1.h", "caf\xE9 " + prose("latin", 3000));
  add("headers/other.txt", prose("other", 3000));
  add("notes/readme", prose("readme", 3000));
  add("headers/tiny.h", "int x;\n");
  fs::create_symlink(directory_ / "headers/oak/a.h", directory_ / "headers/link.h");
  fs::create_directory_symlink(directory_ / "headers", directory_ / "headers/loop");

  const SystemTextPaths paths = make();
  EXPECT_TRUE(paths.created);
  EXPECT_EQ(fs::path(paths.train).filename(), "system_text_train_000000.bin");
  EXPECT_EQ(fs::path(paths.validation).filename(), "system_text_val_000000.bin");
  const std::vector<std::string> documents = documents_of(paths);
  // Which of two near-duplicates stays is decided by the hash of their paths.
  ASSERT_EQ(documents.size(), expected.size());
  size_t found = 0;
  for (const std::string& text : expected) found += std::count(documents.begin(), documents.end(), text);
  EXPECT_GE(found, expected.size() - 1);
  EXPECT_EQ(std::distance(fs::directory_iterator(directory_ / "out"), {}), 2) << "a temporary file is left";
}

TEST_F(SystemTextTest, IsTheSameEachTimeAndKeepsWhatIsThere) {
  for (int i = 0; i < 30; ++i) add("headers/" + std::to_string(i) + ".h", prose(std::string(i + 1, 'x'), 2000));
  const SystemTextPaths first = make("one"), second = make("two");
  EXPECT_EQ(read_tokens(first.train), read_tokens(second.train));
  EXPECT_EQ(read_tokens(first.validation), read_tokens(second.validation));
  const auto train = static_cast<double>(read_tokens(first.train).size());
  const auto validation = static_cast<double>(read_tokens(first.validation).size());
  EXPECT_GT(validation / (train + validation), 0.03);
  EXPECT_LT(validation / (train + validation), 0.12);

  const auto time = fs::last_write_time(first.train);
  const SystemTextPaths again = make("one");
  EXPECT_FALSE(again.created);
  EXPECT_EQ(fs::last_write_time(again.train), time);
  fs::resize_file(first.validation, 1500);  // damaged
  EXPECT_TRUE(make("one").created);
  EXPECT_EQ(read_tokens(first.validation), read_tokens(second.validation));
}

TEST_F(SystemTextTest, SharesTheSpaceBetweenTheSources) {
  for (int i = 0; i < 200; ++i) add("headers/" + std::to_string(i) + ".h", prose(std::string(i + 1, 'x'), 2000));
  for (int i = 0; i < 50; ++i) add("notes/" + std::to_string(i) + "/copyright", prose(std::string(i + 1, 'y'), 2000));
  const auto bytes_about = [](const std::vector<std::string>& documents, const std::string& start) {
    size_t bytes = 0;
    for (const std::string& text : documents) bytes += text.starts_with("the story of " + start) ? text.size() : 0;
    return static_cast<double>(bytes);
  };
  options_.max_bytes = 100000;
  auto documents = documents_of(make("even"));
  EXPECT_NEAR(bytes_about(documents, "x"), 50000, 3000);
  EXPECT_NEAR(bytes_about(documents, "y"), 50000, 3000);
  options_.max_bytes = 300000;  // more than half of it than the notes have
  documents = documents_of(make("all"));
  EXPECT_GT(bytes_about(documents, "y"), 100000);
  EXPECT_NEAR(bytes_about(documents, "x") + bytes_about(documents, "y"), 300000, 5000);
}

TEST_F(SystemTextTest, SaysWhatToDoWhenThereIsNoText) {
  options_.min_bytes = 100 * 1024;
  add("headers/a.h", prose("oak", 3000));
  const std::string message = message_of([&] { make(); });
  EXPECT_HAS(message, directory_ / "headers*");
  EXPECT_HAS(message, directory_ / "notes");
  EXPECT_HAS(message, "--data");
  EXPECT_EQ(message.find('\n'), std::string::npos);
  EXPECT_FALSE(fs::exists(directory_ / "out"));
}

TEST_F(SystemTextTest, NamesADirectoryThatCannotBeMade) {
  for (const std::string name : {"oak", "elm"}) add("headers/" + name + ".h", prose(name, 3000));
  directory_.write("file", "x");
  EXPECT_HAS(message_of([&] { make("file/out"); }), directory_ / "file/out");
}

TEST(SystemText, ThisMachineHasSome) {
  TemporaryDirectory directory;
  SystemTextOptions options;
  options.max_bytes = 1 << 20;
  const std::string message = message_of([&] {
    const SystemTextPaths paths = make_system_text(directory / "out", options);
    const auto tokens = static_cast<int64_t>(read_tokens(paths.train).size() + read_tokens(paths.validation).size());
    EXPECT_GT(tokens, options.min_bytes);
    EXPECT_LT(tokens, options.max_bytes + 2 * options.max_document_bytes);
  });
  if (message.find("found only") != std::string::npos) GTEST_SKIP() << message;
  EXPECT_EQ(message, "");
}

}  // namespace
