// tcp_job.h: a job of several processes, as one of them sees it: its connection to rank 0, watched by a thread, and in
// rank 0 the server.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "parallel/connection.h"
#include "parallel/job.h"
#include "parallel/job_server.h"
#include "parallel/launch.h"

class TcpJob final : public Job {
 public:
  // Returns when all ranks are there; see join_job().
  TcpJob(const Launch& launch, const JobOptions& options);
  ~TcpJob() override;

  int rank() const override { return launch_.rank; }
  int size() const override { return launch_.size; }
  int local_rank() const override { return launch_.local_rank; }
  int local_size() const override { return launch_.local_size; }

  std::string address() const override { return address_; }

  std::vector<std::string> gather(const std::string& mine) override;
  void set(const std::string& key, const std::string& value) override;
  std::string get(const std::string& key) override;
  void set_last_checkpoint(const std::string& path) override;
  void leave() override;
  bool fail(const std::string& message) override;

 private:
  Descriptor open(Clock::time_point deadline);
  void watch();
  void handle(const Message& message);
  void lost(const std::string& why);
  void find_local_ranks(const std::vector<std::string>& hosts);
  void push(uint8_t kind, const std::string& body);

  Launch launch_;
  const JobOptions options_;
  std::unique_ptr<JobServer> server_;
  Descriptor wake_;
  std::unique_ptr<Connection> connection_;  // of the watching thread, but for what is pushed

  std::mutex mutex_;
  std::condition_variable changed_;
  // All below under mutex_.
  std::deque<std::pair<uint8_t, std::string>> outgoing_;
  std::deque<std::vector<std::string>> gathered_;
  std::map<std::string, std::string> values_;
  std::string last_checkpoint_;
  std::string problem_;  // why the job did not come together
  std::string server_name_, address_;
  bool welcome_ = false, started_ = false, ending_ = false, all_left_ = false, stop_ = false, ended_ = false;
  int fail_heard_ = -1;  // 1: another rank says it
  std::thread thread_;
};
