// job.h: the processes of one run, the ranks, and what they tell each other beside the training: who is there, what was
// agreed on, who has gone. One TCP connection from every rank to rank 0.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct JobOptions {
  double rendezvous_timeout = 60;  // seconds, until all ranks are there and a key is set
  double comm_timeout = 60;        // seconds without a sign of life after which a rank is lost
  // Prints a line about a lost rank, just before the process ends.
  std::function<void(const std::string&)> say;
};

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

  // A store of the whole job, for what else needs to meet: the ring's addresses, NCCL's unique id. A key is set once,
  // its value any bytes. get() waits until some rank has set it, and throws std::runtime_error when none has within
  // --rendezvous-timeout.
  virtual void set(const std::string& key, const std::string& value) { store_[key] = value; }
  virtual std::string get(const std::string& key);

  // What is said of this run should a rank be lost: path of the last checkpoint.
  virtual void set_last_checkpoint(const std::string& /*path*/) {}

  // The orderly end: returns once every rank has called it, and from then on nobody is missed. Without it the other
  // ranks end with an error.
  virtual void leave() {}

  // This process ends with an error, which the others say, too: "rank 1 failed: <message>". Waits a second for what
  // the cause was: when another rank is gone this process ends here, with the line about that one. Returns whether
  // the message is to be printed; false when another rank prints the same one.
  virtual bool fail(const std::string& /*message*/) { return true; }

 private:
  std::map<std::string, std::string> store_;
};

struct Launch;

// Meets the other processes of the job. From here on the loss of one ends this process: one line (JobOptions::say),
// exit code 1, from a thread of its own, whatever the others do. Throws std::runtime_error where the job does not come
// together: rank 0's port is taken, ranks are missing, this process is refused.
std::unique_ptr<Job> join_job(const Launch& launch, const JobOptions& options);

// Something that must be the same on all ranks: "rank 1 has another --lr (0.001, rank 0: 0.002)".
struct Fact {
  std::string name, value;
  std::string advice;  // what to do about a difference, "": nothing to say
};

// Compares the facts over all ranks. A difference throws LaunchError (launch.h) with one line on every rank, after
// which nobody is missed.
void agree(Job& job, const std::vector<Fact>& facts);

// The opposite: throws where two ranks on one host have the same device, by an identity such as a GPU's UUID; "" is
// nobody's.
void refuse_shared_device(Job& job, const std::string& device);
