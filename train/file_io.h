// file_io.h: files that are written so that a crash or a full disk is noticed: every write is checked, checksummed and
// synced.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>

#include "data/input_file.h"

struct FileSummary {
  uint64_t bytes = 0;
  uint32_t crc32 = 0;  // zlib's
};

// A file being written from front to back. Throws std::runtime_error with the path and the system's message.
class FileWriter {
 public:
  explicit FileWriter(const std::string& path);
  ~FileWriter();
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  void write(const void* data, size_t bytes);
  FileSummary finish();  // syncs to disk and closes

 private:
  std::string path_;
  int descriptor_;
  FileSummary summary_;
};

FileSummary write_file(const std::string& path, const std::string& contents);
FileSummary summarize_file(const std::string& path);  // reads all of it
uint32_t checksum(const std::string& contents);       // FileSummary::crc32 of a file with these contents
void sync_directory(const std::string& path);

// What an exception says to users: the path and the system's message, where the library has words of its own for that.
std::string message_of(const std::exception& error);

// Gives `link` the new target in one step (a new symbolic link renamed over the old one).
void replace_symlink(const std::string& link, const std::string& target);

// A mapped file that becomes shorter, or whose disk fails, is a signal at the next look at it (SIGBUS) instead of an
// error of a call. From here on such a signal ends the program with exit code 1 and a line that names the file.
void explain_mapping_faults();
