// input_file.h: a regular file open for reading. Everything that a user can name is opened here, so that a directory, a
// pipe or a device where a file is expected is one line and not a program that hangs or fills the memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

class InputFile {
 public:
  // Throws std::runtime_error with the path and what is wrong: the system's message, or what the path is instead.
  explicit InputFile(const std::string& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::string& path() const { return path_; }
  int descriptor() const { return descriptor_; }
  uint64_t bytes() const { return bytes_; }  // when it was opened

  // The next bytes; fewer than asked for only at the end of the file. Throws with the path and the system's message.
  size_t read(void* data, size_t bytes);

 private:
  std::string path_;
  int descriptor_;
  uint64_t bytes_ = 0;
};

// Larger than any file that is read as a whole: configurations, tokenizers, the state of a run, tables of tensors.
inline constexpr uint64_t kLargestText = uint64_t{64} << 20;

// All of a file. Throws as InputFile does, and for one above kLargestText bytes.
std::string read_file(const std::string& path);
