// nccl_library.cpp: finds libnccl.so.2 and its functions at run time.
#include "parallel/nccl_library.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "kernels/nvidia_libraries.h"

namespace {

template <typename Function>
void find(Function& function, void* library, const char* name) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("this NCCL is damaged: it has no ") + name + "; " + kNcclPackage);
}

Nccl load() {
  std::string reason;
  void* const library = open_nvidia_library({"libnccl.so.2"}, reason);
  if (!library) {
    throw std::runtime_error("several GPUs need NVIDIA's NCCL 2.28 or newer, which cannot be loaded (" + reason +
                             "): " + kNcclPackage);
  }
  Nccl table = {};
  find(table.get_version, library, "ncclGetVersion");
  find(table.get_unique_id, library, "ncclGetUniqueId");
  find(table.init, library, "ncclCommInitRankConfig");
  find(table.finalize, library, "ncclCommFinalize");
  find(table.destroy, library, "ncclCommDestroy");
  find(table.abort, library, "ncclCommAbort");
  find(table.get_async_error, library, "ncclCommGetAsyncError");
  find(table.error_string, library, "ncclGetErrorString");
  find(table.group_start, library, "ncclGroupStart");
  find(table.group_end, library, "ncclGroupEnd");
  find(table.all_reduce, library, "ncclAllReduce");
  find(table.all_gather, library, "ncclAllGather");
  return table;
}

}  // namespace

const Nccl& nccl() {
  static const Nccl table = load();  // a failed load is tried again by the next call
  return table;
}
