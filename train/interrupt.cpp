// interrupt.cpp: see interrupt.h. What is said is composed beforehand: the thread that says it neither allocates nor
// locks.
#include "train/interrupt.h"

#include <unistd.h>
#include <csignal>
#include <ctime>

#include <atomic>
#include <climits>
#include <cstdio>
#include <cstring>
#include <thread>

namespace {

constexpr int kSignals[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1};
constexpr int64_t kRepeatMilliseconds = 100;  // the same signal within these is the same request

struct Answers {
  char first[96];
  char second[PATH_MAX + 96];
};
// Two, of which the answering thread reads the one that is not being written.
Answers answers[2];
std::atomic<int> current_answers{0};

std::atomic<int> first_signal{0};
std::atomic<int64_t> first_time[NSIG];  // of each signal, in milliseconds; 0: not yet
bool silent = false;
const char* line_start = "";  // a new line where the terminal shows ^C or half a progress line

int64_t milliseconds_now() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return 1000 * static_cast<int64_t>(now.tv_sec) + now.tv_nsec / 1000000 + 1;
}

void say(const char* text, const char* end) {
  if (silent) return;
  char line[sizeof(Answers::second) + 64];
  size_t length = 0;
  for (const char* part : {line_start, text, end}) {
    const size_t bytes = strnlen(part, sizeof line - length);
    std::memcpy(line + length, part, bytes);
    length += bytes;
  }
  if (write(STDERR_FILENO, line, length) < 0) return;  // nobody reads it: the run goes on all the same
}

std::atomic<bool> watching{false};

void answer(int signal) {
  const Answers& words = answers[current_answers];
  const bool ends = signal == SIGINT || signal == SIGTERM;
  const int64_t now = milliseconds_now();
  int64_t before = 0;
  if (first_time[signal].compare_exchange_strong(before, now)) {
    int none = 0;
    first_signal.compare_exchange_strong(none, signal);
    say(words.first, ends ? "; again to stop now\n" : "\n");
  } else if (ends && now - before > kRepeatMilliseconds) {
    say(words.second, "\n");
    _exit(128 + signal);
  }
}

// What the signal would have done had nobody taken it.
void act_by_default(int signal) {
  struct sigaction action {};
  sigaction(signal, nullptr, &action);
  if (action.sa_handler == SIG_IGN) return;
  sigset_t one;
  sigemptyset(&one);
  sigaddset(&one, signal);
  pthread_sigmask(SIG_UNBLOCK, &one, nullptr);
  raise(signal);
}

}  // namespace

void answer_interrupts_silently() { silent = true; }

void take_signals() {
  sigset_t taken;
  sigemptyset(&taken);
  for (const int signal : kSignals) {
    struct sigaction before {};
    sigaction(signal, nullptr, &before);
    if (signal != SIGHUP || before.sa_handler != SIG_IGN) sigaddset(&taken, signal);
  }
  pthread_sigmask(SIG_BLOCK, &taken, nullptr);
  std::thread([taken] {
    for (int signal = 0;;)
      if (sigwait(&taken, &signal) == 0) watching ? answer(signal) : act_by_default(signal);
  }).detach();
}

void watch_for_interrupts() {
  if (isatty(STDERR_FILENO)) line_start = "\n";
  watching = true;
}

void say_when_interrupted(uint32_t step, const std::string& last_checkpoint) {
  const int next = 1 - current_answers;
  Answers& words = answers[next];
  snprintf(words.first, sizeof words.first, "train_gpt2: finishing step %u, then a checkpoint", step);
  snprintf(words.second, sizeof words.second, "train_gpt2: stopped in step %u; last checkpoint: %s", step,
           last_checkpoint.empty() ? "none yet" : last_checkpoint.c_str());
  current_answers = next;
}

int interrupting_signal() { return first_signal; }
