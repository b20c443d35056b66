// test_shard.cpp: token shards of every format are read as they were written, and every kind of damaged file is refused
// with one line that names the file, the fault and the remedy.
#include "data/shard.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <cstdio>
#include <numeric>
#include <vector>

#include "tests/temporary_directory.h"

namespace {

template <typename Token>
std::string shard_bytes(int32_t magic, int32_t version, int32_t count, int32_t vocabulary, std::vector<Token> tokens) {
  std::vector<int32_t> header(kHeaderWords, 0);
  header[0] = magic, header[1] = version, header[2] = count, header[3] = vocabulary;
  std::string bytes(reinterpret_cast<const char*>(header.data()), header.size() * sizeof(int32_t));
  bytes.append(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(Token));
  return bytes;
}

std::vector<int32_t> read_all(const Shard& shard) {
  std::vector<int32_t> tokens(static_cast<size_t>(shard.tokens()));
  shard.read(tokens, 0);
  return tokens;
}

std::string error_of(const std::string& path, DataFormat format = DataFormat::kLlmc) {
  const std::string message = message_of([&] { Shard shard(path, format); });
  EXPECT_NE(message, "") << path << " was accepted";
  EXPECT_EQ(message.rfind(path + ": ", 0), 0u) << message;  // names the file
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  return message;
}

#define EXPECT_HAS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

TEST(Shard, ReadsWhatWriteShardWrote) {
  TemporaryDirectory directory;
  std::vector<uint16_t> tokens(1000);
  std::iota(tokens.begin(), tokens.end(), 49257);
  write_shard(directory / "a.bin", tokens, 50257);
  const Shard shard(directory / "a.bin");
  EXPECT_EQ(shard.tokens(), 1000);
  EXPECT_EQ(shard.vocabulary(), 50257);
  EXPECT_EQ(read_all(shard), std::vector<int32_t>(tokens.begin(), tokens.end()));
  std::vector<int32_t> part(3);
  shard.read(part, 997);
  EXPECT_EQ(part, (std::vector<int32_t>{50254, 50255, 50256}));
  EXPECT_THROW(shard.read(part, 998), std::out_of_range);
  EXPECT_THROW(shard.read(part, -1), std::out_of_range);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory.path()), {}), 1) << "a temporary file is left";
}

TEST(Shard, AFileThatIsCutWhileItIsUsedIsAnErrorThatNamesIt) {
  TemporaryDirectory directory;
  const std::string path = directory / "a.bin";
  write_shard(path, std::vector<uint16_t>(1000, 7), 257);
  const Shard shard(path);
  std::vector<int32_t> tokens(100);
  std::filesystem::resize_file(path, 1024 + 2 * 500);
  shard.read(tokens, 400);  // what is left can be read
  const std::string message = message_of([&] { shard.read(tokens, 401); });
  EXPECT_EQ(message.rfind(path + ": was cut", 0), 0u) << message;
  EXPECT_HAS(message, "had 3024 bytes and now ends at 2024");
}

TEST(Shard, AnOpenFileMayBeReplacedOrRemoved) {
  TemporaryDirectory directory;
  const std::string path = directory / "a.bin";
  write_shard(path, std::vector<uint16_t>{1, 2, 3}, 257);
  const Shard shard(path);
  write_shard(path, std::vector<uint16_t>{4, 5, 6}, 257);
  EXPECT_EQ(read_all(shard), (std::vector<int32_t>{1, 2, 3}));
  std::filesystem::remove(path);
  EXPECT_EQ(read_all(shard), (std::vector<int32_t>{1, 2, 3}));
}

// In a process with few descriptors: a shard is read, replaced, removed; the messages go to standard error.
[[noreturn]] void use_shard_without_descriptors(const std::string& path) {
  const rlimit few{100, 100};
  setrlimit(RLIMIT_NOFILE, &few);
  const Shard shard(path);
  if (read_all(shard) != std::vector<int32_t>{1, 2, 3}) exit(1);
  std::filesystem::rename(path, path + ".old");
  write_shard(path, std::vector<uint16_t>{4, 5, 6}, 257);
  fprintf(stderr, "%s\n", message_of([&] { read_all(shard); }).c_str());
  std::filesystem::remove(path);
  fprintf(stderr, "%s\n", message_of([&] { read_all(shard); }).c_str());
  exit(0);
}

TEST(Shard, WithoutDescriptorsToKeepItReadsTheSameFileOrSaysSo) {
  TemporaryDirectory directory;
  const std::string path = directory / "a.bin";
  write_shard(path, std::vector<uint16_t>{1, 2, 3}, 257);
  EXPECT_EXIT(use_shard_without_descriptors(path), testing::ExitedWithCode(0),
              "a.bin: was replaced.*\n.*a.bin: cannot be opened any more: No such file");
}

TEST(Shard, ANamedPipeIsRefusedAtOnce) {
  TemporaryDirectory directory;
  ASSERT_EQ(mkfifo((directory / "a.bin").c_str(), 0600), 0);
  EXPECT_HAS(error_of(directory / "a.bin"), "not a regular file");
}

TEST(Shard, WriterRefusesWhatAReaderCouldNotUse) {
  TemporaryDirectory directory;
  const std::vector<uint16_t> tokens = {1, 2, 300};
  EXPECT_THROW(write_shard(directory / "a.bin", tokens, 257), std::logic_error);
  EXPECT_THROW(write_shard(directory / "a.bin", {}, 257), std::logic_error);
  const std::string message = message_of([&] { write_shard(directory / "absent/a.bin", tokens, 50257); });
  EXPECT_HAS(message, "absent/a.bin");
  EXPECT_HAS(message, "No such file");
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST(Shard, VocabularyOfTheHeaderOrTheDefault) {
  TemporaryDirectory directory;
  const auto narrow = shard_bytes<uint16_t>(kShardMagic, 1, 2, 0, {1, 2});
  EXPECT_EQ(Shard(directory.write("a.bin", narrow)).vocabulary(), 50257);
  const auto bytes = shard_bytes<uint16_t>(kShardMagic, 1, 2, 257, {1, 2});
  EXPECT_EQ(Shard(directory.write("b.bin", bytes)).vocabulary(), 257);
}

TEST(Shard, ReadsWideTokens) {
  TemporaryDirectory directory;
  const auto bytes = shard_bytes<uint32_t>(kWideShardMagic, 7, 3, 0, {1, 128255, 0xFFFFFFFF});
  const Shard shard(directory.write("a.bin", bytes));
  EXPECT_EQ(read_all(shard), (std::vector<int32_t>{1, 128255, -1}));
  EXPECT_EQ(shard.vocabulary(), 128256);
}

TEST(Shard, ReadsNanogptWhenTold) {
  TemporaryDirectory directory;
  const std::string path = directory.write("train.bin", std::string("\x01\x00\x51\xC4\x07\x00", 6));
  const Shard shard(path, DataFormat::kNanogpt);
  EXPECT_EQ(read_all(shard), (std::vector<int32_t>{1, 50257, 7}));
  EXPECT_HAS(error_of(path), "--data-format nanogpt");
  EXPECT_HAS(error_of(directory.write("odd.bin", "abc"), DataFormat::kNanogpt), "truncated: 3 bytes");
  const auto llmc = shard_bytes<uint16_t>(kShardMagic, 1, 2, 0, {1, 2});
  EXPECT_HAS(error_of(directory.write("llmc.bin", llmc), DataFormat::kNanogpt), "drop the flag");
}

TEST(Shard, MovesItsMapping) {
  TemporaryDirectory directory;
  Shard a(directory.write("a.bin", shard_bytes<uint16_t>(kShardMagic, 1, 2, 0, {1, 2})));
  Shard b(directory.write("b.bin", shard_bytes<uint16_t>(kShardMagic, 1, 1, 0, {3})));
  b = std::move(a);
  EXPECT_EQ(read_all(b), (std::vector<int32_t>{1, 2}));
}

TEST(Shard, RefusesDamagedFiles) {
  TemporaryDirectory directory;
  EXPECT_HAS(error_of(directory / "absent.bin"), "No such file");
  EXPECT_HAS(error_of(directory.path()), "not a regular file");
  EXPECT_HAS(error_of(directory.write("empty.bin", "")), "empty (0 bytes)");

  const std::string good = shard_bytes<uint16_t>(kShardMagic, 1, 100, 0, std::vector<uint16_t>(100, 1));
  const std::string cut = error_of(directory.write("cut.bin", good.substr(0, good.size() - 7)));
  EXPECT_HAS(cut, "100 tokens need 1224 bytes, the file has 1217");
  EXPECT_HAS(error_of(directory.write("head.bin", good.substr(0, 500))), "needs 1024 bytes, the file has 500");
  EXPECT_HAS(error_of(directory.write("one.bin", good.substr(0, 1))), "not an llm.c token shard");
  EXPECT_HAS(error_of(directory.write("long.bin", good + "xx")), "the file has 1226");

  const auto none = shard_bytes<uint16_t>(kShardMagic, 1, 0, 0, {});
  EXPECT_HAS(error_of(directory.write("none.bin", none)), "no tokens");
  const auto version = shard_bytes<uint16_t>(kShardMagic, 9, 1, 0, {1});
  EXPECT_HAS(error_of(directory.write("version.bin", version)), "version 9");
  const auto wide_version = shard_bytes<uint32_t>(kWideShardMagic, 1, 1, 0, {1});
  EXPECT_HAS(error_of(directory.write("wide.bin", wide_version)), "expected 7");
  const auto negative = shard_bytes<uint16_t>(kShardMagic, 1, 1, -5, {1});
  EXPECT_HAS(error_of(directory.write("negative.bin", negative)), "-5");
}

TEST(Shard, SaysWhatAForeignFileLooksLike) {
  TemporaryDirectory directory;
  EXPECT_HAS(error_of(directory.write("a.txt", "To be, or not to be\n")), "plain text");
  EXPECT_HAS(error_of(directory.write("a.txt", "To be, or not to be\n")), "data/prepare.py");
  const auto tokenizer = shard_bytes<uint16_t>(kTokenizerMagic, 2, 0, 0, {});
  EXPECT_HAS(error_of(directory.write("tokenizer.bin", tokenizer)), "is it a tokenizer?");
  const auto model = shard_bytes<uint16_t>(20240326, 3, 0, 0, {});
  EXPECT_HAS(error_of(directory.write("model.bin", model)), "checkpoint");
  EXPECT_HAS(error_of(directory.write("nanogpt.bin", std::string("\x01\x00\x02\x00", 4))), "headerless");
}

}  // namespace
