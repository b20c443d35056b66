// thread_ranks.h: the ranks of a run as threads of this process, each with a Communicator between their backends, for
// tests of what several ranks do. Sums are taken in the order of the ranks. An operation is done at its wait() and no
// earlier: until then its memory is poisoned, so that who reads too early sees NaN, and who writes loses it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "parallel/communicator.h"

class ThreadRanks {
 public:
  explicit ThreadRanks(int size) : size_(size) {}

  // f(rank) on a thread each. Throws what the first rank to fail has thrown; the others' waits end with an error then.
  void run(const std::function<void(int rank)>& f) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size_; ++rank) {
      threads.emplace_back([&, rank] {
        try {
          f(rank);
        } catch (...) {
          fail(std::current_exception());
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    if (failure_) std::rethrow_exception(failure_);
  }

  // To be made and used on the thread of its rank.
  std::unique_ptr<Communicator> communicator(int rank, Backend& backend) {
    return std::make_unique<Member>(*this, rank, backend);
  }

 private:
  using Bytes = std::vector<char>;

  // What the ranks have given to one operation so far.
  struct Operation {
    std::string name;  // with the shapes
    std::vector<Bytes> given;
    int count = 0, taken = 0;
  };

  class Member final : public Communicator {
   public:
    Member(ThreadRanks& all, int rank, Backend& backend) : all_(all), rank_(rank), backend_(backend) {}

    int rank() const override { return rank_; }
    int size() const override { return all_.size_; }
    int64_t bytes_sent() const override { return bytes_sent_; }

    Ticket all_reduce(std::span<const Tensor> tensors) override {
      std::string name = "all_reduce";
      Bytes mine;
      for (const Tensor& t : tensors) {
        if (!t.contiguous() || (t.dtype != DType::kF32 && t.dtype != DType::kBF16))
          throw std::logic_error("all_reduce takes contiguous fp32 and bf16");
        name += std::string(" ") + dtype_name(t.dtype) + " " + std::to_string(t.elements());
        mine.resize(mine.size() + t.bytes());
        backend_.copy(&mine[mine.size() - t.bytes()], t.data, t.bytes());
      }
      backend_.synchronize();
      bytes_sent_ += 2 * (size() - 1) * static_cast<int64_t>(mine.size()) / size();
      for (const Tensor& t : tensors) backend_.fill(t.data, 0xff, t.bytes());
      return give(name, std::move(mine),
                  [this, kept = std::vector<Tensor>(tensors.begin(), tensors.end())](const std::vector<Bytes>& given) {
                    size_t begin = 0;
                    for (const Tensor& t : kept) {
                      Bytes sum(given[0].begin() + static_cast<std::ptrdiff_t>(begin),
                                given[0].begin() + static_cast<std::ptrdiff_t>(begin + t.bytes()));
                      for (size_t r = 1; r < given.size(); ++r) add(sum, &given[r][begin], t.dtype);
                      backend_.copy(t.data, sum.data(), t.bytes());
                      begin += t.bytes();
                    }
                  });
    }

    Ticket all_gather(void* whole, size_t part_bytes) override {
      char* const begin = static_cast<char*>(whole);
      Bytes mine(part_bytes);
      backend_.copy(mine.data(), begin + static_cast<size_t>(rank_) * part_bytes, part_bytes);
      backend_.synchronize();
      bytes_sent_ += (size() - 1) * static_cast<int64_t>(part_bytes);
      backend_.fill(whole, 0xff, static_cast<size_t>(size()) * part_bytes);
      return give("all_gather " + std::to_string(part_bytes), std::move(mine),
                  [this, begin, part_bytes](const std::vector<Bytes>& given) {
                    for (size_t r = 0; r < given.size(); ++r)
                      backend_.copy(begin + r * part_bytes, given[r].data(), part_bytes);
                  });
    }

    void wait(Ticket ticket) override {
      for (; !open_.empty() && open_.front().ticket <= ticket; open_.pop_front())
        open_.front().deliver(all_.collect(open_.front().ticket, rank_));
    }

   private:
    struct Open {
      Ticket ticket;
      std::function<void(const std::vector<Bytes>&)> deliver;
    };

    Ticket give(const std::string& name, Bytes mine, std::function<void(const std::vector<Bytes>&)> deliver) {
      all_.give(++last_, rank_, name, std::move(mine));
      open_.push_back({last_, std::move(deliver)});
      return last_;
    }

    // sum += more, rounded to nearest.
    static void add(Bytes& sum, const char* more, DType dtype) {
      const auto each = [&]<typename T>(T) {
        for (size_t at = 0; at < sum.size(); at += sizeof(T)) {
          T a, b;
          std::memcpy(&a, &sum[at], sizeof a);
          std::memcpy(&b, more + at, sizeof b);
          a = from_float<T>(to_float(a) + to_float(b));
          std::memcpy(&sum[at], &a, sizeof a);
        }
      };
      dtype == DType::kF32 ? each(float{}) : each(bf16{});
    }

    ThreadRanks& all_;
    int rank_;
    Backend& backend_;
    std::deque<Open> open_;  // operations not waited for
    Ticket last_ = 0;
    int64_t bytes_sent_ = 0;
  };

  void give(int64_t ticket, int rank, const std::string& name, Bytes mine) {
    const std::lock_guard lock(mutex_);
    if (failure_) throw std::runtime_error("another rank has failed");
    Operation& operation = operations_[ticket];
    if (operation.count == 0) {
      operation.name = name;
      operation.given.resize(static_cast<size_t>(size_));
    } else if (operation.name != name) {
      throw std::logic_error("operation " + std::to_string(ticket) + " of rank " + std::to_string(rank) + " is " +
                             name + ", another rank's is " + operation.name);
    }
    operation.given[static_cast<size_t>(rank)] = std::move(mine);
    ++operation.count;
    changed_.notify_all();
  }

  // What all have given.
  std::vector<Bytes> collect(int64_t ticket, int rank) {
    constexpr auto kLongest = std::chrono::minutes(2);
    std::unique_lock lock(mutex_);
    Operation& operation = operations_.at(ticket);
    const bool complete = changed_.wait_for(lock, kLongest, [&] { return failure_ || operation.count == size_; });
    if (failure_) throw std::runtime_error("another rank has failed");
    if (!complete) {
      throw std::logic_error("rank " + std::to_string(rank) + " waits for " + operation.name + ", which only " +
                             std::to_string(operation.count) + " ranks have begun");
    }
    std::vector<Bytes> given = operation.given;
    if (++operation.taken == size_) operations_.erase(ticket);
    return given;
  }

  void fail(const std::exception_ptr& error) {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = error;
    changed_.notify_all();
  }

  const int size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int64_t, Operation> operations_;  // by ticket
  std::exception_ptr failure_;
};
