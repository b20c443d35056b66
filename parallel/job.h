// job.h: the processes of one run, the ranks, and what they tell each other beside the training: who is there, what was
// agreed on, who has gone. One TCP connection from every rank to rank 0.
#pragma once

#include <map>
#include <string>
#include <vector>

class Job {
 public:
  Job() = default;  // one process alone
  virtual ~Job() = default;

  virtual int rank() const { return 0; }
  virtual int size() const { return 1; }
  virtual int local_rank() const { return 0; }  // among the ranks on this machine
  virtual int local_size() const { return 1; }
  virtual std::string address() const { return "127.0.0.1"; }  // an IP address of this machine that the others reach

  // Everybody's text, by rank; returns once all have given theirs. Every rank calls it as often, in the same order,
  // from one thread.
  virtual std::vector<std::string> gather(const std::string& mine) { return {mine}; }

  // A store of the whole job, for what else needs to meet: Gloo's rendezvous, NCCL's unique id. A key is set once, its
  // value any bytes. get() waits until some rank has set it, and throws std::runtime_error when none has within
  // --rendezvous-timeout.
  virtual void set(const std::string& key, const std::string& value) { store_[key] = value; }
  virtual std::string get(const std::string& key);

  // What is said of this run should a rank be lost: path of the last checkpoint.
  virtual void set_last_checkpoint(const std::string& /*path*/) {}

  // The orderly end: from here on nobody is missed. Without it the other ranks end with an error.
  virtual void leave() {}

 private:
  std::map<std::string, std::string> store_;
};
