// ranks.h: the ranks of a job as processes of one test, which meet through files.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "parallel/job.h"
#include "tests/temporary_directory.h"

class FileJob final : public Job {
 public:
  FileJob(std::string folder, int rank, int size) : folder_(std::move(folder)), rank_(rank), size_(size) {}

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  void set(const std::string& key, const std::string& value) override {
    const std::string path = path_of(key);
    std::ofstream(path + ".new", std::ios::binary) << value;
    std::filesystem::rename(path + ".new", path);
  }

  std::string get(const std::string& key) override {
    for (int i = 0; i < 6000; ++i) {
      if (std::ifstream file(path_of(key), std::ios::binary); file) return {std::istreambuf_iterator(file), {}};
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    throw std::runtime_error("nobody has set " + key);
  }

 private:
  std::string path_of(std::string key) const {
    for (char& c : key) {
      if (c == '/') c = '.';
    }
    return folder_ + "/" + key;
  }

  const std::string folder_;
  const int rank_, size_;
};

// body(job) in a process for each rank; what it returns, by rank. What fails there fails here. The calling process must
// have no threads yet: backends are made in the body. Of a rank that ends by a signal nothing is expected but that
// `killed` names it.
inline std::vector<std::string> on_ranks(int size, const std::function<std::string(Job&)>& body, int killed = -1) {
  const TemporaryDirectory folder;
  std::vector<pid_t> children;
  const bool failed_before = ::testing::Test::HasFailure();
  std::fflush(nullptr);
  for (int rank = 0; rank < size; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      FileJob job(folder.path(), rank, size);
      int failed = 0;
      try {
        job.set("result-" + std::to_string(rank), body(job));
      } catch (const std::exception& error) {
        std::printf("rank %d: %s\n", rank, error.what());
        failed = 1;
      }
      std::fflush(nullptr);
      _exit(failed || (::testing::Test::HasFailure() && !failed_before));
    }
    children.push_back(child);
  }
  std::vector<std::string> results(children.size());
  for (int left = size; left > 0; --left) {
    int status = 0;
    const pid_t ended = waitpid(-1, &status, 0);
    const int rank = static_cast<int>(std::find(children.begin(), children.end(), ended) - children.begin());
    children[static_cast<size_t>(rank)] = 0;
    if (rank == killed) {
      EXPECT_TRUE(WIFSIGNALED(status));
      continue;
    }
    EXPECT_EQ(status, 0) << "rank " << rank;
    if (status != 0)
      for (const pid_t other : children)
        if (other > 0) kill(other, SIGKILL);  // they would wait for it
    if (status == 0)
      results[static_cast<size_t>(rank)] = FileJob(folder.path(), rank, size).get("result-" + std::to_string(rank));
  }
  return results;
}
