// gloo_communicator.cpp: see gloo_communicator.h. A thread of its own carries out the operations in the order in which
// they were given, by a ring over Gloo's connections: every rank sends to the next one and receives from the one
// before. Those two connections are in Gloo's synchronous mode, in which the calling thread reads and writes by itself.
// Gloo's own ring has a second thread for that, and the two wait for each other by spinning, which where every core
// computes costs a time slice for each message.
#include "parallel/gloo_communicator.h"

#include <arpa/inet.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/store.h>
#include <gloo/transport/buffer.h>
#include <gloo/transport/device.h>
#include <gloo/transport/pair.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// What travels at once. It is in the cache when it is added, and where the network's buffers hold it all ranks send at
// the same time.
constexpr size_t kSegment = 128 << 10;

template <typename T>
void add(void* sum, const void* received, size_t bytes) {
  T* const left = static_cast<T*>(sum);
  const T* const right = static_cast<const T*>(received);
#pragma omp simd
  for (size_t i = 0; i < bytes / sizeof(T); ++i) left[i] = from_float<T>(to_float(left[i]) + to_float(right[i]));
}

class JobStore final : public gloo::rendezvous::Store {
 public:
  explicit JobStore(Job& job) : job_(job) {}

  void set(const std::string& key, const std::vector<char>& data) override {
    job_.set("gloo/" + key, std::string(data.begin(), data.end()));
  }
  std::vector<char> get(const std::string& key) override {
    const std::string value = job_.get("gloo/" + key);
    return {value.begin(), value.end()};
  }
  using Store::wait;
  void wait(const std::vector<std::string>& keys) override {
    for (const std::string& key : keys) get(key);
  }
  void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds&) override { wait(keys); }

 private:
  Job& job_;
};

// Threads begun while it lives get no signals: those are for the threads of the program. Nor SIGPIPE, which a socket
// whose peer has gone raises.
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

class GlooCommunicator final : public Communicator {
 public:
  GlooCommunicator(Job& job, const std::string& address, std::chrono::milliseconds timeout)
      : rank_(job.rank()), size_(job.size()), timeout_(timeout) {
    const SignalsBlocked blocked;
    connect(job, address);
    thread_ = std::thread([this] { run(); });
  }

  // What was given and not waited for is still done, as the other ranks count on it.
  ~GlooCommunicator() override {
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
    return give([this, whole, part_bytes] { gather(whole, part_bytes); },
                static_cast<int64_t>(part_bytes) * (size_ - 1));
  }

  void wait(Ticket ticket) override {
    const auto start = std::chrono::steady_clock::now();
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
  static double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void connect(Job& job, const std::string& address) {
    // Gloo takes a name that cannot be resolved for an address of its own.
    unsigned char bytes[sizeof(in6_addr)];
    if (inet_pton(AF_INET, address.c_str(), bytes) != 1 && inet_pton(AF_INET6, address.c_str(), bytes) != 1)
      throw std::runtime_error("'" + address + "' is no IP address for this rank to be reached by");
    try {
      gloo::transport::tcp::attr attributes;
      attributes.hostname = address;
      std::shared_ptr<gloo::transport::Device> device = gloo::transport::tcp::CreateDevice(attributes);
      context_ = std::make_shared<gloo::rendezvous::Context>(rank_, size_);
      context_->setTimeout(timeout_);
      connect_full_mesh(*context_, std::make_shared<JobStore>(job), device);
      for (const int neighbour : {next(), previous()}) context_->getPair(neighbour)->setSync(true, false);
    } catch (const gloo::Exception& error) {
      throw std::runtime_error("the ranks cannot be connected by way of " + address + ": " + in_one_line(error));
    } catch (const gloo::EnforceNotMet& error) {
      throw std::runtime_error("the ranks cannot be connected by way of " + address + ": " + in_one_line(error));
    }
  }

  // Later versions of Gloo want to own the store.
  template <typename Context>
  static void connect_full_mesh(Context& context, std::shared_ptr<JobStore> store,
                                std::shared_ptr<gloo::transport::Device>& device) {
    if constexpr (requires { context.connectFullMesh(*store, device); }) {
      context.connectFullMesh(*store, device);
    } else {
      context.connectFullMesh(store, device);
    }
  }

  // Without the place in Gloo's sources that its messages begin with.
  static std::string in_one_line(const std::exception& error) {
    std::string text = error.what();
    if (text.starts_with('[') && text.find("] ") != std::string::npos) text.erase(0, text.find("] ") + 2);
    return text.substr(0, text.find('\n'));
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
      const auto start = std::chrono::steady_clock::now();
      try {
        operation();
      } catch (...) {
        error = std::current_exception();
      }
      const double seconds = seconds_since(start);
      // Nothing can be agreed on any more, which the others should know at once.
      if (error) context_->closeConnections();
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
    const Ring ring(*this, t.data, t.bytes());
    const auto sum = t.dtype == DType::kF32 ? add<float> : add<bf16>;
    for (int i = 0; i < size_ - 1; ++i) ring.exchange(part(rank_ - i), part(rank_ - i - 1), sum);
    for (int i = 0; i < size_ - 1; ++i) ring.exchange(part(rank_ + 1 - i), part(rank_ - i), nullptr);
  }

  void gather(void* whole, size_t part_bytes) {
    const auto part = [&](int index) {
      return Bytes{static_cast<size_t>((index + size_) % size_) * part_bytes, part_bytes};
    };
    const Ring ring(*this, whole, part_bytes * static_cast<size_t>(size_));
    for (int i = 0; i < size_ - 1; ++i) ring.exchange(part(rank_ - i), part(rank_ - i - 1), nullptr);
  }

  // The memory of one operation, as Gloo's buffers on the two connections.
  class Ring {
   public:
    Ring(GlooCommunicator& owner, void* memory, size_t bytes) : owner_(owner), memory_(static_cast<char*>(memory)) {
      gloo::transport::Pair& next = *owner.context_->getPair(owner.next());
      gloo::transport::Pair& previous = *owner.context_->getPair(owner.previous());
      send_to_add_ = next.createSendBuffer(kToBeAdded, memory, bytes);
      send_in_place_ = next.createSendBuffer(kInPlace, memory, bytes);
      receive_to_add_ = previous.createRecvBuffer(kToBeAdded, owner.received_.data(), kSegment);
      receive_in_place_ = previous.createRecvBuffer(kInPlace, memory, bytes);
    }

    // One step of a ring: some bytes go to the next rank, some come from the one before and are added, or taken as they
    // are where `sum` is null. Rank 0 receives before it sends: were all to send first, all would wait for room in the
    // network's buffers where these are small.
    void exchange(Bytes out, Bytes in, void (*sum)(void*, const void*, size_t)) const {
      for (size_t offset = 0; offset < std::max(out.count, in.count); offset += kSegment) {
        if (owner_.rank_ > 0) send_segment(out, offset, sum != nullptr);
        if (offset < in.count) {
          receive(sum ? *receive_to_add_ : *receive_in_place_);
          if (sum) sum(memory_ + in.begin + offset, owner_.received_.data(), std::min(kSegment, in.count - offset));
        }
        if (owner_.rank_ == 0) send_segment(out, offset, sum != nullptr);
      }
    }

   private:
    void send_segment(Bytes out, size_t offset, bool to_add) const {
      if (offset < out.count) send(out.begin + offset, std::min(kSegment, out.count - offset), to_add);
    }

    void send(size_t begin, size_t count, bool to_add) const {
      try {
        (to_add ? send_to_add_ : send_in_place_)->send(begin, count, to_add ? 0 : begin);
        (to_add ? send_to_add_ : send_in_place_)->waitSend();
      } catch (const std::exception& error) {
        owner_.fail(owner_.next(), error);
      }
    }

    void receive(gloo::transport::Buffer& buffer) const {
      try {
        buffer.waitRecv();
      } catch (const std::exception& error) {
        owner_.fail(owner_.previous(), error);
      }
    }

    GlooCommunicator& owner_;
    char* const memory_;
    // With two ranks all four are of one connection, where the end of one is the end of its slot.
    std::unique_ptr<gloo::transport::Buffer> send_to_add_, send_in_place_, receive_to_add_, receive_in_place_;
  };

  // Gloo names sockets; a user knows ranks. Those that are no neighbours may have gone, too.
  [[noreturn]] void fail(int neighbour, const std::exception& error) {
    if (std::string(error.what()).find("imeout") != std::string::npos)
      throw std::runtime_error("rank " + std::to_string(neighbour) + " does not answer (for " +
                               std::to_string(timeout_.count() / 1000) + " s, --comm-timeout)");
    std::string lost;
    for (int rank = 0; rank < size_; ++rank) {
      if (rank == neighbour || (rank != rank_ && rank != next() && rank != previous() && is_closed(rank)))
        lost += (lost.empty() ? "" : " and ") + ("rank " + std::to_string(rank));
    }
    throw std::runtime_error("the connection to " + lost + " was closed");
  }

  // A message on a slot of which nothing is expected: where the connection has failed, Gloo throws.
  bool is_closed(int rank) {
    try {
      char nothing = 0;
      const auto buffer = context_->createUnboundBuffer(&nothing, 1);
      buffer->send(rank, ~uint64_t{0}, 0, 0);
      return false;
    } catch (const std::exception&) {
      return true;
    }
  }

  const int rank_, size_;
  const std::chrono::milliseconds timeout_;
  // What a message is for.
  enum Slot { kToBeAdded, kInPlace };

  std::shared_ptr<gloo::rendezvous::Context> context_;
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

std::string gloo_unavailable() { return ""; }

std::unique_ptr<Communicator> make_gloo_communicator(Job& job, const std::string& address,
                                                     std::chrono::milliseconds timeout) {
  return std::make_unique<GlooCommunicator>(job, address, timeout);
}
