// job.cpp: a job of one process.
#include "parallel/job.h"

#include <stdexcept>

std::string Job::get(const std::string& key) {
  const auto found = store_.find(key);
  if (found == store_.end()) throw std::runtime_error("no rank has set " + key);
  return found->second;
}
