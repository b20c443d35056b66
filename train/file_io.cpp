// file_io.cpp: see file_io.h.
#include "train/file_io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw std::runtime_error(path + ": " + what + ": " + std::strerror(errno));
}

uint32_t update_crc(uint32_t crc, const void* data, size_t bytes) {
  return static_cast<uint32_t>(crc32_z(crc, static_cast<const Bytef*>(data), bytes));
}

// f(data, bytes) for the whole file, piece by piece. A read that fails is an error, not the file's end.
template <typename F>
void read_pieces(const std::string& path, F&& f) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe without a writer never opens
  if (descriptor < 0) fail(path, "cannot be read");
  const std::unique_ptr<const int, void (*)(const int*)> closed(&descriptor, [](const int* open) { close(*open); });
  struct stat status {};
  if (fstat(descriptor, &status) != 0) fail(path, "cannot be read");
  if (!S_ISREG(status.st_mode)) throw std::runtime_error(path + ": is not a regular file");
  std::vector<char> buffer(static_cast<size_t>(std::clamp<off_t>(status.st_size + 1, 1, off_t{4} << 20)));
  for (;;) {
    const ssize_t count = read(descriptor, buffer.data(), buffer.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail(path, "cannot be read");
    if (count == 0) return;
    f(buffer.data(), static_cast<size_t>(count));
  }
}

}  // namespace

FileWriter::FileWriter(const std::string& path) : path_(path) {
  descriptor_ = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) fail(path, "cannot be written");
}

FileWriter::~FileWriter() {
  if (descriptor_ >= 0) close(descriptor_);
}

void FileWriter::write(const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  summary_.crc32 = update_crc(summary_.crc32, data, bytes);
  summary_.bytes += bytes;
  while (bytes > 0) {
    const ssize_t written = ::write(descriptor_, at, std::min<size_t>(bytes, size_t{1} << 30));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(path_, "cannot be written");
    at += written;
    bytes -= static_cast<size_t>(written);
  }
}

FileSummary FileWriter::finish() {
  if (fsync(descriptor_) != 0) fail(path_, "cannot be synced to disk");
  const int result = close(descriptor_);
  descriptor_ = -1;
  if (result != 0) fail(path_, "cannot be closed");
  return summary_;
}

FileSummary write_file(const std::string& path, const std::string& contents) {
  FileWriter writer(path);
  writer.write(contents.data(), contents.size());
  return writer.finish();
}

FileSummary summarize_file(const std::string& path) {
  InputFile file(path);
  FileSummary summary;
  std::vector<char> buffer(size_t{4} << 20);
  for (size_t count = buffer.size(); count == buffer.size();) {
    count = file.read(buffer.data(), buffer.size());
    summary.crc32 = update_crc(summary.crc32, buffer.data(), count);
    summary.bytes += count;
  }
  return summary;
}

uint32_t checksum(const std::string& contents) { return update_crc(0, contents.data(), contents.size()); }

void sync_directory(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) fail(path, "cannot be opened");
  const int result = fsync(descriptor);
  close(descriptor);
  if (result != 0) fail(path, "cannot be synced to disk");
}

void replace_symlink(const std::string& link, const std::string& target) {
  const std::filesystem::path path(link);
  const std::string temporary = path.parent_path() / (".tmp-" + path.filename().string());
  std::error_code ignored;
  std::filesystem::remove(temporary, ignored);
  if (symlink(target.c_str(), temporary.c_str()) != 0) fail(temporary, "cannot be created");
  if (rename(temporary.c_str(), link.c_str()) != 0) fail(link, "cannot be replaced");
}

std::string message_of(const std::exception& error) {
  const auto* const of_files = dynamic_cast<const std::filesystem::filesystem_error*>(&error);
  if (!of_files) return error.what();
  return (of_files->path1().empty() ? "" : of_files->path1().string() + ": ") + of_files->code().message();
}

namespace {

// A signal handler may neither allocate nor lock: the file is found by reading /proc/self/maps character by character.
constexpr size_t kLine = PATH_MAX + 128;  // "begin-end rights offset device inode path"

// The path of the file that is mapped at an address, in `line`; null where there is none.
const char* file_at(uintptr_t address, char (&line)[kLine]) {
  const int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  char buffer[4096];
  size_t length = 0;
  for (ssize_t got; (got = read(maps, buffer, sizeof buffer)) > 0;) {
    for (ssize_t i = 0; i < got; ++i) {
      if (buffer[i] != '\n') {
        if (length + 1 < sizeof line) line[length++] = buffer[i];
        continue;
      }
      line[length] = 0;
      length = 0;
      char* end;
      const uintptr_t first = std::strtoull(line, &end, 16);
      if (address >= first && *end == '-' && address < std::strtoull(end + 1, nullptr, 16))
        return std::strchr(line, '/');
    }
  }
  return nullptr;
}

void on_bus_error(int signal, siginfo_t* info, void*) {
  char line[kLine];
  const char* const path = file_at(reinterpret_cast<uintptr_t>(info->si_addr), line);
  if (!path) {
    std::signal(signal, SIG_DFL);  // something else: it happens again when this returns
    return;
  }
  for (const char* text : {"train_gpt2: ", path, ": was cut while it was in use, or its disk failed\n"})
    if (write(STDERR_FILENO, text, std::strlen(text)) < 0) break;
  _exit(1);
}

}  // namespace

void explain_mapping_faults() {
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGBUS, &action, nullptr);
}
