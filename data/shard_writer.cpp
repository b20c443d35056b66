// shard_writer.cpp: see shard_writer.h. Costs one pass over the tokens and one fsync.
#include "data/shard_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "data/shard.h"

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
