// async_copy.h: the cp.async of one thread. A copy is carried out when cp_async_wait makes its group due, as late as
// the hardware may; until then its destination holds garbage.
#pragma once

#include <vector>

namespace cuda_on_cpu {

class AsyncCopies {
 public:
  void start(void* destination, const void* source);  // null source: zeros
  void commit() { ++open_group_; }
  // Carries out all but the newest `groups` of the committed groups.
  void wait(int groups);
  bool empty() const { return copies_.empty(); }

 private:
  struct Copy {
    void* destination;
    const void* source;
    unsigned group;
  };
  std::vector<Copy> copies_;
  unsigned open_group_ = 0;
};

// Of the running thread.
AsyncCopies& async_copies();

}  // namespace cuda_on_cpu
