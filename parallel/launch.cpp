// launch.cpp: see launch.h.
#include "parallel/launch.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>

namespace {

constexpr int kMostRanks = 65536;
// Ports made from a job's name: above those of services, below those of outgoing connections.
constexpr int kFirstPort = 20000, kPorts = 10000;

using Variables = std::vector<const char*>;

std::string text_of(const Environment& environment, const Variables& names) {
  for (const char* const name : names) {
    const char* const value = environment(name);
    if (value && *value) return value;
  }
  return "";
}

std::optional<int> number_of(const Environment& environment, const char* name, int most = kMostRanks) {
  const std::string text = text_of(environment, {name});
  if (text.empty()) return std::nullopt;
  int value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0 || value > most) {
    throw LaunchError(std::string(name) + " is '" + text + "', no number from 0 to " + std::to_string(most));
  }
  return value;
}

// The names of a launcher's variables.
struct Names {
  const char *by, *rank, *size, *local_rank, *local_size;
};

constexpr Names kTorchrun = {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"};
constexpr Names kOpenMpi = {"mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                            "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"};
constexpr Names kMpich = {"mpirun (MPICH)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"};

// Nothing where neither rank nor size is there.
std::optional<Launch> read_ranks(const Environment& environment, const Names& names) {
  const std::optional<int> rank = number_of(environment, names.rank), size = number_of(environment, names.size);
  if (!rank && !size) return std::nullopt;
  if (!rank || !size) {
    throw LaunchError(std::string(rank ? names.rank : names.size) + " is set and " + (rank ? names.size : names.rank) +
                      " is not: " + names.by + " sets both; for one process alone unset it");
  }
  Launch launch;
  launch.by = names.by;
  launch.rank = *rank;
  launch.size = *size;
  launch.local_rank = number_of(environment, names.local_rank).value_or(-1);
  launch.local_size = number_of(environment, names.local_size).value_or(-1);
  const auto check_below = [&](int value, const char* name, int limit, const char* limit_name) {
    if (value >= 0 && limit >= 0 && value >= limit) {
      throw LaunchError(std::string(name) + " " + std::to_string(value) + " is not below " + limit_name + " " +
                        std::to_string(limit));
    }
  };
  check_below(launch.rank, names.rank, launch.size, names.size);
  check_below(launch.local_rank, names.local_rank, launch.local_size, names.local_size);
  if (launch.local_size > launch.size) {
    throw LaunchError(std::string(names.local_size) + " " + std::to_string(launch.local_size) + " is above " +
                      names.size + " " + std::to_string(launch.size));
  }
  return launch;
}

// A batch script and a shell of salloc have the job's variables but are no step of many tasks.
std::optional<Launch> read_slurm(const Environment& environment) {
  const std::string nodes = text_of(environment, {"SLURM_STEP_NODELIST"});
  const bool counted = !text_of(environment, {"SLURM_STEP_NUM_TASKS"}).empty();
  if (nodes.empty()) return std::nullopt;
  const Names names = {"srun", "SLURM_PROCID", counted ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS", "SLURM_LOCALID",
                       "SLURM_NTASKS_PER_NODE"};
  if (number_of(environment, names.size).value_or(1) == 1) return std::nullopt;
  std::optional<Launch> launch = read_ranks(environment, names);
  launch->local_size = -1;  // what was asked for; a last node may have fewer
  launch->address = hosts_of(nodes, 1).at(0);
  return launch;
}

uint32_t hash_of(const std::string& text) {
  uint32_t hash = 2166136261u;  // FNV-1a
  for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 16777619u;
  return hash;
}

// What only this job has in its environment.
Variables variables_of(const std::string& launcher) {
  if (launcher == kTorchrun.by) return {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"};
  if (launcher == kOpenMpi.by) return {"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"};
  if (launcher == kMpich.by) return {"PMI_JOBID", "PMI_ID_JOB", "PBS_JOBID", "LSB_JOBID"};
  return {};
}

std::string nonce_of(const Environment& environment, const Launch& launch) {
  Variables names = variables_of(launch.by);
  for (const char* const name : {"SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"}) names.push_back(name);
  std::string nonce = launch.by;
  bool known = false;
  for (const char* const name : names) {
    const std::string value = text_of(environment, {name});
    nonce += "/" + value;
    known = known || !value.empty();
  }
  // On one machine the terminal, or the service, that the job was started from.
  if (!known && launch.local_size == launch.size) nonce += "/session " + std::to_string(getsid(0));
  return nonce + "/" + std::to_string(launch.size);
}

Launch of_launch_here(const Environment& environment, const std::string& nonce) {
  std::optional<Launch> launch = read_ranks(environment, kTorchrun);
  if (!launch) throw LaunchError(std::string(kNonceVariable) + " is set without RANK and WORLD_SIZE: unset it");
  launch->by = kByDevices;
  launch->address = "127.0.0.1";
  launch->port = number_of(environment, kPortVariable).value_or(0);
  launch->nonce = nonce;
  launch->listener = number_of(environment, kListenerVariable).value_or(-1);
  return *launch;
}

}  // namespace

Launch find_launch(const Environment& environment, int rendezvous_port) {
  const std::string own = text_of(environment, {kNonceVariable});
  if (!own.empty()) return of_launch_here(environment, own);
  std::optional<Launch> launch = read_ranks(environment, kTorchrun);
  if (!launch) launch = read_ranks(environment, kOpenMpi);
  if (!launch) {
    launch = read_ranks(environment, kMpich);
    const std::optional<Launch> slurm = read_slurm(environment);
    // srun may speak MPICH's protocol, too; mpirun may start one process of its own per node by srun.
    if (!launch || (slurm && slurm->size == launch->size)) launch = slurm;
  }
  if (!launch || launch->size <= 1) return {};
  const std::string master = text_of(environment, {"MASTER_ADDR"});
  if (!master.empty()) launch->address = master;
  if (launch->address.empty() && launch->by == kTorchrun.by) {
    throw LaunchError("RANK and WORLD_SIZE are set and MASTER_ADDR is not: torchrun sets all three");
  }
  if (launch->address.empty()) {
    if (launch->local_size != launch->size) {
      throw LaunchError(
          "where rank 0 listens is not known: give every process MASTER_ADDR=<host of rank 0>, with Open "
          "MPI by mpirun -x MASTER_ADDR, with MPICH by mpirun -genv MASTER_ADDR");
    }
    launch->address = "127.0.0.1";
  }
  launch->nonce = nonce_of(environment, *launch);
  const std::optional<int> master_port = number_of(environment, "MASTER_PORT", 65534);
  launch->port = rendezvous_port > 0 ? rendezvous_port
                 : master_port       ? *master_port + 1
                                     : kFirstPort + static_cast<int>(hash_of(launch->nonce) % kPorts);
  return *launch;
}

Launch find_launch(int rendezvous_port) {
  return find_launch([](const char* name) { return std::getenv(name); }, rendezvous_port);
}

std::vector<std::string> hosts_of(const std::string& list, size_t most) {
  const LaunchError malformed("'" + list + "' is no list of hosts");
  std::vector<std::string> hosts;
  for (size_t at = 0; at < list.size() && hosts.size() < most;) {
    // One name, of which a part may stand for several: prefix[ranges]suffix.
    size_t end = at, open = std::string::npos, close = std::string::npos;
    for (; end < list.size() && (list[end] != ',' || (open != std::string::npos && close == std::string::npos));
         ++end) {
      if (list[end] == '[' && open != std::string::npos) throw malformed;
      if (list[end] == '[') open = end;
      if (list[end] == ']' && (open == std::string::npos || close != std::string::npos)) throw malformed;
      if (list[end] == ']') close = end;
    }
    if (end == at || (open != std::string::npos && close == std::string::npos)) throw malformed;
    if (open == std::string::npos) {
      hosts.push_back(list.substr(at, end - at));
    } else {
      const std::string prefix = list.substr(at, open - at), suffix = list.substr(close + 1, end - close - 1);
      for (size_t from = open + 1; from < close && hosts.size() < most;) {
        const size_t comma = std::min(list.find(',', from), close);
        const std::string range = list.substr(from, comma - from);
        const size_t dash = std::min(range.find('-'), range.size());
        const std::string first = range.substr(0, dash), last = dash < range.size() ? range.substr(dash + 1) : first;
        const auto number = [&](const std::string& digits) {
          unsigned value = 0;
          const char* const stop = digits.data() + digits.size();
          if (const auto read = std::from_chars(digits.data(), stop, value);
              digits.empty() || read.ec != std::errc() || read.ptr != stop) {
            throw malformed;
          }
          return value;
        };
        const unsigned stop = number(last);
        for (unsigned value = number(first); value <= stop && hosts.size() < most; ++value) {
          std::string digits = std::to_string(value);
          if (digits.size() < first.size()) digits.insert(0, first.size() - digits.size(), '0');
          hosts.push_back(prefix + digits + suffix);
        }
        from = comma + 1;
      }
    }
    at = end + 1;
  }
  if (hosts.empty()) throw malformed;
  return hosts;
}
