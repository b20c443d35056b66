// test_tokenizer.cpp: encoding agrees with tiktoken's on a small merge table made here and, where the shared data is at
// hand, on GPT-2's; decoding is the inverse; damaged tokenizer files are refused in one line.
#include "data/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "data/hugging_face_tokenizer.h"
#include "data/shard.h"
#include "data/unicode_classes.h"
#include "tests/temporary_directory.h"

namespace {

using Ids = std::vector<int32_t>;

#define EXPECT_HAS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

std::string tokenizer_bytes(int32_t version, const std::vector<std::string>& tokens, int32_t end_of_text) {
  std::vector<int32_t> header(kHeaderWords, 0);
  header[0] = kTokenizerMagic, header[1] = version, header[2] = static_cast<int32_t>(tokens.size());
  header[3] = end_of_text;
  std::string bytes(reinterpret_cast<const char*>(header.data()), header.size() * sizeof(int32_t));
  for (const std::string& token : tokens) bytes += static_cast<char>(token.size()) + token;
  return bytes;
}

// The 256 bytes, end-of-text, and a dozen merges.
std::vector<std::string> small_vocabulary() {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  for (const char* token : {"<|endoftext|>", "th", "he", "the", " t", " the", "in", "ing", "aa", "aaa", "'s", "\n\n"})
    tokens.emplace_back(token);
  return tokens;
}

TEST(Tokenizer, Bytes) {
  const Tokenizer tokenizer = Tokenizer::bytes();
  EXPECT_EQ(tokenizer.vocabulary(), 257);
  EXPECT_EQ(tokenizer.end_of_text(), 256);
  EXPECT_EQ(tokenizer.encode("Hi \xC3\xA9\xFF"), (Ids{'H', 'i', ' ', 0xC3, 0xA9, 0xFF}));
  EXPECT_EQ(tokenizer.decode(Ids{'H', 'i', 256}), "Hi<|endoftext|>");
  EXPECT_EQ(tokenizer.encode(""), Ids{});
  EXPECT_EQ(tokenizer.encode("<|endoftext|>").size(), 13u) << "text must not become the end-of-text token";
  std::string all;
  for (int i = 0; i < 1024; ++i) all += static_cast<char>(i * 37 + i / 256);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(all)), all);
}

// The expected ids were produced by tiktoken 0.14.0 from the same table.
TEST(Tokenizer, TextBytesCountNoEndOfText) {
  const Tokenizer bytes = Tokenizer::bytes();
  EXPECT_EQ(bytes.text_bytes(std::vector<int32_t>{104, 256, 105, 255}), 3);
  EXPECT_EQ(bytes.text_bytes({}), 0);
  EXPECT_EQ(bytes.text_bytes(std::vector<int32_t>{104, 257}), std::nullopt);
  EXPECT_EQ(bytes.text_bytes(std::vector<int32_t>{-1}), std::nullopt);
}

TEST(Tokenizer, EncodesAsTiktokenDoes) {
  TemporaryDirectory directory;
  const auto tokenizer = Tokenizer::from_file(directory.write("t.bin", tokenizer_bytes(2, small_vocabulary(), 256)));
  EXPECT_EQ(tokenizer.end_of_text(), 256);
  const std::map<std::string, Ids> expected = {
      {"the thing", {259, 32, 257, 263}}, {"aaaa aaaaa", {264, 264, 32, 264, 265}},
      {"a\n\n\nthe", {97, 267, 10, 259}}, {"it's 'the'", {105, 116, 266, 32, 39, 259, 39}},
      {"The\n\n", {84, 258, 267}},
  };
  for (const auto& [text, ids] : expected) {
    EXPECT_EQ(tokenizer.encode(text), ids) << text;
    EXPECT_EQ(tokenizer.decode(ids), text);
  }
  const std::string word(100000, 'a');  // quadratic merging would take minutes
  EXPECT_EQ(tokenizer.encode(word), Ids(word.size() / 2, 264));
}

TEST(Tokenizer, Version1EndsWithEndOfText) {
  TemporaryDirectory directory;
  const auto tokenizer = Tokenizer::from_file(directory.write("t.bin", tokenizer_bytes(1, {"a", "b", "ab", "E"}, 0)));
  EXPECT_EQ(tokenizer.vocabulary(), 4);
  EXPECT_EQ(tokenizer.end_of_text(), 3);
  EXPECT_EQ(tokenizer.encode("aba"), (Ids{2, 0}));
  EXPECT_HAS(message_of([&] { tokenizer.encode("abc"); }), "no token for byte 99");
  EXPECT_HAS(message_of([&] { tokenizer.decode(Ids{4}); }), "token 4");
  EXPECT_HAS(message_of([&] { tokenizer.decode(Ids{-1}); }), "token -1");
}

TEST(Tokenizer, RefusesDamagedFiles) {
  TemporaryDirectory directory;
  const auto error_of = [](const std::string& path) {
    const std::string message = message_of([&] { Tokenizer::from_file(path); });
    EXPECT_EQ(message.rfind(path + ": ", 0), 0u) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    return message;
  };
  const std::string good = tokenizer_bytes(2, small_vocabulary(), 256);
  EXPECT_HAS(error_of(directory / "absent.bin"), "cannot be read");
  EXPECT_HAS(error_of(directory.write("empty.bin", "")), "empty");
  EXPECT_HAS(error_of(directory.write("tiny.bin", "ab")), "truncated");
  EXPECT_HAS(error_of(directory.write("head.bin", good.substr(0, 100))), "truncated: the header needs 1024");
  EXPECT_HAS(error_of(directory.write("cut.bin", good.substr(0, good.size() - 1))), "truncated: token 267 of 268");
  EXPECT_HAS(error_of(directory.write("magic.bin", "some other file")), "not an llm.c tokenizer");
  EXPECT_HAS(error_of(directory.write("version.bin", tokenizer_bytes(3, {"a"}, 0))), "version 3");
  EXPECT_HAS(error_of(directory.write("end.bin", tokenizer_bytes(2, {"a"}, 1))), "end-of-text token 1");
  EXPECT_HAS(error_of(directory.write("none.bin", tokenizer_bytes(2, {}, 0))), "0 tokens");
}

void write_files(const TemporaryDirectory& directory, const std::string& folder,
                 const std::map<std::string, std::string>& files) {
  for (const auto& [name, contents] : files) directory.write(folder + "/" + name, contents);
}

TEST(HuggingFaceTokenizer, FilesOfASmallVocabularyMakeTheSameTokenizer) {
  TemporaryDirectory directory;
  const auto ours = Tokenizer::from_file(directory.write("t.bin", tokenizer_bytes(2, small_vocabulary(), 256)));
  const auto files = hugging_face_tokenizer_files(ours, 64);
  EXPECT_EQ(files.at("merges.txt"),
            "#version: 0.2\nt h\nh e\nth e\n\u0120 t\n\u0120 the\ni n\nin g\na a\naa a\n' s\n\u010a \u010a\n");
  const auto vocab = nlohmann::json::parse(files.at("vocab.json"));
  EXPECT_EQ(vocab.size(), 268u);
  EXPECT_EQ(vocab["\u0120the"], 261);
  EXPECT_EQ(vocab["<|endoftext|>"], 256);
  EXPECT_EQ(nlohmann::json::parse(files.at("tokenizer_config.json"))["model_max_length"], 64);
  write_files(directory, "theirs", files);
  ASSERT_TRUE(has_hugging_face_tokenizer(directory / "theirs"));
  const auto theirs = read_hugging_face_tokenizer(directory / "theirs", 268);
  EXPECT_EQ(theirs.end_of_text(), 256);
  EXPECT_EQ(theirs.vocabulary(), 268);
  std::string bytes;
  for (int i = 0; i < 1024; ++i) bytes += static_cast<char>(i * 37 + i / 256);
  for (const std::string& text : {std::string("the thing is  aaaa\n\nit's the "), bytes}) {
    EXPECT_EQ(theirs.encode(text), ours.encode(text));
    EXPECT_EQ(theirs.decode(theirs.encode(text)), text);
  }

  const auto plain = hugging_face_tokenizer_files(Tokenizer::bytes(), 64);
  EXPECT_EQ(plain.at("merges.txt"), "#version: 0.2\n");
  write_files(directory, "bytes", plain);
  EXPECT_EQ(read_hugging_face_tokenizer(directory / "bytes", 257).encode(bytes), Tokenizer::bytes().encode(bytes));
}

TEST(HuggingFaceTokenizer, AVocabularyThatIsNoByteLevelBpeHasNoFiles) {
  TemporaryDirectory directory;
  std::vector<std::string> tokens = small_vocabulary();
  tokens[7] = "";  // a byte is missing
  EXPECT_TRUE(
      hugging_face_tokenizer_files(Tokenizer::from_file(directory.write("a.bin", tokenizer_bytes(2, tokens, 256))), 64)
          .empty());
  tokens = small_vocabulary();
  tokens.push_back("xyz");  // made from three parts
  EXPECT_TRUE(
      hugging_face_tokenizer_files(Tokenizer::from_file(directory.write("b.bin", tokenizer_bytes(2, tokens, 256))), 64)
          .empty());
}

// In a list of merges a token is made from its own two parts only: "abc" from "ab" and "c", not from "a" and "bc".
TEST(HuggingFaceTokenizer, ReadsTokenizerJson) {
  TemporaryDirectory directory;
  nlohmann::json json = {{"normalizer", nullptr},
                         {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
                         {"added_tokens", {{{"id", 0}, {"content", "<s>"}}, {{"id", 9}, {"content", "<pad>"}}}},
                         {"model",
                          {{"type", "BPE"},
                           {"vocab", {{"<s>", 0}, {"a", 1}, {"b", 2}, {"c", 3}, {"bc", 4}, {"ab", 5}, {"abc", 6}}},
                           {"merges", {"b c", "a b", "ab c"}}}}};
  directory.write("m/tokenizer_config.json", R"({"eos_token": {"content": "<s>"}})");
  const auto read = [&](int64_t limit) {
    directory.write("m/tokenizer.json", json.dump());
    return read_hugging_face_tokenizer(directory / "m", limit);
  };
  EXPECT_EQ(read(7).encode("abc"), (Ids{1, 4}));
  EXPECT_EQ(read(7).encode("ab"), (Ids{5}));
  EXPECT_EQ(read(7).end_of_text(), 0);
  EXPECT_EQ(read(7).vocabulary(), 7) << "<pad> is beyond the model's rows";
  EXPECT_EQ(read(10).vocabulary(), 10);
  EXPECT_FALSE(read(10).has(8));
  EXPECT_TRUE(read(10).has(9));
  json["model"]["merges"] = nlohmann::json::array({nlohmann::json::array({"a", "b"})});  // newer files
  EXPECT_EQ(read(7).encode("abc"), (Ids{5, 3}));

  const auto error_with = [&](const std::string& pointer, const nlohmann::json& value) {
    const nlohmann::json before = json;
    json[nlohmann::json::json_pointer(pointer)] = value;
    const std::string message = message_of([&] { read(7); });
    EXPECT_HAS(message, directory / "m");
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    json = before;
    return message;
  };
  EXPECT_HAS(error_with("/model/type", "Unigram"), "Unigram");
  EXPECT_HAS(error_with("/normalizer", {{"type", "NFC"}}), "normalizer");
  EXPECT_HAS(error_with("/pre_tokenizer/type", "Metaspace"), "pre_tokenizer");
  EXPECT_HAS(error_with("/pre_tokenizer/add_prefix_space", true), "pre_tokenizer");
  EXPECT_HAS(error_with("/model/vocab/a", -1), "'a'");
  EXPECT_HAS(error_with("/model/vocab/a", int64_t{1} << 40), "'a'");
  EXPECT_HAS(error_with("/model/merges", {"a x"}), "'x'");
  EXPECT_HAS(error_with("/model/merges", {"abc"}), "not a merge");
  EXPECT_HAS(error_with("/model/merges", {"c b"}), "makes no token");
  EXPECT_NE(error_with("/model/merges", 3), "");
  EXPECT_NE(error_with("/model", 3), "");
  directory.write("m/tokenizer.json", std::string(100000, '['));
  EXPECT_HAS(message_of([&] { read_hugging_face_tokenizer(directory / "m", 7); }), "nests deeper");
}

std::vector<std::string> words(std::string_view text) {
  const auto views = split_words(text);
  return {views.begin(), views.end()};
}

TEST(SplitWords, FollowsGpt2sPattern) {
  using Words = std::vector<std::string>;
  EXPECT_EQ(words("I'll say 12 it's!?"), (Words{"I", "'ll", " say", " 12", " it", "'s", "!?"}));
  EXPECT_EQ(words("a  b"), (Words{"a", " ", " b"}));
  EXPECT_EQ(words("a\n\n b"), (Words{"a", "\n\n", " b"}));
  EXPECT_EQ(words("a\n\nb"), (Words{"a", "\n", "\n", "b"}));
  EXPECT_EQ(words("a\tb \t"), (Words{"a", "\t", "b", " \t"}));
  EXPECT_EQ(words(" "), (Words{" "}));
  EXPECT_EQ(words("'S 'tis"), (Words{"'", "S", " '", "tis"}));
  EXPECT_EQ(words("caf\u00e9\u2019s \u65e5\u672c \u00bd\u00a0x"),
            (Words{"caf\u00e9", "\u2019", "s", " \u65e5\u672c", " \u00bd", "\u00a0", "x"}));
  EXPECT_EQ(words("a\xFF\xC3z"), (Words{"a", "\xFF\xC3", "z"}));
}

TEST(Printable, ReplacesWhatATerminalCannotShow) {
  EXPECT_EQ(printable("a\tb\nc"), "a\tb\nc");
  EXPECT_EQ(printable("h\xc3\xa9"), "h\xc3\xa9");
  EXPECT_EQ(printable("\x1b[2J"), "\xef\xbf\xbd[2J");
  EXPECT_EQ(printable("\xc3x\xff"), "\xef\xbf\xbdx\xef\xbf\xbd");
  EXPECT_EQ(printable("\xc2\x9b"), "\xef\xbf\xbd");  // a one-byte escape of 8-bit terminals
}

TEST(WholeCharacters, LeavesOutTheBeginningOfOne) {
  for (const std::string_view whole : {"", "a", "h\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x99\x82", "a\x80", "\xff",
                                       "\xc0", "\xe0\x80", "\xed\xa0", "\xf4\x90", "\xf5", "\xe2\x82\xac\x82"}) {
    EXPECT_EQ(whole_characters(whole), whole);
  }
  for (const std::string_view character : {"\xc3\xa9", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xef\xbf\xbd",
                                           "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf", "\xf1\x80\x80\x80"}) {
    for (size_t bytes = 1; bytes < character.size(); ++bytes) {
      for (const std::string before : {"", "a", "\xff", "\xe2\x82\xac"}) {
        EXPECT_EQ(whole_characters(before + std::string(character.substr(0, bytes))), before);
      }
    }
  }
}

TEST(DecodeUtf8, AcceptsOnlyShortestForms) {
  EXPECT_EQ(decode_utf8("\xF0\x9F\x99\x82", 0).code, char32_t{0x1F642});
  EXPECT_EQ(decode_utf8("\xF0\x9F\x99\x82", 0).bytes, 4u);
  for (const std::string_view bad : {"\x80", "\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE2\x82",
                                     "\xF8\x88\x80\x80\x80", "\xC3("}) {
    EXPECT_EQ(decode_utf8(bad, 0).code, kInvalidCode);
    EXPECT_EQ(decode_utf8(bad, 0).bytes, 1u);
  }
}

// GPT-2's vocabulary from encoder.json, whose tokens are written in a byte-to-character code that maps every byte to a
// printable character.
std::vector<std::string> gpt2_vocabulary(const std::string& path) {
  std::map<char32_t, char> byte_of;
  char32_t next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    byte_of[printable ? static_cast<char32_t>(byte) : next++] = static_cast<char>(byte);
  }
  std::ifstream file(path);
  std::vector<std::string> tokens(kGpt2Vocabulary);
  const auto json = nlohmann::json::parse(file);
  for (const auto& [text, id] : json.items()) {
    std::string bytes;
    for (size_t i = 0; i < text.size(); i += decode_utf8(text, i).bytes) bytes += byte_of.at(decode_utf8(text, i).code);
    tokens.at(id.get<size_t>()) = bytes;
  }
  return tokens;
}

class Gpt2Tokenizer : public testing::Test {
 protected:
  static constexpr const char* kShared = "../shared/data/";

  void SetUp() override {
    const std::string vocabulary = std::string(kShared) + "gpt2/encoder.json";
    if (!std::filesystem::exists(vocabulary))
      GTEST_SKIP() << "no " << vocabulary << ", GPT-2's vocabulary is not tested";
    directory_.write("tokenizer.bin", tokenizer_bytes(2, gpt2_vocabulary(vocabulary), 50256));
  }

  TemporaryDirectory directory_;
};

// The expected ids were produced by tiktoken 0.14.0.
TEST_F(Gpt2Tokenizer, EncodesAsTiktokenDoes) {
  const Tokenizer tokenizer = Tokenizer::from_file(directory_ / "tokenizer.bin");
  EXPECT_EQ(tokenizer.vocabulary(), 50257);
  const std::map<std::string, Ids> expected = {
      {"Hello, world!", {15496, 11, 995, 0}},
      {"  two  spaces\n\n\ttab \n", {220, 734, 220, 9029, 628, 197, 8658, 220, 198}},
      {"I'll say it's 12345 o'clock, they've won't",
       {40, 1183, 910, 340, 338, 17031, 2231, 267, 6, 15750, 11, 484, 1053, 1839, 470}},
      {"\u201cCurly quotes\u201d \u2014 na\u00efve caf\u00e9, \u65e5\u672c\u8a9e \u00bd",
       {447, 250, 26628, 306, 13386, 447, 251, 851, 41492, 40304, 11, 10545, 245, 98, 17312, 105, 45739, 252, 25208}},
      {"<|endoftext|>", {27, 91, 437, 1659, 5239, 91, 29}},
      {std::string(36, 'a'), Ids(9, 24794)},
      {"x\u00a0y \U0001F642", {87, 1849, 88, 32485}},
      {"trailing   ", {9535, 4386, 220, 220, 220}},
  };
  for (const auto& [text, ids] : expected) {
    EXPECT_EQ(tokenizer.encode(text), ids) << text;
    EXPECT_EQ(tokenizer.decode(ids), text);
  }
}

TEST_F(Gpt2Tokenizer, ItsMergesAreThoseThatWerePublished) {
  const auto files = hugging_face_tokenizer_files(Tokenizer::from_file(directory_ / "tokenizer.bin"), 1024);
  const auto published = [](const char* name) {
    std::ifstream file(std::string(kShared) + "gpt2/" + name);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  EXPECT_TRUE(files.at("merges.txt") == published("vocab.bpe"));
  EXPECT_TRUE(nlohmann::json::parse(files.at("vocab.json")) == nlohmann::json::parse(published("encoder.json")));
}

TEST_F(Gpt2Tokenizer, ReproducesShardsWrittenByTiktoken) {
  const Tokenizer tokenizer = Tokenizer::from_file(directory_ / "tokenizer.bin");
  for (const char* name : {"tinyshakespeare_val.bin", "corpus_val_000000.bin"}) {
    const Shard shard(std::string(kShared) + "shards/" + name);
    Ids tokens(static_cast<size_t>(shard.tokens()));
    shard.read(tokens, 0);
    int64_t documents = 0;
    for (size_t start = 0; start < tokens.size(); ++documents) {
      ASSERT_EQ(tokens[start], tokenizer.end_of_text());
      const auto begin = tokens.begin() + static_cast<int64_t>(start) + 1;
      const auto end = std::find(begin, tokens.end(), tokenizer.end_of_text());
      start = static_cast<size_t>(end - tokens.begin());
      if (end == tokens.end()) break;  // cut by the end of the shard, perhaps inside a word
      const Ids document(begin, end);
      ASSERT_EQ(tokenizer.encode(tokenizer.decode(document)), document) << name << ", document " << documents;
    }
    EXPECT_GT(documents, 10);
  }
}

}  // namespace
