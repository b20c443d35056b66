// input_file.cpp: see input_file.h.
#include "data/input_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

InputFile::InputFile(const std::string& path) : path_(path) {
  // Without O_NONBLOCK, opening a pipe waits for its writer.
  descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (descriptor_ < 0) throw std::runtime_error(path + ": cannot be read: " + std::strerror(errno));
  struct stat status {};
  const bool known = fstat(descriptor_, &status) == 0;
  if (known && S_ISREG(status.st_mode)) {
    bytes_ = static_cast<uint64_t>(status.st_size);
    return;
  }
  const std::string why = !known                     ? std::strerror(errno)
                          : S_ISDIR(status.st_mode)  ? "is a directory, a file is needed"
                          : S_ISFIFO(status.st_mode) ? "is a pipe, a file is needed"
                                                     : "is a device, a file is needed";
  close(descriptor_);
  throw std::runtime_error(path + ": " + why);
}

InputFile::~InputFile() { close(descriptor_); }

size_t InputFile::read(void* data, size_t bytes) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t count =
        ::read(descriptor_, static_cast<char*>(data) + done, std::min<size_t>(bytes - done, size_t{1} << 30));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw std::runtime_error(path_ + ": cannot be read: " + std::strerror(errno));
    if (count == 0) break;
    done += static_cast<size_t>(count);
  }
  return done;
}

std::string read_file(const std::string& path) {
  InputFile file(path);
  std::string contents;
  const auto too_large = [&] {
    return std::runtime_error(path + ": is larger than " + std::to_string(kLargestText >> 20) +
                              " MiB; is it the right file?");
  };
  if (file.bytes() > kLargestText) throw too_large();
  constexpr size_t kPiece = size_t{1} << 20;  // files of /proc say that they have no bytes
  for (size_t count = kPiece; count == kPiece;) {
    const size_t before = contents.size();
    contents.resize(before + kPiece);
    count = file.read(contents.data() + before, kPiece);
    contents.resize(before + count);
    if (contents.size() > kLargestText) throw too_large();
  }
  return contents;
}
