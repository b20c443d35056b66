// ring_communicator.cpp: see ring_communicator.h. A thread of its own carries out the operations in the order in which
// they were given: every rank sends to the next one and receives from the one before, both at once, on sockets that
// never block. Nothing travels but the tensors' bytes: both ends know from the operation how many come and what for.
#include "parallel/ring_communicator.h"

#include <poll.h>
#include <signal.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "parallel/awake_time.h"
#include "parallel/connection.h"

namespace {

// Of what is to be added so much is received first. It is in the cache when it is added.
constexpr size_t kSegment = 128 << 10;

template <typename T>
void add(void* sum, const void* received, size_t bytes) {
  T* const left = static_cast<T*>(sum);
  const T* const right = static_cast<const T*>(received);
#pragma omp simd
  for (size_t i = 0; i < bytes / sizeof(T); ++i) left[i] = from_float<T>(to_float(left[i]) + to_float(right[i]));
}

// Threads begun while it lives get no signals: those are for the threads of the program.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

struct Bytes {
  size_t begin = 0, count = 0;
};

class RingCommunicator final : public Communicator {
 public:
  RingCommunicator(Job& job, const std::string& address, std::chrono::milliseconds timeout)
      : rank_(job.rank()), size_(job.size()), timeout_(timeout) {
    connect(job, address);
    const SignalsBlocked blocked;
    thread_ = std::thread([this] { run(); });
  }

  // What was given and not waited for is still done, as the other ranks count on it.
  ~RingCommunicator() override {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  Ticket all_reduce(std::span<const Tensor> tensors) override {
    const int64_t bytes = all_reduce_bytes(tensors, size_);
    const auto work = [this, list = std::vector<Tensor>(tensors.begin(), tensors.end())] {
      for (const Tensor& t : list) reduce(t);
    };
    return give(work, bytes);
  }

  Ticket all_gather(void* whole, size_t part_bytes) override {
    return give([this, whole, part_bytes] { gather(static_cast<char*>(whole), part_bytes); },
                static_cast<int64_t>(part_bytes) * (size_ - 1));
  }

  void wait(Ticket ticket) override {
    const auto start = Clock::now();
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return done_ >= ticket || error_; });
    times_.waited += seconds_since(start);
    if (done_ < ticket) std::rethrow_exception(error_);
  }

  int64_t bytes_sent() const override { return bytes_sent_; }
  CommunicationTimes times() const override {
    const std::lock_guard lock(mutex_);
    return times_;
  }

 private:
  static double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  // Each rank listens, says in the job's store where and what the one before it has to begin with, and connects to the
  // next one, whose system takes the connection before that rank does.
  void connect(Job& job, const std::string& address) {
    const Descriptor listener = listen_at(address, 0);
    const std::string token = random_nonce(), port = std::to_string(port_of(listener));
    const auto key = [](int rank) { return "ring/" + std::to_string(rank); };
    job.set(key(rank_),
            MessageWriter().text(address).number(static_cast<uint32_t>(port_of(listener))).text(token).take());
    const std::string where = job.get(key(next()));
    MessageReader reader(where);
    const std::string next_address = reader.text();
    const int next_port = static_cast<int>(reader.number());
    const std::string next_token = reader.text();
    try {
      next_ = connect_to(next_address, next_port, Clock::now() + timeout_);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("rank " + std::to_string(next()) + " cannot be reached at " + next_address + " port " +
                               std::to_string(next_port) + ": " + error.what());
    }
    send_at_once(next_);
    if (send(next_.number(), next_token.data(), next_token.size(), MSG_NOSIGNAL) !=
        static_cast<ssize_t>(next_token.size()))  // the first bytes of a connection always have room
      lose(next());
    try {
      previous_ = accept_from(listener, token, Clock::now() + timeout_);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("rank " + std::to_string(previous()) + " has not connected to this one at " + address +
                               " port " + port + ": " + error.what());
    }
  }

  int next() const { return (rank_ + 1) % size_; }
  int previous() const { return (rank_ + size_ - 1) % size_; }

  Ticket give(std::function<void()> operation, int64_t bytes) {
    bytes_sent_ += bytes;
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(operation));
    changed_.notify_all();
    return ++given_;
  }

  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return !queue_.empty() || ending_; });
      if (queue_.empty()) return;
      const std::function<void()> operation = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      std::exception_ptr error;
      const auto start = Clock::now();
      try {
        operation();
      } catch (...) {
        error = std::current_exception();
      }
      const double seconds = seconds_since(start);
      if (error) {  // nothing can be agreed on any more, which the others should know at once
        next_.reset();
        previous_.reset();
      }
      lock.lock();
      times_.busy += seconds;
      if (error) {
        error_ = error;
      } else {
        ++done_;
      }
      changed_.notify_all();
      if (error) return;
    }
  }

  // The sum of part p begins with rank p's numbers, to which the next ranks add theirs in turn.
  void reduce(const Tensor& t) {
    const auto part = [&](int index) {
      const int64_t p = (index + 2 * size_) % size_, begin = t.elements() * p / size_;
      const size_t width = dtype_size(t.dtype);
      return Bytes{static_cast<size_t>(begin) * width,
                   static_cast<size_t>(t.elements() * (p + 1) / size_ - begin) * width};
    };
    char* const memory = static_cast<char*>(t.data);
    const auto sum = t.dtype == DType::kF32 ? add<float> : add<bf16>;
    for (int i = 0; i < size_ - 1; ++i) exchange(memory, part(rank_ - i), part(rank_ - i - 1), sum);
    for (int i = 0; i < size_ - 1; ++i) exchange(memory, part(rank_ + 1 - i), part(rank_ - i), nullptr);
  }

  void gather(char* whole, size_t part_bytes) {
    const auto part = [&](int index) {
      return Bytes{static_cast<size_t>((index + size_) % size_) * part_bytes, part_bytes};
    };
    for (int i = 0; i < size_ - 1; ++i) exchange(whole, part(rank_ - i), part(rank_ - i - 1), nullptr);
  }

  // One step of a ring: some bytes go to the next rank, some come from the one before and are added, or taken as they
  // are where `sum` is null.
  void exchange(char* memory, Bytes out, Bytes in, void (*sum)(void*, const void*, size_t)) {
    size_t sent = 0, received = 0;
    AwakeTime time;
    double last_moved = time.now();
    while (sent < out.count || received < in.count) {
      pollfd sockets[] = {{sent < out.count ? next_.number() : -1, POLLOUT, 0},
                          {received < in.count ? previous_.number() : -1, POLLIN, 0}};
      if (poll(sockets, 2, static_cast<int>(1000 * AwakeTime::kTick)) <= 0) {
        if (time.now() - last_moved > static_cast<double>(timeout_.count()) / 1000)
          be_left_by(received < in.count ? previous() : next());
        continue;
      }
      if (sockets[0].revents != 0) {
        const ssize_t count = send(next_.number(), memory + out.begin + sent, out.count - sent, MSG_NOSIGNAL);
        sent += moved(count, next());
      }
      if (sockets[1].revents != 0) {
        const size_t begin = received / kSegment * kSegment;
        const size_t end = sum ? std::min(in.count, begin + kSegment) : in.count;
        char* const to = sum ? received_.data() + received % kSegment : memory + in.begin + received;
        const ssize_t count = recv(previous_.number(), to, end - received, 0);
        if (count == 0) lose(previous());
        received += moved(count, previous());
        if (sum && received == end) sum(memory + in.begin + begin, received_.data(), end - begin);
      }
      last_moved = time.now();
    }
  }

  // Bytes that send() or recv() has moved.
  static size_t moved(ssize_t count, int neighbour) {
    if (count < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) lose(neighbour);
    return static_cast<size_t>(std::max<ssize_t>(count, 0));
  }

  [[noreturn]] static void lose(int neighbour) {
    throw std::runtime_error("the connection to rank " + std::to_string(neighbour) + " was closed");
  }

  [[noreturn]] void be_left_by(int neighbour) const {
    throw std::runtime_error("rank " + std::to_string(neighbour) + " does not answer (for " +
                             std::to_string(timeout_.count() / 1000) + " s, --comm-timeout)");
  }

  const int rank_, size_;
  const std::chrono::milliseconds timeout_;
  Descriptor next_, previous_;  // two connections with two ranks, too: each goes one way
  std::vector<char> received_ = std::vector<char>(kSegment);
  int64_t bytes_sent_ = 0;

  mutable std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  Ticket given_ = 0, done_ = 0;
  std::exception_ptr error_;
  CommunicationTimes times_;
  bool ending_ = false;

  std::thread thread_;
};

}  // namespace

std::unique_ptr<Communicator> make_ring_communicator(Job& job, const std::string& address,
                                                     std::chrono::milliseconds timeout) {
  return std::make_unique<RingCommunicator>(job, address, timeout);
}
