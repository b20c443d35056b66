// local_ranks.cpp: see local_ranks.h.
#include "parallel/local_ranks.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel/connection.h"
#include "parallel/launch.h"

namespace {

constexpr int kPassedOn[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1};
constexpr double kGrace = 10;  // seconds from a failure to the end of all

// In the new process. A group of its own, so that Ctrl-C comes once, from here.
[[noreturn]] void become_rank(int rank, int ranks, int port, const std::string& nonce, int listener,
                              const sigset_t& mask, pid_t launcher, char** argv) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != launcher) _exit(1);
  const auto put = [](const char* name, const std::string& value) { setenv(name, value.c_str(), 1); };
  put("RANK", std::to_string(rank));
  put("WORLD_SIZE", std::to_string(ranks));
  put("LOCAL_RANK", std::to_string(rank));
  put("LOCAL_WORLD_SIZE", std::to_string(ranks));
  put("MASTER_ADDR", "127.0.0.1");
  put("MASTER_PORT", std::to_string(port));
  put(kPortVariable, std::to_string(port));
  put(kNonceVariable, nonce);
  unsetenv(kListenerVariable);
  if (rank == 0) {
    put(kListenerVariable, std::to_string(listener));
    fcntl(listener, F_SETFD, 0);
  }
  sigprocmask(SIG_SETMASK, &mask, nullptr);
  execv("/proc/self/exe", argv);
  _exit(127);
}

class LocalRanks {
 public:
  LocalRanks(int ranks, char** argv) {
    sigemptyset(&signals_);
    for (const int signal : kPassedOn) {
      struct sigaction action {};
      sigaction(signal, nullptr, &action);
      if (signal != SIGHUP || action.sa_handler != SIG_IGN) sigaddset(&signals_, signal);
    }
    for (const int signal : {SIGCHLD, SIGTSTP, SIGCONT}) sigaddset(&signals_, signal);
    sigset_t before;
    sigprocmask(SIG_BLOCK, &signals_, &before);
    const Descriptor listener = listen_at("127.0.0.1", 0);
    const std::string nonce = random_nonce();
    const pid_t launcher = getpid();
    for (int rank = 0; rank < ranks; ++rank) {
      const pid_t child = fork();
      if (child == 0) become_rank(rank, ranks, port_of(listener), nonce, listener.number(), before, launcher, argv);
      if (child < 0) {
        const std::string why = std::strerror(errno);
        send(SIGKILL);
        throw std::runtime_error("process " + std::to_string(rank) + " of --devices " + std::to_string(ranks) +
                                 " cannot be started: " + why);
      }
      setpgid(child, child);
      running_.push_back(child);
    }
  }

  int wait() {
    while (!running_.empty()) {
      const timespec tick{0, 250000000};
      const int signal = sigtimedwait(&signals_, nullptr, &tick);
      if (signal == SIGTSTP) {
        send(SIGSTOP);
        raise(SIGSTOP);
        send(SIGCONT);
      } else if (signal > 0 && signal != SIGCHLD && signal != SIGCONT) {
        send(signal);
      }
      reap();
      if (kill_at_ != Clock::time_point() && Clock::now() > kill_at_) send(SIGKILL);
    }
    return code_;
  }

 private:
  void send(int signal) const {
    for (const pid_t child : running_) kill(child, signal);
  }

  void reap() {
    int status;
    for (pid_t child = waitpid(-1, &status, WNOHANG); child > 0; child = waitpid(-1, &status, WNOHANG)) {
      std::erase(running_, child);
      const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      if (code == 0 || code_ != 0) continue;
      code_ = code;
      kill_at_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(kGrace));
    }
  }

  sigset_t signals_;
  std::vector<pid_t> running_;
  int code_ = 0;
  Clock::time_point kill_at_;
};

}  // namespace

int run_local_ranks(int ranks, char** argv) { return LocalRanks(ranks, argv).wait(); }
