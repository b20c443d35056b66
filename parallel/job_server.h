// job_server.h: rank 0's half of a job's control connection: it lets the ranks in, passes on what they tell each other,
// and says to all when one is lost. One thread.
#pragma once

#include <list>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "parallel/awake_time.h"
#include "parallel/connection.h"
#include "parallel/job.h"

class JobServer {
 public:
  // Serves at `listener` until everybody has left or the job has ended. `own` is the other end of rank 0's own
  // connection.
  JobServer(Descriptor listener, Descriptor own, int size, std::string nonce, const JobOptions& options);
  ~JobServer();
  JobServer(const JobServer&) = delete;
  JobServer& operator=(const JobServer&) = delete;

 private:
  struct Member {
    Connection connection;
    double heard = 0;                          // awake seconds
    int rank = -1;                             // before its hello
    std::string address = {}, served_at = {};  // IP addresses of its end and of this one
    std::string host = {};
    uint32_t pid = 0;
    bool refused = false, left = false, failed = false;
    std::string failure = {};
    size_t gathers = 0;                   // how many texts it has given
    std::vector<std::string> waits = {};  // keys that it waits for
  };

  void serve();
  bool serve_member(Member& member);
  void accept_strangers();
  size_t strangers() const;  // connections that have not said who they are
  size_t most_strangers() const;
  void handle(Member& member, const Message& message);
  void greet(Member& member, const Message& message);
  void gather(Member& member, std::string text);
  void answer_waiting(Member& member);
  void look_at_the_time();
  void start();
  std::string missing_ranks() const;
  Member* member_of(int rank);
  bool everybody_left();
  void tell_all(uint8_t kind, const std::string& body);
  // Why the job ends is said to all, to this process last: what it does then ends this thread, too.
  void end_job(uint32_t lost, const std::string& why);
  void end_with_failure();
  void last_words();

  Descriptor listener_, stop_;
  const int size_, port_;
  const std::string nonce_;
  const JobOptions options_;
  std::list<Member> members_;  // this process's own first; those that have yet to say hello, too
  std::map<size_t, std::vector<std::string>> gathers_;  // unfinished ones, by their number
  std::map<std::string, std::string> store_;
  AwakeTime time_;
  double next_alive_ = 0, accept_again_ = 0;  // awake seconds
  double verdict_ = 0;                        // when a failure is told to all; 0: there is none
  int first_failed_ = -1;
  std::string first_failure_;
  bool started_ = false, ended_ = false;
  std::thread thread_;
};
