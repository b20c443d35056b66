// test_multiple_choice.cpp: questions are read as llm.c's format has them, and what is damaged is refused with one line
// that names the file, the question and the remedy. What eval makes of them: tests/test_run_eval.py.
#include "data/multiple_choice.h"

#include <gtest/gtest.h>

#include "data/shard.h"
#include "tests/temporary_directory.h"

namespace {

using Words = std::vector<uint16_t>;

std::string file_bytes(std::vector<int32_t> header, const Words& words) {
  header.resize(kHeaderWords, 0);
  std::string bytes(reinterpret_cast<const char*>(header.data()), header.size() * sizeof(int32_t));
  return bytes.append(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(uint16_t));
}

// Two questions: of four endings after two tokens, and of two endings after one.
const Words kFirst = {65535, 38, 0, 2, 4, 2, 10, 11, 1, 20, 2, 21, 22, 3, 23, 24, 25, 1, 26};
const Words kSecond = {65535, 22, 1, 1, 2, 1, 12, 1, 27, 1, 28};

Words both() {
  Words words = kFirst;
  words.insert(words.end(), kSecond.begin(), kSecond.end());
  return words;
}

Words both_but(size_t at, uint16_t value) {
  Words words = both();
  words.at(at) = value;
  return words;
}

const std::vector<int32_t> kHeader = {20240522, 1, 2, 38, 257};

std::string error_of(const std::string& bytes) {
  TemporaryDirectory directory;
  const std::string path = directory / "a.bin";
  directory.write("a.bin", bytes);
  const std::string message = message_of([&] { read_multiple_choice(path); });
  EXPECT_EQ(message.rfind(path + ": ", 0), 0u) << message;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  return message;
}

#define EXPECT_HAS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

TEST(MultipleChoice, ReadsQuestionsOfAnySize) {
  TemporaryDirectory directory;
  directory.write("a.bin", file_bytes(kHeader, both()));
  const MultipleChoice choice = read_multiple_choice(directory / "a.bin");
  EXPECT_EQ(choice.vocabulary, 257);
  ASSERT_EQ(choice.questions.size(), 2u);
  const Question& first = choice.questions[0];
  EXPECT_EQ(first.context, (std::vector<int32_t>{10, 11}));
  EXPECT_EQ(first.endings, (std::vector<std::vector<int32_t>>{{20}, {21, 22}, {23, 24, 25}, {26}}));
  EXPECT_EQ(first.right, 2);
  EXPECT_EQ(choice.questions[1].endings, (std::vector<std::vector<int32_t>>{{27}, {28}}));
}

TEST(MultipleChoice, LlmcsFilesAreOfGpt2sVocabulary) {
  TemporaryDirectory directory;
  Words words = kFirst;
  words[6] = 50256;
  directory.write("a.bin", file_bytes({20240522, 1, 1, 38}, words));
  const MultipleChoice choice = read_multiple_choice(directory / "a.bin");
  EXPECT_EQ(choice.vocabulary, 50257);
  EXPECT_EQ(choice.questions[0].context[0], 50256);
  words[6] = 50257;
  EXPECT_HAS(error_of(file_bytes({20240522, 1, 1, 38}, words)), "question 0 holds token 50257");
}

TEST(MultipleChoice, EveryCutIsRefused) {
  const std::string whole = file_bytes(kHeader, both());
  for (size_t bytes = 0; bytes < whole.size(); ++bytes) EXPECT_NE(error_of(whole.substr(0, bytes)), "");
  EXPECT_HAS(error_of(whole.substr(0, whole.size() - 2)), "question 1 is cut off; make it again with");
  EXPECT_HAS(error_of(whole + "x"), "1 bytes follow the last of its 2 questions");
}

TEST(MultipleChoice, DamageIsNamed) {
  const auto of_words = [](const Words& words) { return error_of(file_bytes(kHeader, words)); };
  EXPECT_HAS(of_words(both_but(0, 1)), "question 0 does not begin with 65535");
  EXPECT_HAS(of_words(both_but(1, 40)), "question 0 is not as long as it says");
  EXPECT_HAS(of_words(both_but(kFirst.size() + 2, 0)), "question 1 has another number");
  EXPECT_HAS(of_words(both_but(3, 4)), "question 0 has no ending that is right");
  EXPECT_HAS(of_words(both_but(4, 1)), "question 0 has less than two endings");
  EXPECT_HAS(of_words(both_but(4, 65535)), "question 0 ");
  EXPECT_HAS(of_words(both_but(5, 0)), "question 0 has an empty context");
  EXPECT_HAS(of_words(both_but(8, 0)), "question 0 has an empty ending");
  EXPECT_HAS(of_words(both_but(5, 65535)), "question 0 holds token 65535");
  EXPECT_HAS(of_words(both_but(6, 257)), "question 0 holds token 257, but the vocabulary has 257");
  const auto of_header = [](const std::vector<int32_t>& header) { return error_of(file_bytes(header, both())); };
  EXPECT_HAS(of_header({20240520, 1, 2, 38}), "is a token shard: --val-data takes it");
  EXPECT_HAS(of_header({1, 1, 2, 38}), "not a file of questions (its first word is 1");
  EXPECT_HAS(of_header({20240522, 2, 2, 38}), "version 2 of the format is unknown, expected 1");
  for (const int32_t count : {0, -1, 65537, INT32_MAX})
    EXPECT_HAS(of_header({20240522, 1, count, 38}), "the header says " + std::to_string(count) + " questions");
  EXPECT_HAS(of_header({20240522, 1, 3, 38}), "question 2 is cut off");
  EXPECT_HAS(of_header({20240522, 1, 2, 38, -1}), "the vocabulary in the header is negative");
}

}  // namespace
