// side_stream.h: a stream beside a CUDA backend's own, on which a library enqueues work (NCCL). CUDA's types stay out.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/backend.h"

// For one thread, but for has_begun() and is_done().
class SideStream {
 public:
  virtual ~SideStream() = default;

  virtual void* handle() const = 0;  // cudaStream_t

  // What is enqueued between the two comes after all that was given to the compute stream before begin(), which names
  // it: 1, 2, ...
  virtual int64_t begin() = 0;
  virtual void end() = 0;

  // Operations on the compute stream from now on come after what has that name, and all before it.
  virtual void compute_waits_for(int64_t name) = 0;

  virtual bool has_begun(int64_t name) const = 0;
  virtual bool is_done(int64_t name) const = 0;
};

// Throws std::runtime_error with cuda_unavailable()'s text where there is no CUDA.
std::unique_ptr<SideStream> make_side_stream(Backend& backend);
