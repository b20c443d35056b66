// system_text.cpp: see system_text.h.
#include "data/system_text.h"

#include <glob.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <span>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "data/shard.h"
#include "data/unicode_classes.h"

namespace fs = std::filesystem;

namespace {

constexpr uint16_t kEndOfText = 256;
constexpr int64_t kByteVocabulary = 257;

struct Document {
  uint64_t hash;
  std::string text;
};

// 64-bit FNV-1a.
uint64_t hash_text(std::string_view text) {
  uint64_t hash = 0xCBF29CE484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3;
  return hash;
}

bool wanted(const SystemTextSource& source, const fs::path& path) {
  if (!source.file_name.empty() && path.filename() != source.file_name) return false;
  const auto& extensions = source.extensions;
  return extensions.empty() || std::find(extensions.begin(), extensions.end(), path.extension()) != extensions.end();
}

// The regular files of a source, in the order of the hash of their path: a mixture of all its directories.
std::vector<fs::path> list_files(const SystemTextSource& source) {
  std::vector<std::pair<uint64_t, fs::path>> found;
  glob_t roots = {};
  if (::glob(source.roots.c_str(), 0, nullptr, &roots) == 0) {
    for (size_t i = 0; i < roots.gl_pathc; ++i) {
      const fs::path root = roots.gl_pathv[i];
      std::error_code error;
      if (i > 0 && fs::is_symlink(root, error)) continue;  // of /usr/lib/python3*, another name for a directory listed
      auto entry = fs::recursive_directory_iterator(root, fs::directory_options::skip_permission_denied, error);
      for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
        std::error_code ignored;
        if (entry->is_symlink(ignored) || !entry->is_regular_file(ignored) || !wanted(source, entry->path())) continue;
        found.emplace_back(hash_text(entry->path().string()), entry->path());
      }
    }
  }
  ::globfree(&roots);
  std::sort(found.begin(), found.end());
  std::vector<fs::path> files;
  for (auto& [hash, path] : found) files.push_back(std::move(path));
  return files;
}

bool is_text(std::string_view text) { return is_utf8(text) && text.find('\0') == text.npos; }

// Remembers the lines of the documents kept so far.
class SeenLines {
 public:
  // True, and the lines are remembered, unless more than half of the document's letters are in lines known from others.
  // Lines are compared by their letters alone: the same licence with another name, year or indentation is known.
  bool add_if_new(std::string_view text) {
    std::vector<uint64_t> lines;
    size_t letters = 0, known = 0;
    std::string line;
    for (size_t start = 0; start < text.size();) {
      const size_t end = std::min(text.find('\n', start), text.size());
      line.clear();
      for (const char c : text.substr(start, end - start))
        if (character_class(static_cast<unsigned char>(c)) == CharacterClass::kLetter) line += c | 0x20;
      start = end + 1;
      constexpr size_t kShortLine = 12;  // "return true;" says nothing about the document it is in
      if (line.size() < kShortLine) continue;
      lines.push_back(hash_text(line));
      letters += line.size();
      if (seen_.contains(lines.back())) known += line.size();
    }
    if (2 * known > letters || letters == 0) return false;
    seen_.insert(lines.begin(), lines.end());
    return true;
  }

 private:
  std::unordered_set<uint64_t> seen_;
};

// One source's files and how far they have been read.
class SourceReader {
 public:
  explicit SourceReader(const SystemTextSource& source) : files_(list_files(source)) {}

  bool exhausted() const { return next_ == files_.size(); }

  // Appends documents until `quota` bytes are reached or the files run out; returns the bytes appended.
  int64_t read(std::vector<Document>& documents, SeenLines& seen, int64_t quota, int64_t max_document_bytes) {
    int64_t bytes = 0;
    while (bytes < quota && !exhausted()) {
      const std::optional<std::string> text = load(files_[next_++], max_document_bytes);
      if (!text || !is_text(*text) || !seen.add_if_new(*text)) continue;
      bytes += static_cast<int64_t>(text->size());
      documents.push_back({hash_text(*text), *text});
    }
    return bytes;
  }

 private:
  // Nothing for a file that cannot be read, or is too long or too short to be worth reading.
  static std::optional<std::string> load(const fs::path& path, int64_t max_bytes) {
    constexpr uintmax_t kMinBytes = 64;
    std::error_code error;
    const uintmax_t size = fs::file_size(path, error);
    if (error || size < kMinBytes || size > static_cast<uintmax_t>(max_bytes)) return std::nullopt;
    std::ifstream file(path, std::ios::binary);
    if (!file) return std::nullopt;
    return std::string(std::istreambuf_iterator<char>(file), {});
  }

  std::vector<fs::path> files_;
  size_t next_ = 0;
};

// Gives each source an equal share of what is left to collect, until nothing is, or all sources have run out.
std::vector<Document> collect(const std::vector<SystemTextSource>& sources, const SystemTextOptions& options) {
  std::vector<SourceReader> readers;
  for (const SystemTextSource& source : sources) readers.emplace_back(source);
  std::vector<Document> documents;
  SeenLines seen;
  int64_t left = options.max_bytes;
  while (left > 0) {
    const auto active = std::count_if(readers.begin(), readers.end(), [](const auto& r) { return !r.exhausted(); });
    if (active == 0) break;
    const int64_t share = std::max<int64_t>(left / active, 1);
    for (SourceReader& reader : readers)
      if (left > 0) left -= reader.read(documents, seen, std::min(share, left), options.max_document_bytes);
  }
  return documents;
}

std::vector<uint16_t> tokenize(std::span<const Document> documents) {
  std::vector<uint16_t> tokens;
  for (const Document& document : documents) {
    tokens.push_back(kEndOfText);
    for (const char c : document.text) tokens.push_back(static_cast<unsigned char>(c));
  }
  return tokens;
}

bool is_byte_shard(const std::string& path) {
  if (!fs::exists(path)) return false;
  try {
    return Shard(path).vocabulary() == kByteVocabulary;
  } catch (const std::runtime_error&) {
    return false;  // damaged: made again
  }
}

}  // namespace

std::vector<SystemTextSource> default_text_sources() {
  return {
      {.roots = "/usr/share/common-licenses", .extensions = {}, .file_name = ""},
      {.roots = "/usr/share/doc", .extensions = {}, .file_name = "copyright"},
      {.roots = "/usr/share/doc", .extensions = {".txt", ".md", ".rst"}, .file_name = ""},
      {.roots = "/usr/include", .extensions = {".h", ".hpp", ".hh"}, .file_name = ""},
      {.roots = "/usr/lib/python3*", .extensions = {".py"}, .file_name = ""},
      {.roots = "/usr/local/lib/python3*", .extensions = {".py"}, .file_name = ""},
      {.roots = "/usr/share/perl*", .extensions = {".pm", ".pl", ".pod"}, .file_name = ""},
  };
}

SystemTextPaths make_system_text(const std::string& directory, const SystemTextOptions& options) {
  SystemTextPaths paths = {.train = directory + "/system_text_train_000000.bin",
                           .validation = directory + "/system_text_val_000000.bin"};
  if (is_byte_shard(paths.train) && is_byte_shard(paths.validation)) return paths;

  const auto& sources = options.sources.empty() ? default_text_sources() : options.sources;
  std::vector<Document> documents = collect(sources, options);
  int64_t bytes = 0;
  for (const Document& document : documents) bytes += static_cast<int64_t>(document.text.size());
  if (bytes < options.min_bytes || documents.size() < 2) {
    std::string places;
    for (const SystemTextSource& source : sources)
      if (places.find(source.roots) == std::string::npos) places += (places.empty() ? "" : ", ") + source.roots;
    throw std::runtime_error("found only " + std::to_string(bytes) + " bytes of text on this machine (" +
                             std::to_string(options.min_bytes) + " needed; looked in " + places +
                             "); make shards with '.venv/bin/python data/prepare.py FILE --out DIR' and pass "
                             "--data 'DIR/*_train_*.bin'");
  }

  // The documents with the smallest hashes are held out: a sample that no order of files can bias.
  std::sort(documents.begin(), documents.end(),
            [](const Document& a, const Document& b) { return std::tie(a.hash, a.text) < std::tie(b.hash, b.text); });
  size_t held_out = 0;
  for (int64_t held_bytes = 0; held_out + 1 < documents.size(); ++held_out) {
    if (static_cast<double>(held_bytes) >= options.validation_fraction * static_cast<double>(bytes)) break;
    held_bytes += static_cast<int64_t>(documents[held_out].text.size());
  }
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) throw std::runtime_error(directory + ": cannot make the directory: " + error.message());
  const std::span<const Document> all(documents);
  write_shard(paths.validation, tokenize(all.first(held_out)), kByteVocabulary);
  write_shard(paths.train, tokenize(all.subspan(held_out)), kByteVocabulary);
  paths.created = true;
  return paths;
}
