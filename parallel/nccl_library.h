// nccl_library.h: what is used of NCCL, found at run time: a program that runs on one GPU starts without it.
#pragma once

#include <cstddef>
#include <cstdlib>

struct ncclComm;  // NCCL's own

// Values of NCCL's interface, the same in every version 2.
enum NcclResult : int {
  kNcclSuccess = 0,
  kNcclSystemError = 2,
  kNcclInvalidUsage = 5,
  kNcclRemoteError = 6,
  kNcclInProgress = 7
};
enum NcclType : int { kNcclBytes = 0, kNcclFloat32 = 7, kNcclBFloat16 = 9 };
enum NcclOperation : int { kNcclSum = 0 };

struct NcclUniqueId {
  char bytes[128];
};

// The settings of a communicator as they were in version 2.14; later versions take them by their size.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef, version = 21400;
  int blocking = 0;  // every function returns at once, kNcclInProgress when there is more to do
};

struct Nccl {
  NcclResult (*get_version)(int* version);  // 22803: 2.28.3
  NcclResult (*get_unique_id)(NcclUniqueId* id);
  NcclResult (*init)(ncclComm** communicator, int ranks, NcclUniqueId id, int rank, NcclConfig* config);
  NcclResult (*finalize)(ncclComm* communicator);
  NcclResult (*destroy)(ncclComm* communicator);
  NcclResult (*abort)(ncclComm* communicator);
  NcclResult (*get_async_error)(ncclComm* communicator, NcclResult* error);
  const char* (*error_string)(NcclResult result);
  NcclResult (*group_start)();
  NcclResult (*group_end)();
  NcclResult (*all_reduce)(const void* in, void* out, size_t count, NcclType type, NcclOperation operation,
                           ncclComm* communicator, void* stream);
  NcclResult (*all_gather)(const void* in, void* out, size_t count, NcclType type, ncclComm* communicator,
                           void* stream);
};

inline constexpr int kOldestNccl = 22800;
inline constexpr char kNcclPackage[] =
    "install libnccl2 from NVIDIA's repository, or PyPI's nvidia-nccl-cu13 or -cu12 in a virtual environment that is "
    "active; where it is elsewhere, add its folder to LD_LIBRARY_PATH";

// Throws std::runtime_error where it cannot be loaded, with the package that brings it.
const Nccl& nccl();
