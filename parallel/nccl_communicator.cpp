// nccl_communicator.cpp: see nccl_communicator.h. NCCL is used without blocking: each call is followed by questions
// until it is done, so that a peer that is gone cannot hold this rank.
#include "parallel/nccl_communicator.h"

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "kernels/side_stream.h"
#include "parallel/nccl_library.h"

namespace {

using Clock = std::chrono::steady_clock;

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(Job& job, Backend& backend, std::chrono::milliseconds timeout)
      : rank_(job.rank()), size_(job.size()), timeout_(timeout), nccl_(nccl()), stream_(make_side_stream(backend)) {
    require_version();
    setenv("NCCL_ALGO", "Ring", 0);
    NcclUniqueId id = {};
    if (rank_ == 0) {
      if (nccl_.get_unique_id(&id) != kNcclSuccess) throw std::runtime_error("NCCL does not start on rank 0");
      job.set("nccl", std::string(id.bytes, sizeof id.bytes));
    }
    const std::string given = job.get("nccl");
    std::memcpy(id.bytes, given.data(), std::min(given.size(), sizeof id.bytes));
    NcclConfig config;
    finish([&] { return nccl_.init(&communicator_, size_, id, rank_, &config); });
    watcher_ = std::thread([this] { watch(); });
  }

  void require_version() const {
    int version = 0;
    nccl_.get_version(&version);
    if (version >= kOldestNccl) return;
    throw std::runtime_error("several GPUs need NVIDIA's NCCL 2.28 or newer, and this one is " +
                             std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + ": " +
                             kNcclPackage);
  }

  // The other ranks count on what was given and not waited for: NCCL finishes it.
  ~NcclCommunicator() override {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    watcher_.join();
    try {
      finish([&] { return nccl_.finalize(communicator_); });
      nccl_.destroy(communicator_);
    } catch (const std::runtime_error&) {
      // Broken off, and said where somebody waits for it.
    }
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  Ticket all_reduce(std::span<const Tensor> tensors) override {
    bytes_sent_ += all_reduce_bytes(tensors, size_);
    return give([&] {
      NcclResult result = kNcclSuccess;
      for (const Tensor& t : tensors) {
        const NcclResult one = nccl_.all_reduce(t.data, t.data, static_cast<size_t>(t.elements()),
                                                t.dtype == DType::kF32 ? kNcclFloat32 : kNcclBFloat16, kNcclSum,
                                                communicator_, stream_->handle());
        if (!is_error(result)) result = one;
      }
      return result;
    });
  }

  Ticket all_gather(void* whole, size_t part_bytes) override {
    bytes_sent_ += static_cast<int64_t>(part_bytes) * (size_ - 1);
    const char* const mine = static_cast<const char*>(whole) + static_cast<size_t>(rank_) * part_bytes;
    return give(
        [&] { return nccl_.all_gather(mine, whole, part_bytes, kNcclBytes, communicator_, stream_->handle()); });
  }

  void wait(Ticket ticket) override {
    throw_if_lost();
    stream_->compute_waits_for(ticket);
  }

  int64_t bytes_sent() const override { return bytes_sent_; }

 private:
  template <typename Enqueue>
  Ticket give(Enqueue enqueue) {
    throw_if_lost();
    const Ticket ticket = stream_->begin();
    {
      const std::lock_guard lock(mutex_);
      under_way_.push_back({ticket, Clock::now()});
    }
    finish([&] {
      nccl_.group_start();
      const NcclResult enqueued = enqueue(), ended = nccl_.group_end();
      return is_error(enqueued) ? enqueued : ended;
    });
    stream_->end();
    return ticket;
  }

  // Calls NCCL, and asks until what was begun is done: then it is on the stream.
  template <typename Call>
  void finish(Call call) {
    const Clock::time_point begun = Clock::now();
    NcclResult result = kNcclInProgress;
    for (bool called = false; result == kNcclInProgress; called = true) {
      {
        const std::lock_guard calling(calls_);
        throw_if_lost();
        if (!called) {
          result = call();
        } else if (nccl_.get_async_error(communicator_, &result) != kNcclSuccess) {
          result = kNcclSystemError;
        }
      }
      if (result == kNcclInProgress) std::this_thread::sleep_for(std::chrono::microseconds(called ? 200 : 10));
      if (result == kNcclInProgress && Clock::now() - begun > timeout_)
        lose("another rank does not answer" + for_so_long());
    }
    throw_if_lost();
    if (is_error(result)) lose(text_of(result));
  }

  static bool is_error(NcclResult result) { return result != kNcclSuccess && result != kNcclInProgress; }

  std::string text_of(NcclResult result) const {
    if (result == kNcclRemoteError) return "the connection to another rank was closed (NCCL)";
    return std::string("NCCL: ") + nccl_.error_string(result) + "; NCCL_DEBUG=INFO says more";
  }

  std::string for_so_long() const { return " (for " + std::to_string(timeout_.count() / 1000) + " s, --comm-timeout)"; }

  // Breaks everything off.
  [[noreturn]] void lose(const std::string& reason) {
    break_off(reason);
    throw std::runtime_error(reason);
  }

  // A call that is in progress for long waits for what is broken off here: it is not waited for.
  void break_off(const std::string& reason) {
    {
      const std::lock_guard lock(mutex_);
      if (!lost_.empty()) return;
      lost_ = reason;
    }
    const std::unique_lock calling(calls_, std::chrono::seconds(1));
    if (communicator_) nccl_.abort(communicator_);
  }

  void throw_if_lost() {
    const std::lock_guard lock(mutex_);
    if (!lost_.empty()) throw std::runtime_error(lost_);
  }

  void watch() {
    std::unique_lock lock(mutex_);
    Clock::time_point begun = {};  // when the first of under_way_ was seen to have begun
    while (!changed_.wait_for(lock, std::chrono::milliseconds(100), [&] { return ending_ || !lost_.empty(); })) {
      lock.unlock();
      const std::string reason = what_is_wrong(begun);
      if (!reason.empty()) return break_off(reason);
      lock.lock();
    }
  }

  std::string what_is_wrong(Clock::time_point& begun) {
    if (const std::unique_lock calling(calls_, std::try_to_lock); calling) {
      NcclResult error = kNcclSuccess;
      if (nccl_.get_async_error(communicator_, &error) != kNcclSuccess) error = kNcclSystemError;
      if (is_error(error)) return text_of(error);
    }
    // Of the device only what is late is asked.
    for (;;) {
      Ticket ticket = 0;
      {
        const std::lock_guard lock(mutex_);
        if (under_way_.empty() || Clock::now() - under_way_.front().given <= timeout_) return "";
        ticket = under_way_.front().ticket;
      }
      if (!stream_->is_done(ticket)) {
        if (!stream_->has_begun(ticket)) return "";
        if (begun == Clock::time_point()) begun = Clock::now();
        return Clock::now() - begun > timeout_ ? "another rank does not answer" + for_so_long() : "";
      }
      begun = {};
      const std::lock_guard lock(mutex_);
      under_way_.pop_front();
    }
  }

  struct UnderWay {
    Ticket ticket;
    Clock::time_point given;
  };

  const int rank_, size_;
  const std::chrono::milliseconds timeout_;
  const Nccl& nccl_;
  const std::unique_ptr<SideStream> stream_;
  int64_t bytes_sent_ = 0;

  std::timed_mutex calls_;  // of NCCL
  ncclComm* communicator_ = nullptr;

  std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::string lost_;  // why
  std::deque<UnderWay> under_way_;
  bool ending_ = false;

  std::thread watcher_;
};

}  // namespace

std::unique_ptr<Communicator> make_nccl_communicator(Job& job, Backend& backend, std::chrono::milliseconds timeout) {
  return std::make_unique<NcclCommunicator>(job, backend, timeout);
}
