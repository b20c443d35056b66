// cublaslt.cpp: tests/cublaslt on the interpreter: its memory is followed byte by byte, its mistakes are findings.
#include "tests/cublaslt/device.h"

#include <algorithm>
#include <utility>

#include "tests/ptx/machine.h"
#include "tests/ptx/stream.h"

using ptx::machine;

namespace fake_cublaslt {

cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) { return ::enqueue(stream, std::move(work)); }

bool is_device_range(const void* address, size_t bytes) {
  const auto lock = lock_device();
  const ptx::Allocation* const found = machine.find(reinterpret_cast<uint64_t>(address));
  return found && reinterpret_cast<uint64_t>(address) + bytes <= found->hi;
}

bool is_written(const void* address, size_t bytes) {
  if (bytes == 0) return true;
  const uint8_t* const first = machine.defined + machine.shadow_index(reinterpret_cast<uint64_t>(address));
  return std::all_of(first, first + bytes, [](uint8_t defined) { return defined != 0; });
}
void mark_written(const void* address, size_t bytes, bool written) { machine.mark_defined(address, bytes, written); }

void report(const char* what) { ptx::report_host("cublasLtMatmul", "%s", what); }

}  // namespace fake_cublaslt
