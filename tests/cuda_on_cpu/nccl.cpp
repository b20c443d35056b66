// nccl.cpp: stands for NCCL between processes of one machine: its functions as parallel/nccl_library.h declares them,
// in the place of nccl_library.cpp, which would load the real one. Work is enqueued on the shim's streams and runs when
// they do; a ring of sockets carries the bytes. It ends the program with a report where the real one would hang,
// corrupt memory or leave it undefined: memory that is not the device's, calls that differ between ranks, calls while
// an earlier one is not done, calls outside of a group that belong in one, an unknown communicator.
#include "parallel/nccl_library.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "kernels/tensor.h"
#include "tests/cuda_on_cpu/report.h"
#include "tests/cuda_on_cpu/stream.h"

using cuda_on_cpu::fail;

struct ncclComm {
  int rank = 0, size = 0;
  int next = -1, previous = -1, listening = -1;  // sockets
  std::thread connecting;
  std::atomic<bool> aborted = false, connected = false, closed = false;
  int questions = 0;  // how often it still says that it is in progress
  int64_t calls = 0;
};

namespace {

std::set<ncclComm*> communicators;
std::mutex mutex;
int group_depth = 0;
std::vector<ncclComm*> in_group;

ncclComm& known(ncclComm* communicator, const char* function) {
  const std::lock_guard lock(mutex);
  if (!communicators.contains(communicator)) fail(std::string(function) + ": there is no such communicator");
  return *communicator;
}

sockaddr_un address_of(const NcclUniqueId& id, int rank, socklen_t& length) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  // An abstract one: it ends with its processes.
  const std::string name = "nccl on cpu " + std::string(id.bytes, strnlen(id.bytes, 64)) + " " + std::to_string(rank);
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

bool is_ready(int socket, short events) {
  pollfd entry = {.fd = socket, .events = events, .revents = 0};
  return poll(&entry, 1, 20) > 0;
}

void connect_ring(ncclComm& c, NcclUniqueId id) {
  socklen_t length = 0;
  const sockaddr_un peer = address_of(id, (c.rank + 1) % c.size, length);
  while (!c.aborted) {
    c.next = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(c.next, reinterpret_cast<const sockaddr*>(&peer), length) == 0) break;
    close(c.next);
    c.next = -1;
    usleep(2000);
  }
  while (!c.aborted && !is_ready(c.listening, POLLIN)) {
  }
  if (c.aborted) return;
  c.previous = accept(c.listening, nullptr, nullptr);
  c.connected = true;
}

// Sends to the next rank while it receives from the one before; false when one of them is gone, or after an abort.
bool exchange(ncclComm& c, const void* out, size_t out_bytes, void* in, size_t in_bytes) {
  auto* from = static_cast<const char*>(out);
  auto* to = static_cast<char*>(in);
  while (out_bytes > 0 || in_bytes > 0) {
    pollfd entries[] = {{.fd = out_bytes > 0 ? c.next : -1, .events = POLLOUT, .revents = 0},
                        {.fd = in_bytes > 0 ? c.previous : -1, .events = POLLIN, .revents = 0}};
    if (c.aborted) return false;
    if (poll(entries, 2, 20) <= 0) continue;
    if (entries[0].revents) {
      const ssize_t sent = send(c.next, from, out_bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent < 0 && errno != EAGAIN) return false;
      if (sent > 0) from += sent, out_bytes -= static_cast<size_t>(sent);
    }
    if (entries[1].revents) {
      const ssize_t received = recv(c.previous, to, in_bytes, MSG_DONTWAIT);
      if (received == 0 || (received < 0 && errno != EAGAIN)) return false;
      if (received > 0) to += received, in_bytes -= static_cast<size_t>(received);
    }
  }
  return true;
}

struct Call {
  int64_t number;
  int32_t function, type;
  uint64_t count;
  bool operator==(const Call&) const = default;
};

std::string text_of(const Call& call) {
  return std::string(call.function == 0 ? "all-reduce" : "all-gather") + " number " + std::to_string(call.number) +
         " of " + std::to_string(call.count) + " elements of type " + std::to_string(call.type);
}

bool same_call(ncclComm& c, const Call& call) {
  Call theirs = {};
  if (!exchange(c, &call, sizeof call, &theirs, sizeof theirs)) return false;
  if (theirs != call)
    fail("NCCL: ranks do not call the same: " + text_of(call) + " here, " + text_of(theirs) + " there");
  return true;
}

template <typename T>
void add(char* sum, const char* received, size_t bytes) {
  for (size_t i = 0; i < bytes; i += sizeof(T)) {
    T left, right;
    std::memcpy(&left, sum + i, sizeof(T));
    std::memcpy(&right, received + i, sizeof(T));
    left = from_float<T>(to_float(left) + to_float(right));
    std::memcpy(sum + i, &left, sizeof(T));
  }
}

// `part(p)`: where the p-th of size parts begins; part(size) is the end.
template <typename Part>
bool pass_on(ncclComm& c, char* memory, int first, Part part, void (*sum)(char*, const char*, size_t)) {
  std::vector<char> received;
  for (int i = 0; i < c.size - 1; ++i) {
    const int out = (first - i + 2 * c.size) % c.size, in = (out + c.size - 1) % c.size;
    const size_t begin = part(in), bytes = part(in + 1) - begin;
    received.resize(bytes);
    if (!exchange(c, memory + part(out), part(out + 1) - part(out), received.data(), bytes)) return false;
    if (sum) {
      sum(memory + begin, received.data(), bytes);
    } else {
      std::memcpy(memory + begin, received.data(), bytes);
    }
  }
  return true;
}

NcclResult enqueue(ncclComm& c, void* stream, const char* name, const std::function<bool()>& work) {
  if (group_depth == 0) fail(std::string(name) + " outside of a group");
  if (c.aborted) fail(std::string(name) + ": the communicator was aborted");
  if (c.questions > 0 || !c.connected) fail(std::string(name) + ": the call before it is still in progress");
  in_group.push_back(&c);
  const cudaError_t status = cuda_on_cpu::enqueue(static_cast<cudaStream_t>(stream), name, [&c, work] {
    if (!c.closed && !work()) c.closed = true;
  });
  return status == cudaSuccess ? kNcclSuccess : kNcclInvalidUsage;
}

size_t size_of(NcclType type) { return type == kNcclFloat32 ? 4 : type == kNcclBFloat16 ? 2 : 1; }

NcclResult get_version(int* version) {
  *version = static_cast<int>(cuda_on_cpu::setting("CUDA_ON_CPU_NCCL", 22800));
  return kNcclSuccess;
}

NcclResult get_unique_id(NcclUniqueId* id) {
  std::random_device random;
  *id = {};
  snprintf(id->bytes, sizeof id->bytes, "%u-%d", random(), static_cast<int>(getpid()));
  return kNcclSuccess;
}

NcclResult init(ncclComm** communicator, int ranks, NcclUniqueId id, int rank, NcclConfig* config) {
  if (config->magic != 0xcafebeef || config->size != sizeof *config || config->blocking != 0)
    fail("ncclCommInitRankConfig: takes a configuration that does not block");
  if (rank < 0 || rank >= ranks) fail("ncclCommInitRankConfig: rank " + std::to_string(rank));
  auto* const c = new ncclComm;
  c->rank = rank;
  c->size = ranks;
  socklen_t length = 0;
  const sockaddr_un address = address_of(id, rank, length);
  c->listening = socket(AF_UNIX, SOCK_STREAM, 0);
  if (bind(c->listening, reinterpret_cast<const sockaddr*>(&address), length) != 0 || listen(c->listening, 1) != 0)
    fail("ncclCommInitRankConfig: rank " + std::to_string(rank) + " is there already");
  c->connecting = std::thread([c, id] { connect_ring(*c, id); });
  const std::lock_guard lock(mutex);
  communicators.insert(c);
  *communicator = c;
  return kNcclInProgress;
}

void release(ncclComm& c) {
  c.connecting.join();
  for (const int socket : {c.next, c.previous, c.listening}) close(socket);
  const std::lock_guard lock(mutex);
  communicators.erase(&c);
}

NcclResult finalize(ncclComm* communicator) {
  known(communicator, "ncclCommFinalize").questions = 1;
  cudaDeviceSynchronize();
  return kNcclInProgress;
}

NcclResult destroy(ncclComm* communicator) {
  release(known(communicator, "ncclCommDestroy"));
  delete communicator;
  return kNcclSuccess;
}

// What is on the streams may still look at it: it is not deleted.
NcclResult abort_communicator(ncclComm* communicator) {
  ncclComm& c = known(communicator, "ncclCommAbort");
  c.aborted = c.closed = true;
  release(c);
  return kNcclSuccess;
}

NcclResult get_async_error(ncclComm* communicator, NcclResult* error) {
  ncclComm& c = known(communicator, "ncclCommGetAsyncError");
  const bool busy = !c.connected || (c.questions > 0 && c.questions-- > 0);
  *error = c.closed ? kNcclRemoteError : busy ? kNcclInProgress : kNcclSuccess;
  return kNcclSuccess;
}

const char* error_string(NcclResult result) {
  return result == kNcclSuccess ? "no error" : result == kNcclRemoteError ? "remote process exited" : "invalid usage";
}

NcclResult group_start() {
  ++group_depth;
  return kNcclSuccess;
}

NcclResult group_end() {
  if (--group_depth < 0) fail("ncclGroupEnd without ncclGroupStart");
  for (ncclComm* const c : in_group) c->questions = 1;
  const NcclResult result = in_group.empty() ? kNcclSuccess : kNcclInProgress;
  in_group.clear();
  return result;
}

NcclResult all_reduce(const void* in, void* out, size_t count, NcclType type, NcclOperation operation,
                      ncclComm* communicator, void* stream) {
  ncclComm& c = known(communicator, "ncclAllReduce");
  const size_t width = size_of(type);
  if (operation != kNcclSum || (type != kNcclFloat32 && type != kNcclBFloat16) || in != out)
    fail("ncclAllReduce: only sums of fp32 and bf16 in place are there");
  if (count > 0 && !cuda_on_cpu::is_device_range(out, count * width))
    fail("ncclAllReduce: the memory is not one allocation of the device");
  const Call call = {c.calls++, 0, type, count};
  return enqueue(c, stream, "ncclAllReduce", [=, &c] {
    const auto part = [&](int p) { return count * static_cast<size_t>(p) / static_cast<size_t>(c.size) * width; };
    auto* const memory = static_cast<char*>(out);
    return same_call(c, call) && pass_on(c, memory, c.rank, part, type == kNcclFloat32 ? add<float> : add<bf16>) &&
           pass_on(c, memory, c.rank + 1, part, nullptr);
  });
}

NcclResult all_gather(const void* in, void* out, size_t count, NcclType type, ncclComm* communicator, void* stream) {
  ncclComm& c = known(communicator, "ncclAllGather");
  const size_t bytes = count * size_of(type);
  if (in != static_cast<char*>(out) + static_cast<size_t>(c.rank) * bytes)
    fail("ncclAllGather: only in place, from this rank's part");
  if (count > 0 && !cuda_on_cpu::is_device_range(out, bytes * static_cast<size_t>(c.size)))
    fail("ncclAllGather: the memory is not one allocation of the device");
  const Call call = {c.calls++, 1, type, count};
  return enqueue(c, stream, "ncclAllGather", [=, &c] {
    return same_call(c, call) &&
           pass_on(
               c, static_cast<char*>(out), c.rank, [&](int p) { return static_cast<size_t>(p) * bytes; }, nullptr);
  });
}

}  // namespace

const Nccl& nccl() {
  static const Nccl table = {.get_version = get_version,
                             .get_unique_id = get_unique_id,
                             .init = init,
                             .finalize = finalize,
                             .destroy = destroy,
                             .abort = abort_communicator,
                             .get_async_error = get_async_error,
                             .error_string = error_string,
                             .group_start = group_start,
                             .group_end = group_end,
                             .all_reduce = all_reduce,
                             .all_gather = all_gather};
  return table;
}
