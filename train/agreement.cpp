// agreement.cpp: see agreement.h.
#include "train/agreement.h"

#include <elf.h>
#include <link.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "train/version.h"

namespace {

// NCCL's own, with which several ranks may have one GPU.
constexpr char kShareVariable[] = "NCCL_MULTI_RANK_GPU_ENABLE";

// Of one machine, or compared by what they lead to: shards by their contents.
const std::set<std::string>& of_one_machine() {
  static const std::set<std::string> keys = {
      "data", "val_data", "threads", "peak_tflops", "devices", "rendezvous_port", "rendezvous_timeout", "comm_timeout"};
  return keys;
}

std::string cores() {
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  std::string text = host;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return text;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) text += " " + std::to_string(core);
  }
  return text;
}

}  // namespace

std::string build_id() {
  std::string id;
  const auto visit = [](dl_phdr_info* info, size_t, void* found) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& segment = info->dlpi_phdr[i];
      if (segment.p_type != PT_NOTE) continue;
      const char* const notes = reinterpret_cast<const char*>(info->dlpi_addr + segment.p_vaddr);
      for (size_t at = 0; at + sizeof(ElfW(Nhdr)) <= segment.p_memsz;) {
        const auto* const note = reinterpret_cast<const ElfW(Nhdr)*>(notes + at);
        const auto padded = [](size_t size) { return (size + 3) & ~size_t{3}; };
        const size_t name = at + sizeof *note, text = name + padded(note->n_namesz);
        if (note->n_type == NT_GNU_BUILD_ID) {
          for (size_t byte = text; byte < text + note->n_descsz; ++byte) {
            char digits[3];
            snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(notes[byte]));
            *static_cast<std::string*>(found) += digits;
          }
        }
        at = text + padded(note->n_descsz);
      }
    }
    return 1;  // the program itself is the first
  };
  dl_iterate_phdr(visit, &id);
  return id;
}

void agree_on_options(Job& job, const Options& options) {
  if (job.size() == 1) return;
  agree(job, {{"program", std::string(kVersion) + " build " + build_id(), "start the same ./train_gpt2 everywhere"}});
  std::vector<Fact> facts;
  const nlohmann::ordered_json values = options_to_json(options);
  for (const auto& [key, value] : values.items()) {
    if (of_one_machine().contains(key)) continue;
    std::string flag = "--" + key;
    std::replace(flag.begin(), flag.end(), '_', '-');
    facts.push_back({flag, value.is_string() ? value.get<std::string>() : value.dump(), ""});
  }
  agree(job, facts);
}

std::string from_rank_0(Job& job, const std::string& text) { return job.gather(job.rank() == 0 ? text : "")[0]; }

DevicePlace device_place(Job& job) {
  const std::string mine = cores();
  const std::vector<std::string> all = job.gather(mine);
  // A launcher may also let each process see its own GPU only.
  const int ordinal = job.local_rank() % std::max(1, cuda_device_count());
  return {ordinal, static_cast<int>(std::count(all.begin(), all.end(), mine))};
}

void agree_on_device(Job& job, const Backend& backend, const DevicePlace& place) {
  if (job.size() == 1) return;
  agree(job, {{"device", backend.name(), "--device says which"}});
  const bool may_share = backend.name() == "cpu" || std::getenv(kShareVariable);
  refuse_shared_device(job, may_share ? "" : cuda_device_id(place.ordinal));
}

void check_devices(const Options& options) {
  if (options.device == DeviceKind::kCpu || std::getenv(kShareVariable)) return;
  const int there = cuda_device_count();
  if (options.devices <= there || (there == 0 && options.device == DeviceKind::kAuto)) return;
  throw UsageError("--devices " + std::to_string(options.devices) + ": this machine has " + std::to_string(there) +
                   (there == 1 ? " GPU" : " GPUs") + "; --device cpu takes any number");
}
