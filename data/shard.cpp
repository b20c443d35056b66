// shard.cpp: mapping a token file and judging its header. Costs one page fault per file; reading tokens is a widening
// copy out of the page cache.
#include "data/shard.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace {

struct FileDescriptor {
  int fd;
  ~FileDescriptor() {
    if (fd >= 0) ::close(fd);
  }
};

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error(path + ": " + what);
}

// What a file with an unknown first word probably is, and what to do about it.
std::string guess_kind(int32_t magic, const unsigned char* bytes, size_t size) {
  constexpr int32_t kModelMagics[] = {20240326, 20240327};
  if (magic == kTokenizerMagic)
    return "is it a tokenizer? narrow the pattern so that it matches only shards, for instance DIR/*_train_*.bin";
  for (int32_t model : kModelMagics)
    if (magic == model) return "is it an llm.c model checkpoint? --data takes token shards";
  size_t printable = 0;
  const size_t looked_at = size < 256 ? size : 256;
  for (size_t i = 0; i < looked_at; ++i) printable += (bytes[i] >= 32 && bytes[i] < 127) || bytes[i] == '\n';
  if (printable == looked_at)
    return "is it plain text? tokenize it first: .venv/bin/python data/prepare.py FILE --out DIR";
  if (size % 2 == 0) return "is it nanoGPT's headerless format? pass --data-format nanogpt";
  return "make shards with: .venv/bin/python data/prepare.py FILE --out DIR";
}

}  // namespace

Shard::Shard(const std::string& path, DataFormat format) : path_(path) {
  const FileDescriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0) fail(path, std::string("cannot open the token shard: ") + std::strerror(errno) + "; check --data");
  struct stat status = {};
  if (::fstat(file.fd, &status) != 0) fail(path, std::string("cannot stat: ") + std::strerror(errno));
  if (!S_ISREG(status.st_mode)) fail(path, "not a regular file; --data takes shards, for instance DIR/*_train_*.bin");
  mapped_bytes_ = static_cast<size_t>(status.st_size);
  if (mapped_bytes_ == 0) fail(path, "the file is empty (0 bytes); prepare or download it again");
  mapping_ = ::mmap(nullptr, mapped_bytes_, PROT_READ, MAP_SHARED, file.fd, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    fail(path, std::string("cannot map: ") + std::strerror(errno));
  }
  try {
    read_header(format);
  } catch (...) {
    unmap();
    throw;
  }
}

void Shard::read_header(DataFormat format) {
  const auto* bytes = static_cast<const unsigned char*>(mapping_);
  const auto present = static_cast<int64_t>(mapped_bytes_);
  if (format == DataFormat::kNanogpt) {
    int32_t magic = 0;
    if (present >= 4) std::memcpy(&magic, bytes, sizeof magic);
    if (magic == kShardMagic || magic == kWideShardMagic)
      fail(path_, "starts with llm.c's header, but --data-format nanogpt is for files without one; drop the flag");
    if (present % 2 != 0)
      fail(path_, "truncated: " + std::to_string(present) + " bytes are not a whole number of uint16 tokens");
    data_ = bytes;
    tokens_ = present / 2;
    vocabulary_ = kGpt2Vocabulary;
    return;
  }

  constexpr int64_t kHeaderBytes = kHeaderWords * static_cast<int64_t>(sizeof(int32_t));
  int32_t header[4] = {};
  std::memcpy(header, bytes, std::min(sizeof header, mapped_bytes_));
  const bool wide = header[0] == kWideShardMagic;
  if (!wide && header[0] != kShardMagic)
    fail(path_, "not an llm.c token shard (its first word is " + std::to_string(header[0]) + ", expected " +
                    std::to_string(kShardMagic) + "); " + guess_kind(header[0], bytes, mapped_bytes_));
  if (present < kHeaderBytes)
    fail(path_, "truncated: the header needs " + std::to_string(kHeaderBytes) + " bytes, the file has " +
                    std::to_string(present) + "; prepare or download it again");
  const int32_t version = wide ? kWideShardVersion : kShardVersion;
  if (header[1] != version)
    fail(path_, "version " + std::to_string(header[1]) + " of the shard format is unknown, expected " +
                    std::to_string(version) + "; prepare it again with data/prepare.py");
  token_bytes_ = wide ? 4 : 2;
  tokens_ = static_cast<uint32_t>(header[2]);
  if (tokens_ == 0) fail(path_, "the shard holds no tokens; prepare it again");
  const int64_t expected = kHeaderBytes + tokens_ * token_bytes_;
  if (present < expected)
    fail(path_, "truncated: " + std::to_string(tokens_) + " tokens need " + std::to_string(expected) +
                    " bytes, the file has " + std::to_string(present) + "; prepare or download it again");
  if (present > expected)
    fail(path_, "the header says " + std::to_string(tokens_) + " tokens, " + std::to_string(expected) +
                    " bytes, but the file has " + std::to_string(present) + "; prepare or download it again");
  if (header[3] < 0) fail(path_, "the vocabulary in the header is negative: " + std::to_string(header[3]));
  vocabulary_ = header[3] != 0 ? header[3] : wide ? kLlama3Vocabulary : kGpt2Vocabulary;
  data_ = bytes + kHeaderBytes;
}

Shard::~Shard() { unmap(); }

Shard::Shard(Shard&& other) noexcept { *this = std::move(other); }

Shard& Shard::operator=(Shard&& other) noexcept {
  if (this == &other) return *this;
  unmap();
  path_ = std::move(other.path_);
  mapping_ = std::exchange(other.mapping_, nullptr);
  mapped_bytes_ = other.mapped_bytes_;
  data_ = std::exchange(other.data_, nullptr);
  tokens_ = std::exchange(other.tokens_, 0);
  vocabulary_ = other.vocabulary_;
  token_bytes_ = other.token_bytes_;
  return *this;
}

void Shard::unmap() noexcept {
  if (mapping_ != nullptr) ::munmap(mapping_, mapped_bytes_);
  mapping_ = nullptr;
}

void Shard::read(std::span<int32_t> out, int64_t first) const {
  const auto count = static_cast<int64_t>(out.size());
  if (first < 0 || first + count > tokens_)
    throw std::out_of_range(path_ + ": tokens [" + std::to_string(first) + ", " + std::to_string(first + count) +
                            ") of " + std::to_string(tokens_));
  const unsigned char* from = data_ + first * token_bytes_;
  if (token_bytes_ == 4) {
    std::memcpy(out.data(), from, out.size_bytes());
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t token;
    std::memcpy(&token, from + 2 * i, sizeof token);
    out[i] = token;
  }
}
