// hugging_face_tokenizer.cpp: see hugging_face_tokenizer.h.
#include "data/hugging_face_tokenizer.h"

#include <array>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include "data/input_file.h"
#include "data/json_text.h"
#include "data/unicode_classes.h"

namespace fs = std::filesystem;

namespace {

constexpr char kEndOfText[] = "<|endoftext|>";
constexpr int64_t kLargestVocabulary = 1 << 24;  // more is a damaged file

std::string utf8(char32_t code) {  // below U+0800
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

// GPT-2's way of writing bytes as characters that can be seen: the printable ones of Latin-1 stand for themselves, the
// others in their order for the characters from U+0100 on.
const std::array<std::string, 256>& character_of_byte() {
  static const auto table = [] {
    std::array<std::string, 256> characters;
    char32_t next = 256;
    for (char32_t byte = 0; byte < 256; ++byte) {
      const bool seen = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
      characters[byte] = utf8(seen ? byte : next++);
    }
    return characters;
  }();
  return table;
}

// The same backwards; nothing when a character stands for no byte.
bool bytes_of(std::string& bytes, std::string_view text) {
  static const auto table = [] {
    std::unordered_map<std::string, char> bytes;
    for (size_t byte = 0; byte < 256; ++byte) bytes[character_of_byte()[byte]] = static_cast<char>(byte);
    return bytes;
  }();
  bytes.clear();
  for (size_t i = 0; i < text.size();) {
    const size_t size = decode_utf8(text, i).bytes;
    const auto found = table.find(std::string(text.substr(i, size)));
    if (found == table.end()) return false;
    bytes += found->second;
    i += size;
  }
  return true;
}

std::string characters_of(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes) text += character_of_byte()[static_cast<unsigned char>(byte)];
  return text;
}

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error(path + ": " + what);
}

nlohmann::json read_json(const std::string& path) { return parse_json(read_file(path), path); }

// Tokens at their ids, and found by the text that the files have for them.
class Vocabulary {
 public:
  void put(const std::string& path, const std::string& text, const nlohmann::json& id, bool added, int64_t limit) {
    if (!id.is_number_integer() || id < 0 || id >= kLargestVocabulary)
      fail(path, "token '" + text + "' has no valid id");
    const auto place = id.get<size_t>();
    if (added && static_cast<int64_t>(place) >= limit) return;
    std::string bytes = text;
    if (!added && text != kEndOfText && !bytes_of(bytes, text)) bytes = text;
    if (tokens_.size() <= place) tokens_.resize(place + 1);
    tokens_[place] = bytes;
    ids_[text] = static_cast<int32_t>(place);
  }

  int32_t find(const std::string& text) const {
    const auto found = ids_.find(text);
    return found == ids_.end() ? -1 : found->second;
  }

  const std::vector<std::string>& tokens() const { return tokens_; }

 private:
  std::vector<std::string> tokens_;
  std::unordered_map<std::string, int32_t> ids_;
};

Tokenizer::Merge merge_of(const std::string& path, const Vocabulary& vocabulary, const std::string& left,
                          const std::string& right) {
  const Tokenizer::Merge merge = {vocabulary.find(left), vocabulary.find(right)};
  if (merge.first < 0 || merge.second < 0) fail(path, "merges '" + left + "' and '" + right + "', which are no tokens");
  return merge;
}

// "a b"
Tokenizer::Merge merge_of(const std::string& path, const Vocabulary& vocabulary, const std::string& line) {
  const size_t space = line.find(' ');
  if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos)
    fail(path, "'" + line.substr(0, 80) + "' is not a merge, which is two tokens with a space between");
  return merge_of(path, vocabulary, line.substr(0, space), line.substr(space + 1));
}

// Only GPT-2's own settings are what encode() does.
void check_kind(const std::string& path, const nlohmann::json& json) {
  const auto refuse = [&](const std::string& what) { fail(path, what + "; GPT-2's byte-level BPE can be read"); };
  const nlohmann::json& model = json.at("model");
  if (model.value("type", "BPE") != "BPE") refuse("a tokenizer of type " + model["type"].dump());
  if (!json.value("normalizer", nlohmann::json()).is_null()) refuse("a tokenizer with a normalizer");
  const nlohmann::json split = json.value("pre_tokenizer", nlohmann::json());
  if (!split.is_object() || split.value("type", "") != "ByteLevel" || !split.value("use_regex", true) ||
      split.value("add_prefix_space", false))
    refuse("a tokenizer that cuts text in another way (pre_tokenizer)");
}

// The token that ends a text: "<|endoftext|>", or the one that tokenizer_config.json calls eos_token.
int32_t end_of_text(const std::string& directory, const Vocabulary& vocabulary) {
  if (const int32_t id = vocabulary.find(kEndOfText); id >= 0) return id;
  const std::string path = directory + "/tokenizer_config.json";
  if (fs::exists(path)) {
    nlohmann::json token = read_json(path).value("eos_token", nlohmann::json());
    if (token.is_object()) token = token.value("content", nlohmann::json());
    if (token.is_string()) {
      if (const int32_t id = vocabulary.find(token.get<std::string>()); id >= 0) return id;
    }
  }
  fail(directory, std::string("the tokenizer has no end-of-text token (neither ") + kEndOfText +
                      " nor eos_token in tokenizer_config.json)");
}

}  // namespace

bool has_hugging_face_tokenizer(const std::string& directory) {
  return fs::exists(directory + "/tokenizer.json") ||
         (fs::exists(directory + "/vocab.json") && fs::exists(directory + "/merges.txt"));
}

Tokenizer read_hugging_face_tokenizer(const std::string& directory, int64_t limit) {
  Vocabulary vocabulary;
  std::vector<Tokenizer::Merge> merges;
  std::string path = directory + "/vocab.json";
  try {
    if (fs::exists(path) && fs::exists(directory + "/merges.txt")) {
      const nlohmann::json vocab = read_json(path);
      for (const auto& [text, id] : vocab.items()) vocabulary.put(path, text, id, false, limit);
      path = directory + "/merges.txt";
      std::istringstream lines(read_file(path));
      for (std::string line; std::getline(lines, line);) {
        if (!line.empty() && line.back() == '\r') line.pop_back();
        if (line.empty() || line.rfind("#version", 0) == 0) continue;
        merges.push_back(merge_of(path, vocabulary, line));
      }
      path = directory + "/added_tokens.json";
      if (fs::exists(path)) {
        const nlohmann::json added = read_json(path);
        for (const auto& [text, id] : added.items()) vocabulary.put(path, text, id, true, limit);
      }
    } else {
      path = directory + "/tokenizer.json";
      const nlohmann::json json = read_json(path);
      check_kind(path, json);
      for (const auto& [text, id] : json.at("model").at("vocab").items()) vocabulary.put(path, text, id, false, limit);
      for (const nlohmann::json& token : json.value("added_tokens", nlohmann::json::array())) {
        vocabulary.put(path, token.at("content"), token.at("id"), true, limit);
      }
      for (const nlohmann::json& merge : json.at("model").at("merges")) {
        merges.push_back(merge.is_array() ? merge_of(path, vocabulary, merge.at(0), merge.at(1))
                                          : merge_of(path, vocabulary, merge.get<std::string>()));
      }
    }
  } catch (const nlohmann::json::exception& error) {
    fail(path, "not a tokenizer's file (" + problem_of(error) + ")");
  }
  try {
    return Tokenizer::with_merges(vocabulary.tokens(), merges, end_of_text(directory, vocabulary));
  } catch (const std::exception& error) {
    fail(path, error.what());
  }
}

std::map<std::string, std::string> hugging_face_tokenizer_files(const Tokenizer& tokenizer, int64_t length) {
  const std::vector<Tokenizer::Merge> merges = tokenizer.merges();
  std::array<bool, 256> there{};
  size_t longer = 0;
  std::string vocab;  // written by hand: an object that keeps its order is searched from end to end
  for (int32_t id = 0; id < tokenizer.vocabulary(); ++id) {
    if (!tokenizer.has(id)) continue;
    const std::string_view token = tokenizer.token_bytes(id);
    const bool end = id == tokenizer.end_of_text();
    if (!end && token.size() == 1) there[static_cast<unsigned char>(token[0])] = true;
    if (!end && token.size() > 1) ++longer;
    vocab += (vocab.empty() ? "{" : ", ") + nlohmann::json(end ? kEndOfText : characters_of(token)).dump() + ": " +
             std::to_string(id);
  }
  for (const bool byte : there) {
    if (!byte) return {};
  }
  if (merges.size() < longer) return {};
  std::string lines = "#version: 0.2\n";
  for (const auto& [left, right] : merges) {
    lines += characters_of(tokenizer.token_bytes(left)) + " " + characters_of(tokenizer.token_bytes(right)) + "\n";
  }
  const nlohmann::ordered_json special = {
      {"bos_token", kEndOfText}, {"eos_token", kEndOfText}, {"unk_token", kEndOfText}};
  nlohmann::ordered_json config = special;
  config["add_prefix_space"] = false;
  config["model_max_length"] = length;
  config["tokenizer_class"] = "GPT2Tokenizer";
  return {{"vocab.json", vocab + "}\n"},
          {"merges.txt", lines},
          {"tokenizer_config.json", config.dump(2) + "\n"},
          {"special_tokens_map.json", special.dump(2) + "\n"}};
}
