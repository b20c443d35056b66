// mapping_fault.cpp: see mapping_fault.h. A signal handler may neither allocate nor lock: the file is found by reading
// /proc/self/maps character by character.
#include "train/mapping_fault.h"

#include <fcntl.h>
#include <unistd.h>

#include <climits>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

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
