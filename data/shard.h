// shard.h: one file of token ids. Nothing is read before it is asked for, and the page cache is the only buffer. It is
// read, not mapped: a file that is cut while it is used ends a read with an error, a mapping with a signal.
// Formats: docs/data.md.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

// How the bytes of a .bin file are to be understood.
enum class DataFormat {
  kLlmc,     // 256 int32 header, then uint16 (magic 20240520, version 1) or uint32 (magic 20240801, version 7) tokens
  kNanogpt,  // no header, uint16 tokens; the vocabulary is taken to be GPT-2's
};
inline constexpr std::pair<DataFormat, const char*> kDataFormatNames[] = {{DataFormat::kLlmc, "auto"},
                                                                          {DataFormat::kNanogpt, "nanogpt"}};

inline constexpr int32_t kShardMagic = 20240520, kShardVersion = 1;
inline constexpr int32_t kWideShardMagic = 20240801, kWideShardVersion = 7;  // uint32 tokens
inline constexpr int32_t kTokenizerMagic = 20240328;
inline constexpr int32_t kQuestionsMagic = 20240522;  // multiple_choice.h
inline constexpr int64_t kHeaderWords = 256;          // int32 words before the tokens; 1,024 bytes
inline constexpr int64_t kGpt2Vocabulary = 50257;
inline constexpr int64_t kLlama3Vocabulary = 128256;

class Shard {
 public:
  // Opens the file and checks its header against its size. Throws std::runtime_error, one line naming the file and the
  // remedy, when it is missing, empty, truncated, or of another kind or version.
  explicit Shard(const std::string& path, DataFormat format = DataFormat::kLlmc);
  ~Shard();
  Shard(Shard&& other) noexcept;
  Shard& operator=(Shard&& other) noexcept;
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;

  const std::string& path() const { return path_; }
  int64_t tokens() const { return tokens_; }  // number of tokens in the file
  // Ids are below this: header[3], or, where that is 0, GPT-2's 50257 (uint16 tokens) or Llama 3's 128256 (uint32).
  int64_t vocabulary() const { return vocabulary_; }

  // out = the tokens at positions [first, first + out.size()). A uint32 id that does not fit int32 comes out negative.
  // Throws std::out_of_range when the range leaves the shard, std::runtime_error naming the file when it cannot be
  // read: the disk fails, or the file was cut or (without a descriptor) replaced since it was opened.
  void read(std::span<int32_t> out, int64_t first) const;

 private:
  void read_header(DataFormat format, int descriptor);
  void read_bytes(int descriptor, void* out, size_t bytes, int64_t offset) const;
  int open_again() const;
  void close() noexcept;

  std::string path_;
  int descriptor_ = -1;  // kept while the process may have more of them; else the file is opened for each read
  dev_t device_ = 0;     // which file it is, by device and inode
  ino_t inode_ = 0;
  int64_t bytes_ = 0;       // of the file
  int64_t data_start_ = 0;  // offset of the first token
  int64_t tokens_ = 0;
  int64_t vocabulary_ = 0;
  int64_t token_bytes_ = 2;
};

// Writes header and tokens to a temporary file beside `path`, syncs it, and renames it. `vocabulary` goes to header[3].
// Throws std::runtime_error naming the file when it cannot be written (the temporary file is removed), and
// std::logic_error when there are no tokens, too many for the header, or one of them is not below the vocabulary.
void write_shard(const std::string& path, std::span<const uint16_t> tokens, int64_t vocabulary);
