// job.cpp: a job of one process; what the ranks of one agree on.
#include "parallel/job.h"

#include <algorithm>
#include <stdexcept>

#include "parallel/connection.h"
#include "parallel/launch.h"
#include "parallel/tcp_job.h"

namespace {

// The longest part of a value that a line shows.
std::string shown(const std::string& value) {
  constexpr size_t kLongest = 120;
  return value.size() <= kLongest ? value : value.substr(0, kLongest) + "...";
}

// All ranks have come to the same end.
[[noreturn]] void end_in_agreement(Job& job, const std::string& why) {
  job.leave();
  throw LaunchError(why);
}

std::vector<Fact> read_facts(const std::string& text) {
  MessageReader reader(text);
  std::vector<Fact> facts(std::min<size_t>(reader.number(), text.size()));
  for (Fact& fact : facts) {
    fact.name = reader.text();
    fact.value = reader.text();
  }
  return facts;
}

}  // namespace

std::string Job::get(const std::string& key) {
  const auto found = store_.find(key);
  if (found == store_.end()) throw std::runtime_error("no rank has set " + key);
  return found->second;
}

std::unique_ptr<Job> join_job(const Launch& launch, const JobOptions& options) {
  if (launch.size <= 1) return std::make_unique<Job>();
  return std::make_unique<TcpJob>(launch, options);
}

void agree(Job& job, const std::vector<Fact>& facts) {
  MessageWriter mine;
  mine.number(static_cast<uint32_t>(facts.size()));
  for (const Fact& fact : facts) mine.text(fact.name).text(fact.value);
  const std::vector<std::string> all = job.gather(mine.take());
  const std::vector<Fact> first = read_facts(all[0]);
  for (size_t rank = 1; rank < all.size(); ++rank) {
    const std::string who = "rank " + std::to_string(rank);
    const std::vector<Fact> others = read_facts(all[rank]);
    for (size_t i = 0; i < std::max(first.size(), others.size()); ++i) {
      if (i >= first.size() || i >= others.size() || first[i].name != others[i].name) {
        end_in_agreement(job, who + " runs another program than rank 0");
      }
      if (first[i].value == others[i].value) continue;
      const std::string advice = i < facts.size() && !facts[i].advice.empty() ? "; " + facts[i].advice : "";
      end_in_agreement(job, who + " has another " + first[i].name + " (" + shown(others[i].value) +
                                ", rank 0: " + shown(first[i].value) + ")" + advice);
    }
  }
}

void refuse_shared_device(Job& job, const std::string& device) {
  const std::vector<std::string> all = job.gather(device);
  for (size_t rank = 0; rank < all.size(); ++rank) {
    for (size_t other = 0; other < rank && !all[rank].empty(); ++other) {
      if (all[rank] != all[other]) continue;
      end_in_agreement(job, "ranks " + std::to_string(other) + " and " + std::to_string(rank) + " have one GPU, " +
                                all[rank] + ": give each its own (LOCAL_RANK, CUDA_VISIBLE_DEVICES)");
    }
  }
}
