// job_server.cpp: see job_server.h.
#include "parallel/job_server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>

#include "parallel/protocol.h"

namespace {

constexpr double kAliveEvery = 0.5;    // seconds between signs of life
constexpr double kHelloWithin = 10;    // seconds
constexpr size_t kMostStrangers = 64;  // connections without a hello
// A failure that is another rank's loss (its connections broke) is told from one of its own by waiting this long.
constexpr double kVerdictAfter = 1;
constexpr double kLastWords = 2;  // seconds for everybody to hear how the job ended

}  // namespace

JobServer::JobServer(Descriptor listener, Descriptor own, int size, std::string nonce, const JobOptions& options)
    : listener_(std::move(listener)),
      stop_(eventfd(0, EFD_CLOEXEC)),
      size_(size),
      port_(port_of(listener_)),
      nonce_(std::move(nonce)),
      options_(options) {
  fcntl(listener_.number(), F_SETFL, O_NONBLOCK);  // --devices hands over one that waits
  members_.push_back({Connection(std::move(own), kLongestHello)});
  thread_ = std::thread([this] { serve(); });
}

JobServer::~JobServer() {
  const uint64_t one = 1;
  if (write(stop_.number(), &one, sizeof one) == sizeof one) thread_.join();
}

void JobServer::serve() {
  std::vector<pollfd> polled;
  while (!ended_) {
    const bool accepting = time_.now() >= accept_again_ && strangers() < most_strangers();
    polled.assign({{stop_.number(), POLLIN, 0}, {accepting ? listener_.number() : -1, POLLIN, 0}});
    for (const Member& member : members_) {
      const int wanted = member.connection.has_output() ? POLLIN | POLLOUT : POLLIN;
      polled.push_back({member.connection.descriptor(), static_cast<short>(wanted), 0});
    }
    poll(polled.data(), polled.size(), static_cast<int>(1000 * AwakeTime::kTick));
    if (polled[0].revents != 0) return;
    auto member = members_.begin();
    for (size_t i = 2; i < polled.size() && !ended_; ++i) {
      const bool alive = polled[i].revents == 0 || serve_member(*member);
      if (ended_) break;
      if (alive) {
        ++member;
        continue;
      }
      const Member gone = std::move(*member);
      member = members_.erase(member);
      if (gone.rank >= 0 && !gone.left && !gone.failed) {
        end_job(gone.rank, member_name(gone.rank, gone.host, gone.pid) + " is gone");
      }
    }
    if (ended_) break;
    if (polled[1].revents != 0) accept_strangers();
    look_at_the_time();
    if (!ended_ && everybody_left()) {
      tell_all(kAllLeft, "");
      last_words();
    }
    for (Member& one : members_) one.connection.flush();
  }
}

// False when the connection is to be closed.
bool JobServer::serve_member(Member& member) {
  const bool open = member.connection.fill();
  try {
    while (std::optional<Message> message = member.connection.next()) {
      handle(member, *message);
      if (ended_) return true;
    }
  } catch (const std::runtime_error&) {  // a message of no known form
    return false;
  }
  return member.connection.flush() && open;
}

size_t JobServer::strangers() const {
  return static_cast<size_t>(
      std::count_if(members_.begin(), members_.end(), [](const Member& member) { return member.rank < 0; }));
}

size_t JobServer::most_strangers() const { return kMostStrangers + static_cast<size_t>(size_); }

void JobServer::accept_strangers() {
  // Who comes when there are many waits in the queue: it may be one of the ranks.
  while (strangers() < most_strangers()) {
    Descriptor socket(accept4(listener_.number(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket.is_open()) {
      // Without descriptors the next one stays in the queue.
      if (errno != EAGAIN && errno != EWOULDBLOCK) accept_again_ = time_.now() + AwakeTime::kTick;
      return;
    }
    const std::string address = peer_address(socket), served_at = own_address(socket);
    members_.push_back({Connection(std::move(socket), kLongestHello), time_.now(), -1, address, served_at});
  }
}

void JobServer::handle(Member& member, const Message& message) {
  if (member.refused) return;
  if (member.rank < 0) {
    if (message.kind != kHello) throw std::runtime_error("no hello");
    return greet(member, message);
  }
  member.heard = time_.now();
  MessageReader body(message.body);
  switch (message.kind) {
    case kAlive: break;
    case kGather: gather(member, body.text()); break;
    case kSet: {
      const std::string key = body.text();
      store_.emplace(key, body.text());
      for (Member& one : members_) answer_waiting(one);
      break;
    }
    case kGet:
      member.waits.push_back(body.text());
      answer_waiting(member);
      break;
    case kFail:
      member.failed = true;
      member.failure = body.text();
      if (first_failed_ < 0) {
        first_failed_ = member.rank;
        first_failure_ = member.failure;
        verdict_ = time_.now() + kVerdictAfter;
      }
      break;
    case kLeave: member.left = true; break;
    default: throw std::runtime_error("a message of no known kind");
  }
  body.end();
}

void JobServer::greet(Member& member, const Message& message) {
  const auto refuse = [&](const std::string& why) {
    member.refused = true;
    member.connection.push(kRefused, MessageWriter().text(why).take());
    member.connection.flush();
    member.connection.end_output();
  };
  MessageReader body(message.body);
  if (body.text() != kProtocol) return refuse("it is another version of this program");
  const std::string nonce = body.text();
  const uint32_t rank = body.number(), size = body.number();
  member.host = body.text();
  member.pid = body.number();
  body.end();
  if (nonce != nonce_) return refuse("it is another job's");
  if (size != static_cast<uint32_t>(size_)) {
    return refuse("it has " + std::to_string(size_) + " ranks, not " + std::to_string(size));
  }
  if (rank >= size) throw std::runtime_error("no such rank");
  if (const Member* const other = member_of(static_cast<int>(rank))) {
    return refuse("it has " + member_name(rank, other->host, other->pid) + " already");
  }
  member.rank = static_cast<int>(rank);
  member.heard = time_.now();
  member.connection.allow(kLongestMessage);
  member.connection.push(kWelcome, "");
  for (int one = 0; one < size_; ++one) {
    if (!member_of(one)) return;
  }
  start();
}

// Processes on this machine came by the loopback interface, where those of other machines do not find them.
void JobServer::start() {
  std::string here = "127.0.0.1";
  for (const Member& member : members_) {
    if (member.rank > 0 && !is_loopback(member.served_at)) here = member.served_at;
  }
  MessageWriter ranks;
  for (int rank = 0; rank < size_; ++rank) {
    const Member& member = *member_of(rank);
    const bool local = rank == 0 || is_loopback(member.address);
    ranks.text(member.host).number(member.pid).text(local ? here : member.address);
  }
  started_ = true;
  tell_all(kStart, ranks.take());
}

void JobServer::gather(Member& member, std::string text) {
  const size_t number = member.gathers++;
  std::vector<std::string>& texts = gathers_[number];
  texts.resize(size_);
  texts[member.rank] = std::move(text);
  for (const Member& one : members_) {
    if (one.rank >= 0 && one.gathers <= number) return;
  }
  MessageWriter all;
  for (const std::string& one : texts) all.text(one);
  gathers_.erase(number);
  tell_all(kGathered, all.take());
}

void JobServer::answer_waiting(Member& member) {
  std::erase_if(member.waits, [&](const std::string& key) {
    const auto found = store_.find(key);
    if (found == store_.end()) return false;
    member.connection.push(kValue, MessageWriter().text(key).text(found->second).take());
    return true;
  });
}

void JobServer::look_at_the_time() {
  const double now = time_.now();
  if (verdict_ > 0 && now >= verdict_) return end_with_failure();
  if (!started_ && now > options_.rendezvous_timeout) {
    return end_job(kNobody, missing_ranks() + " not come within " + seconds_text(options_.rendezvous_timeout) +
                                " (--rendezvous-timeout); rank 0 waits at port " + std::to_string(port_));
  }
  members_.remove_if([&](const Member& member) { return member.rank < 0 && now - member.heard > kHelloWithin; });
  for (const Member& member : members_) {
    if (member.left || member.failed || now - member.heard <= options_.comm_timeout) continue;
    return end_job(member.rank, member_name(member.rank, member.host, member.pid) + " has not answered for " +
                                    seconds_text(options_.comm_timeout) + " (--comm-timeout)");
  }
  if (now < next_alive_) return;
  next_alive_ = now + kAliveEvery;
  tell_all(kAlive, "");
}

std::string JobServer::missing_ranks() const {
  constexpr int kMostNamed = 16;
  std::vector<bool> here(size_);
  for (const Member& member : members_) {
    if (member.rank >= 0) here[member.rank] = true;
  }
  std::string named;
  int missing = 0;
  for (int rank = 0; rank < size_; ++rank) {
    if (!here[rank] && ++missing <= kMostNamed) named += (missing > 1 ? ", " : "") + std::to_string(rank);
  }
  if (missing > kMostNamed) named += " and " + std::to_string(missing - kMostNamed) + " more";
  return (missing == 1 ? "rank " : "ranks ") + named + " of " + std::to_string(size_) +
         (missing == 1 ? " has" : " have");
}

JobServer::Member* JobServer::member_of(int rank) {
  const auto found =
      std::find_if(members_.begin(), members_.end(), [&](const Member& member) { return member.rank == rank; });
  return found == members_.end() ? nullptr : &*found;
}

bool JobServer::everybody_left() {
  if (!started_ || first_failed_ >= 0) return false;
  for (int rank = 0; rank < size_; ++rank) {
    const Member* const member = member_of(rank);
    if (member && !member->left) return false;  // whose connection has ended had left
  }
  return true;
}

void JobServer::tell_all(uint8_t kind, const std::string& body) {
  for (Member& member : members_) {
    if (member.rank >= 0) member.connection.push(kind, body);
  }
}

void JobServer::end_job(uint32_t lost, const std::string& why) {
  tell_all(kLost, MessageWriter().number(lost).text(why).take());
  // It may be stopped: it will find the connection closed.
  members_.remove_if(
      [&](const Member& member) { return member.rank > 0 && member.rank == static_cast<int64_t>(lost); });
  last_words();
}

void JobServer::end_with_failure() {
  const std::string body = MessageWriter()
                               .number(first_failed_)
                               .text("rank " + std::to_string(first_failed_) + " failed: " + first_failure_)
                               .take();
  for (Member& member : members_) {
    if (member.rank < 0) continue;
    const bool same = member.failed && member.failure == first_failure_ && member.rank != first_failed_;
    if (member.failed) member.connection.push(kFailHeard, MessageWriter().number(same).take());
    if (!member.failed) member.connection.push(kLost, body);
  }
  last_words();
}

void JobServer::last_words() {
  ended_ = true;
  const double until = time_.now() + kLastWords;
  const auto is_own = [](const Member& member) { return member.rank == 0; };
  members_.remove_if([](const Member& member) { return member.rank < 0; });
  for (;;) {
    std::vector<pollfd> polled;
    for (auto member = members_.begin(); member != members_.end();) {
      if (is_own(*member)) {
        ++member;
        continue;
      }
      const bool open = member->connection.flush() && member->connection.fill();
      while (open) {
        try {
          if (!member->connection.next()) break;  // nothing matters any more
        } catch (const std::runtime_error&) {
          break;
        }
      }
      if (!open) {
        member = members_.erase(member);
        continue;
      }
      polled.push_back({member->connection.descriptor(),
                        static_cast<short>(member->connection.has_output() ? POLLIN | POLLOUT : POLLIN), 0});
      ++member;
    }
    if (polled.empty() || time_.now() >= until) break;
    poll(polled.data(), polled.size(), static_cast<int>(1000 * AwakeTime::kTick));
  }
  // A local socket takes these few bytes at once.
  for (Member& member : members_) member.connection.flush();
}
