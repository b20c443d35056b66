// multiple_choice.cpp: see multiple_choice.h. HellaSwag's 10,042 questions are 3.6 MB and read as a whole.
#include "data/multiple_choice.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string_view>

#include "data/input_file.h"
#include "data/shard.h"

namespace {

constexpr int32_t kVersion = 1;
constexpr uint16_t kQuestionBegins = 65535;
constexpr size_t kHeaderBytes = kHeaderWords * sizeof(int32_t);
constexpr char kMakeAgain[] = "; make it again with data/hellaswag.py";

// The file's uint16 words, one after another.
class Words {
 public:
  Words(const std::string& path, std::string_view bytes) : path_(path), bytes_(bytes) {}

  // Names the question at hand in errors.
  void begin_question(size_t index) { question_ = index; }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(path_ + ": question " + std::to_string(question_) + " " + what + kMakeAgain);
  }

  uint16_t next() {
    if (bytes_.size() - at_ < sizeof(uint16_t)) fail("is cut off");
    uint16_t word;
    std::memcpy(&word, bytes_.data() + at_, sizeof word);
    at_ += sizeof word;
    return word;
  }

  // A number of tokens, at least one, then these.
  std::vector<int32_t> tokens(const char* what, int64_t vocabulary) {
    std::vector<int32_t> ids(next());
    if (ids.empty()) fail(std::string("has an empty ") + what);
    for (int32_t& id : ids) {
      id = next();
      if (id >= vocabulary)
        fail("holds token " + std::to_string(id) + ", but the vocabulary has " + std::to_string(vocabulary));
    }
    return ids;
  }

  size_t position() const { return at_; }
  size_t left() const { return bytes_.size() - at_; }

 private:
  const std::string& path_;
  std::string_view bytes_;
  size_t at_ = 0, question_ = 0;
};

Question read_question(Words& words, size_t index, int64_t vocabulary) {
  words.begin_question(index);
  const size_t begin = words.position();
  if (words.next() != kQuestionBegins) words.fail("does not begin with 65535");
  const size_t bytes = words.next();
  if (words.next() != index) words.fail("has another number");
  Question question;
  question.right = words.next();
  question.endings.resize(words.next());
  if (question.endings.size() < 2) words.fail("has less than two endings");
  if (question.right >= static_cast<int64_t>(question.endings.size())) words.fail("has no ending that is right");
  question.context = words.tokens("context", vocabulary);
  for (std::vector<int32_t>& ending : question.endings) ending = words.tokens("ending", vocabulary);
  if (words.position() - begin != bytes) words.fail("is not as long as it says");
  return question;
}

}  // namespace

MultipleChoice read_multiple_choice(const std::string& path) {
  const std::string file = read_file(path);
  const auto fail = [&](const std::string& what) { throw std::runtime_error(path + ": " + what); };
  int32_t header[5] = {};
  std::memcpy(header, file.data(), std::min(sizeof header, file.size()));
  const auto [magic, version, count, longest, declared] = header;
  if (magic == kShardMagic || magic == kWideShardMagic)
    fail("is a token shard: --val-data takes it; --hellaswag takes what data/hellaswag.py makes");
  if (magic != kQuestionsMagic)
    fail("not a file of questions (its first word is " + std::to_string(magic) + ", expected " +
         std::to_string(kQuestionsMagic) + "); data/hellaswag.py makes one");
  if (file.size() < kHeaderBytes)
    fail("truncated: the header needs " + std::to_string(kHeaderBytes) + " bytes, the file has " +
         std::to_string(file.size()) + kMakeAgain);
  if (version != kVersion)
    fail("version " + std::to_string(version) + " of the format is unknown, expected " + std::to_string(kVersion));
  if (count <= 0 || count > kQuestionBegins + 1)
    fail("the header says " + std::to_string(count) + " questions" + kMakeAgain);
  if (declared < 0) fail("the vocabulary in the header is negative: " + std::to_string(declared));

  MultipleChoice choice;
  choice.vocabulary = declared > 0 ? declared : kGpt2Vocabulary;
  Words words(path, std::string_view(file).substr(kHeaderBytes));
  for (size_t i = 0; i < static_cast<size_t>(count); ++i)
    choice.questions.push_back(read_question(words, i, choice.vocabulary));
  if (words.left() > 0)
    fail(std::to_string(words.left()) + " bytes follow the last of its " + std::to_string(count) + " questions" +
         kMakeAgain);
  return choice;
}
