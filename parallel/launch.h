// launch.h: which process of its job this one is, by the variables that launchers set: our own --devices, torchrun (and
// what imitates it), Open MPI, MPICH and Intel MPI, SLURM. No library of theirs is needed.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

// How the job was started is wrong: one line, exit code 2.
struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  int rank = 0, size = 1;
  int local_rank = -1, local_size = -1;  // among the ranks on this machine; -1: the job finds it out when all are there
  std::string by;                        // the launcher's name; empty: none
  std::string address;                   // where rank 0 listens
  int port = 0;
  std::string nonce;  // the same in every process of this job and in no other
  int listener = -1;  // descriptor of a socket that listens already; rank 0 of --devices
};

// The value of a variable, or null.
using Environment = std::function<const char*(const char*)>;

// One process alone where no launcher's variables are there. `rendezvous_port` (0: not given) takes the place of the
// port that is derived: one above MASTER_PORT, which torchrun keeps itself, or one made from the job's name. Throws
// LaunchError for variables that are half there, are no numbers, or contradict each other.
Launch find_launch(const Environment& environment, int rendezvous_port);
Launch find_launch(int rendezvous_port);  // of this process

// The names in a host list as SLURM writes it, "node[01-03,7],login", in order, at most `most` of them. Throws
// LaunchError for what is none.
std::vector<std::string> hosts_of(const std::string& list, size_t most);

inline constexpr char kByDevices[] = "--devices";

// The variables that launch_here() sets.
inline constexpr char kNonceVariable[] = "TRAIN_GPT2_NONCE", kPortVariable[] = "TRAIN_GPT2_PORT",
                      kListenerVariable[] = "TRAIN_GPT2_LISTENER";
