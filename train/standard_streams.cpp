// standard_streams.cpp: see standard_streams.h.
#include "train/standard_streams.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "data/tokenizer.h"

void prepare_standard_streams() {
  // open() takes the lowest free number; what is printed to a file opened for reading is an error, as it should be.
  for (int descriptor = open("/dev/null", O_RDONLY); descriptor >= 0; descriptor = open("/dev/null", O_RDONLY)) {
    if (descriptor <= STDERR_FILENO) continue;
    close(descriptor);
    break;
  }
  std::signal(SIGXFSZ, SIG_IGN);
}

namespace {

bool reader_has_gone() {
  pollfd output{STDOUT_FILENO, POLLOUT, 0};
  return poll(&output, 1, 0) == 1 && (output.revents & (POLLERR | POLLHUP)) != 0;
}

}  // namespace

namespace {
std::string speaker;  // before a message
bool warns = true;
}  // namespace

void speak_as_rank(int rank) {
  if (rank == 0) return;
  speaker = "rank " + std::to_string(rank) + ": ";
  warns = false;
  const int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
  std::fflush(stdout);
  if (nowhere < 0 || dup2(nowhere, STDOUT_FILENO) < 0) return;
  close(nowhere);
}

void outlive_reader() { std::signal(SIGPIPE, SIG_IGN); }

void say_on_error(std::string message) {
  constexpr size_t kLongest = 560, kEnd = 200;
  if (message.size() > kLongest) {
    message = message.substr(0, kLongest - kEnd) + " ... " + message.substr(message.size() - kEnd);
  }
  std::replace_if(
      message.begin(), message.end(), [](char c) { return c == '\n' || c == '\t'; }, ' ');
  // In one piece, or lines of several ranks mix: fprintf() writes pieces of 128 bytes since glibc 2.37.
  const std::string line = "train_gpt2: " + speaker + printable(message) + "\n";
  for (size_t done = 0; done < line.size();) {
    const ssize_t written = write(STDERR_FILENO, line.data() + done, line.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    done += static_cast<size_t>(written);
  }
}

void warn(const std::string& warning) {
  if (warns && !warning.empty()) say_on_error("warning: " + warning);
}

bool output_arrived() {
  const bool failed_before = std::ferror(stdout) != 0;
  errno = 0;
  if (std::fflush(stdout) == 0 && !failed_before) return true;
  if (!reader_has_gone()) {
    say_on_error(std::string("standard output cannot be written: ") +
                 (errno != 0 ? std::strerror(errno) : "it is closed or full"));
  }
  return false;
}
