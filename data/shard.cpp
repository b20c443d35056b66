// shard.cpp: opening a token file and judging its header; reading tokens is one system call per window and a widening
// copy.
#include "data/shard.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

namespace {

constexpr size_t kLookedAt = 256;          // bytes that tell what kind of file it is
constexpr rlim_t kOtherDescriptors = 128;  // for checkpoints, metrics and libraries

struct FileDescriptor {
  int fd;
  ~FileDescriptor() {
    if (fd >= 0) ::close(fd);
  }
};

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error(path + ": " + what);
}

// Whether a shard may stay open, or the rest of the program would be short of descriptors. The soft limit is raised as
// far as it goes.
bool may_keep(int descriptor) {
  const rlim_t needed = static_cast<rlim_t>(descriptor) + kOtherDescriptors;
  struct rlimit limit = {};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return false;
  if (needed < limit.rlim_cur) return true;
  limit.rlim_cur = limit.rlim_max;
  return ::setrlimit(RLIMIT_NOFILE, &limit) == 0 && needed < limit.rlim_cur;
}

// What a file with an unknown first word probably is, and what to do about it.
std::string guess_kind(int32_t magic, const unsigned char* bytes, size_t looked_at, int64_t size) {
  constexpr int32_t kModelMagics[] = {20240326, 20240327};
  if (magic == kTokenizerMagic)
    return "is it a tokenizer? narrow the pattern so that it matches only shards, for instance DIR/*_train_*.bin";
  if (magic == kQuestionsMagic) return "is it a file of questions? eval --hellaswag takes it";
  for (int32_t model : kModelMagics)
    if (magic == model) return "is it an llm.c model checkpoint? --data takes token shards";
  size_t printable = 0;
  for (size_t i = 0; i < looked_at; ++i) printable += (bytes[i] >= 32 && bytes[i] < 127) || bytes[i] == '\n';
  if (printable == looked_at)
    return "is it plain text? tokenize it first: .venv/bin/python data/prepare.py FILE --out DIR";
  if (size % 2 == 0) return "is it nanoGPT's headerless format? pass --data-format nanogpt";
  return "make shards with: .venv/bin/python data/prepare.py FILE --out DIR";
}

}  // namespace

Shard::Shard(const std::string& path, DataFormat format) : path_(path) {
  // Without O_NONBLOCK a named pipe would wait here for somebody to write.
  FileDescriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) fail(path, std::string("cannot open the token shard: ") + std::strerror(errno) + "; check --data");
  struct stat status = {};
  if (::fstat(file.fd, &status) != 0) fail(path, std::string("cannot stat: ") + std::strerror(errno));
  if (!S_ISREG(status.st_mode)) fail(path, "not a regular file; --data takes shards, for instance DIR/*_train_*.bin");
  bytes_ = status.st_size;
  device_ = status.st_dev;
  inode_ = status.st_ino;
  if (bytes_ == 0) fail(path, "the file is empty (0 bytes); prepare or download it again");
  read_header(format, file.fd);
  if (may_keep(file.fd)) descriptor_ = std::exchange(file.fd, -1);
}

void Shard::read_header(DataFormat format, int descriptor) {
  const int64_t present = bytes_;
  unsigned char bytes[kLookedAt] = {};
  const size_t looked_at = std::min(sizeof bytes, static_cast<size_t>(present));
  read_bytes(descriptor, bytes, looked_at, 0);
  if (format == DataFormat::kNanogpt) {
    int32_t magic = 0;
    if (present >= 4) std::memcpy(&magic, bytes, sizeof magic);
    if (magic == kShardMagic || magic == kWideShardMagic)
      fail(path_, "starts with llm.c's header, but --data-format nanogpt is for files without one; drop the flag");
    if (present % 2 != 0)
      fail(path_, "truncated: " + std::to_string(present) + " bytes are not a whole number of uint16 tokens");
    data_start_ = 0;
    tokens_ = present / 2;
    vocabulary_ = kGpt2Vocabulary;
    return;
  }

  constexpr int64_t kHeaderBytes = kHeaderWords * static_cast<int64_t>(sizeof(int32_t));
  int32_t header[4] = {};
  std::memcpy(header, bytes, std::min(sizeof header, looked_at));
  const bool wide = header[0] == kWideShardMagic;
  if (!wide && header[0] != kShardMagic)
    fail(path_, "not an llm.c token shard (its first word is " + std::to_string(header[0]) + ", expected " +
                    std::to_string(kShardMagic) + "); " + guess_kind(header[0], bytes, looked_at, present));
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
  data_start_ = kHeaderBytes;
}

Shard::~Shard() { close(); }

Shard::Shard(Shard&& other) noexcept { *this = std::move(other); }

Shard& Shard::operator=(Shard&& other) noexcept {
  if (this == &other) return *this;
  close();
  path_ = std::move(other.path_);
  descriptor_ = std::exchange(other.descriptor_, -1);
  device_ = other.device_;
  inode_ = other.inode_;
  bytes_ = other.bytes_;
  data_start_ = other.data_start_;
  tokens_ = std::exchange(other.tokens_, 0);
  vocabulary_ = other.vocabulary_;
  token_bytes_ = other.token_bytes_;
  return *this;
}

void Shard::close() noexcept {
  if (descriptor_ >= 0) ::close(descriptor_);
  descriptor_ = -1;
}

int Shard::open_again() const {
  const int descriptor = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) fail(path_, std::string("cannot be opened any more: ") + std::strerror(errno));
  struct stat status = {};
  if (::fstat(descriptor, &status) != 0 || status.st_dev != device_ || status.st_ino != inode_) {
    ::close(descriptor);
    fail(path_, "was replaced by another file while it was in use");
  }
  return descriptor;
}

void Shard::read_bytes(int descriptor, void* out, size_t bytes, int64_t offset) const {
  for (size_t done = 0; done < bytes;) {
    const ssize_t got =
        ::pread(descriptor, static_cast<char*>(out) + done, bytes - done, offset + static_cast<int64_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path_, std::string("cannot be read: ") + std::strerror(errno));
    if (got == 0)
      fail(path_, "was cut while it was in use: it had " + std::to_string(bytes_) + " bytes and now ends at " +
                      std::to_string(offset + static_cast<int64_t>(done)));
    done += static_cast<size_t>(got);
  }
}

void Shard::read(std::span<int32_t> out, int64_t first) const {
  const auto count = static_cast<int64_t>(out.size());
  if (first < 0 || first + count > tokens_)
    throw std::out_of_range(path_ + ": tokens [" + std::to_string(first) + ", " + std::to_string(first + count) +
                            ") of " + std::to_string(tokens_));
  const FileDescriptor reopened{descriptor_ < 0 ? open_again() : -1};
  // 16-bit tokens are read into the second half of `out` and widened from its front.
  const size_t bytes = out.size() * static_cast<size_t>(token_bytes_);
  char* const from = reinterpret_cast<char*>(out.data()) + (out.size_bytes() - bytes);
  read_bytes(descriptor_ < 0 ? reopened.fd : descriptor_, from, bytes, data_start_ + first * token_bytes_);
  if (token_bytes_ == 4) return;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t token;
    std::memcpy(&token, from + 2 * i, sizeof token);
    out[i] = token;
  }
}

namespace {

// A file under a temporary name, removed again unless commit() gives it its own.
class PendingFile {
 public:
  explicit PendingFile(const std::string& path) : path_(path), temporary_(path + ".tmp." + std::to_string(::getpid())) {
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd_ < 0) fail("create");
  }
  ~PendingFile() {
    if (fd_ < 0) return;
    ::close(fd_);
    ::unlink(temporary_.c_str());
  }
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;

  void write(const void* data, size_t bytes) {
    const auto* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t written = ::write(fd_, from, bytes);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("write");
      from += written;
      bytes -= static_cast<size_t>(written);
    }
  }

  void commit() {
    if (::fsync(fd_) != 0) fail("sync");
    if (std::rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename to " + path_);
    ::close(fd_);
    fd_ = -1;
  }

 private:
  [[noreturn]] void fail(const std::string& action) const {
    throw std::runtime_error(temporary_ + ": cannot " + action + ": " + std::strerror(errno));
  }

  std::string path_, temporary_;
  int fd_ = -1;
};

}  // namespace

void write_shard(const std::string& path, std::span<const uint16_t> tokens, int64_t vocabulary) {
  if (tokens.empty() || tokens.size() > std::numeric_limits<int32_t>::max())
    throw std::logic_error(path + ": a shard holds 1 to 2^31 - 1 tokens, not " + std::to_string(tokens.size()));
  const uint16_t largest = *std::max_element(tokens.begin(), tokens.end());
  if (largest >= vocabulary)
    throw std::logic_error(path + ": token " + std::to_string(largest) + " is outside the vocabulary of " +
                           std::to_string(vocabulary));
  int32_t header[kHeaderWords] = {kShardMagic, kShardVersion, static_cast<int32_t>(tokens.size()),
                                  static_cast<int32_t>(vocabulary)};
  PendingFile file(path);
  file.write(header, sizeof header);
  file.write(tokens.data(), tokens.size_bytes());
  file.commit();
}
