// tcp_job.cpp: see tcp_job.h.
#include "parallel/tcp_job.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "parallel/protocol.h"

namespace {

constexpr double kAliveEvery = 0.5;  // seconds between signs of life
// Rank 0 decides what is said when a rank is missing; where it cannot be heard, each rank does after a while more.
constexpr double kLonger = 5;
constexpr double kVerdictWithin = 8;  // seconds for rank 0 to say what a failure is to the others

Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace

TcpJob::TcpJob(const Launch& launch, const JobOptions& options)
    : launch_(launch), options_(options), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  const Clock::time_point deadline = after(options.rendezvous_timeout);
  connection_ = std::make_unique<Connection>(open(deadline), kLongestMessage);
  connection_->push(kHello, MessageWriter()
                                .text(kProtocol)
                                .text(launch_.nonce)
                                .number(launch_.rank)
                                .number(launch_.size)
                                .text(host_name())
                                .number(getpid())
                                .take());
  thread_ = std::thread([this] { watch(); });
  std::unique_lock lock(mutex_);
  const bool in_time = changed_.wait_until(
      lock, deadline + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(kLonger)),
      [&] { return started_ || !problem_.empty(); });
  if (started_) return;
  const std::string at = launch_.address + " port " + std::to_string(launch_.port);
  std::string problem = problem_;
  if (!in_time) {
    problem = welcome_ ? "not all ranks have come within " + seconds_text(options.rendezvous_timeout)
                       : "what answers at " + at + " is no run of this program (--rendezvous-port)";
  }
  stop_ = true;
  lock.unlock();
  const uint64_t one = 1;
  if (write(wake_.number(), &one, sizeof one) == sizeof one) thread_.join();
  server_.reset();
  throw std::runtime_error(problem);
}

Descriptor TcpJob::open(Clock::time_point deadline) {
  if (launch_.rank > 0) {
    try {
      return connect_to(launch_.address, launch_.port, deadline);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("rank 0 does not answer at " + launch_.address + " port " +
                               std::to_string(launch_.port) + " within " + seconds_text(options_.rendezvous_timeout) +
                               " (--rendezvous-timeout): " + error.what());
    }
  }
  Descriptor listener(launch_.listener);
  try {
    if (!listener.is_open()) listener = listen_at(launch_.address, launch_.port);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(error.what()) + "; rank 0 needs it: another --rendezvous-port, for all ranks");
  }
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    throw std::runtime_error(std::string("no socket: ") + std::strerror(errno));
  }
  Descriptor mine(ends[0]), servers(ends[1]);
  server_ = std::make_unique<JobServer>(std::move(listener), std::move(servers), launch_.size, launch_.nonce, options_);
  return mine;
}

TcpJob::~TcpJob() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  const uint64_t one = 1;
  if (write(wake_.number(), &one, sizeof one) != sizeof one) std::abort();
  thread_.join();
}

void TcpJob::push(uint8_t kind, const std::string& body) {
  outgoing_.emplace_back(kind, body);
  const uint64_t one = 1;
  if (write(wake_.number(), &one, sizeof one) < 0) return;  // it is awake
}

void TcpJob::watch() {
  AwakeTime time;
  double heard = time.now(), next_alive = 0;
  for (;;) {
    {
      const std::lock_guard lock(mutex_);
      if (stop_) return;
      for (const auto& [kind, body] : outgoing_) connection_->push(kind, body);
      outgoing_.clear();
    }
    if (time.now() >= next_alive) {
      connection_->push(kAlive, "");
      next_alive = time.now() + kAliveEvery;
    }
    bool open = connection_->flush();
    pollfd polled[2] = {
        {wake_.number(), POLLIN, 0},
        {connection_->descriptor(), static_cast<short>(connection_->has_output() ? POLLIN | POLLOUT : POLLIN), 0}};
    poll(polled, 2, static_cast<int>(1000 * AwakeTime::kTick));
    uint64_t count;
    if (polled[0].revents != 0 && read(wake_.number(), &count, sizeof count) < 0) continue;
    if (polled[1].revents != 0) {
      open = connection_->fill() && open;
      heard = time.now();
    }
    try {
      while (const std::optional<Message> message = connection_->next()) handle(*message);
    } catch (const std::runtime_error&) {  // not what rank 0 says
      open = false;
    }
    {
      const std::lock_guard lock(mutex_);
      if (ended_) {
        connection_.reset();  // the server waits for that
        return;
      }
    }
    if (!open) return lost(server_name_ + " is gone");
    // Rank 0's server is a thread of its own process, which has the others to tell first.
    if (launch_.rank > 0 && time.now() - heard > options_.comm_timeout) {
      return lost(server_name_ + " has not answered for " + seconds_text(options_.comm_timeout) + " (--comm-timeout)");
    }
  }
}

void TcpJob::handle(const Message& message) {
  MessageReader body(message.body);
  std::unique_lock lock(mutex_);
  switch (message.kind) {
    case kAlive: return;
    case kRefused:
      problem_ = "rank 0 at " + launch_.address + " port " + std::to_string(launch_.port) +
                 " does not let this process in: " + body.text();
      ended_ = true;
      break;
    case kWelcome: welcome_ = true; break;
    case kStart: {
      std::vector<std::string> hosts;
      for (int rank = 0; rank < launch_.size; ++rank) {
        hosts.push_back(body.text());
        const uint32_t pid = body.number();
        const std::string address = body.text();
        if (rank == launch_.rank) address_ = address;
        if (rank == 0) server_name_ = member_name(0, hosts[0], pid);
      }
      find_local_ranks(hosts);
      started_ = true;
      break;
    }
    case kGathered: {
      std::vector<std::string> texts;
      for (int rank = 0; rank < launch_.size; ++rank) texts.push_back(body.text());
      gathered_.push_back(std::move(texts));
      break;
    }
    case kValue: {
      const std::string key = body.text();
      values_[key] = body.text();
      break;
    }
    case kLost: {
      body.number();
      const std::string why = body.text();
      lock.unlock();
      return lost(why);
    }
    case kFailHeard:
      fail_heard_ = static_cast<int>(body.number());
      ended_ = true;
      break;
    case kAllLeft:
      all_left_ = true;
      ended_ = true;
      break;
    default: throw std::runtime_error("a message of no known kind");
  }
  changed_.notify_all();
}

// While the job comes together its error is the main thread's; afterwards the process ends here, whatever that does.
void TcpJob::lost(const std::string& why) {
  std::unique_lock lock(mutex_);
  ended_ = true;
  if (!started_) {
    if (problem_.empty()) problem_ = why.starts_with(" ") ? "rank 0" + why : why;
    changed_.notify_all();
    return;
  }
  options_.say(why + "; last checkpoint: " + (last_checkpoint_.empty() ? "none yet" : last_checkpoint_));
  _exit(1);
}

void TcpJob::find_local_ranks(const std::vector<std::string>& hosts) {
  int before = 0, here = 0;
  for (int rank = 0; rank < launch_.size; ++rank) {
    const bool same = hosts[rank] == hosts[launch_.rank];
    here += same;
    before += same && rank < launch_.rank;
  }
  if (launch_.local_rank < 0) launch_.local_rank = before;
  if (launch_.local_size < 0) launch_.local_size = here;
}

std::vector<std::string> TcpJob::gather(const std::string& mine) {
  std::unique_lock lock(mutex_);
  push(kGather, MessageWriter().text(mine).take());
  changed_.wait(lock, [&] { return !gathered_.empty(); });
  std::vector<std::string> texts = std::move(gathered_.front());
  gathered_.pop_front();
  return texts;
}

void TcpJob::set(const std::string& key, const std::string& value) {
  const std::lock_guard lock(mutex_);
  push(kSet, MessageWriter().text(key).text(value).take());
}

std::string TcpJob::get(const std::string& key) {
  std::unique_lock lock(mutex_);
  push(kGet, MessageWriter().text(key).take());
  if (!changed_.wait_until(lock, after(options_.rendezvous_timeout), [&] { return values_.contains(key); })) {
    throw std::runtime_error("no rank has set " + key + " within " + seconds_text(options_.rendezvous_timeout) +
                             " (--rendezvous-timeout)");
  }
  return values_[key];
}

void TcpJob::set_last_checkpoint(const std::string& path) {
  const std::lock_guard lock(mutex_);
  last_checkpoint_ = path;
}

void TcpJob::leave() {
  std::unique_lock lock(mutex_);
  if (ending_) return;
  ending_ = true;
  push(kLeave, "");
  changed_.wait(lock, [&] { return all_left_; });
}

bool TcpJob::fail(const std::string& message) {
  std::unique_lock lock(mutex_);
  if (ending_) return true;
  ending_ = true;
  push(kFail, MessageWriter().text(message).take());
  changed_.wait_until(lock, after(kVerdictWithin), [&] { return fail_heard_ >= 0; });
  return fail_heard_ != 1;
}
