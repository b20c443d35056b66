// communicator.h: what the ranks of one run tell each other on their devices. Beside Backend; the model knows nothing
// of it. Implementations: AloneCommunicator here, a ring over TCP (CPU, ring_communicator.h) and NCCL (CUDA,
// nccl_communicator.h).
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "kernels/tensor.h"

class Backend;
class Job;

struct CommunicationTimes {
  double busy = 0;    // seconds in which an operation was under way
  double waited = 0;  // seconds in which the compute stream stood still for one
};

// Every rank calls the same operations in the same order with the same shapes. An operation begins once all that was
// given to the compute stream before is done, runs beside what is given to it after (CUDA: on a stream of its own, CPU:
// on a thread of its own), and operations run one after another. Until wait() its memory may not be touched. The order
// of sums is fixed by the number of ranks and the shapes: two runs with the same ranks have the same bits, and all
// ranks get the same bits. Throws std::runtime_error in one line when a peer is lost or does not answer in time.
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // Names an operation for wait(); they finish in order.
  using Ticket = int64_t;

  // Each tensor becomes its sum over all ranks, in place. Contiguous, fp32 or bf16 (then each partial sum is rounded to
  // nearest).
  virtual Ticket all_reduce(std::span<const Tensor> tensors) = 0;
  Ticket all_reduce(const Tensor& tensor) { return all_reduce(std::span(&tensor, 1)); }

  // `whole` is size() parts of part_bytes each; every rank has its own part in place, rank() * part_bytes from the
  // start, and gets the others'.
  virtual Ticket all_gather(void* whole, size_t part_bytes) = 0;

  // Operations on the compute stream from now on (CPU: the caller) come after this operation.
  virtual void wait(Ticket ticket) = 0;

  // What this rank has sent so far, by the formulas of a ring of R ranks: 2 (R - 1) / R of the bytes of an all_reduce,
  // (R - 1) parts of an all_gather.
  virtual int64_t bytes_sent() const = 0;

  // So far; zeros where they are not known.
  virtual CommunicationTimes times() const { return {}; }
};

// What a rank sends in an all_reduce of these by a ring. Throws std::logic_error for what all_reduce() does not take.
int64_t all_reduce_bytes(std::span<const Tensor> tensors, int ranks);

// The only rank: nothing to say, nobody to wait for.
class AloneCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  Ticket all_reduce(std::span<const Tensor>) override { return 0; }
  Ticket all_gather(void*, size_t) override { return 0; }
  void wait(Ticket) override {}
  int64_t bytes_sent() const override { return 0; }
};

inline Communicator& alone() {
  static AloneCommunicator communicator;
  return communicator;
}

// What the ranks of a job need on this device; all of them call it. A peer that does nothing for as long as `timeout`
// is lost. Throws std::runtime_error in one line, also where the library that it takes is missing.
std::unique_ptr<Communicator> make_communicator(Job& job, Backend& backend, std::chrono::milliseconds timeout);
