// program.cpp: the part of the CUDA runtime's binary interface that host code compiled by nvcc calls: fat binaries with
// PTX in them, the kernels registered from them, and their launches on the interpreter.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/ptx/device.h"
#include "tests/ptx/machine.h"
#include "tests/ptx/runtime.h"
#include "tests/ptx/stream.h"

using ptx::machine;

namespace {

struct FatBinary {
  std::string ptx;
  std::unique_ptr<ptx::Module> module;  // parsed on first use
};
struct Kernel {
  FatBinary* binary;
  std::string name;
  ptx::Function* function = nullptr;
  int most_dynamic_shared = 48 << 10;
};

// Registered before main() and used until the program's last destructor.
std::vector<std::unique_ptr<FatBinary>>& binaries() {
  static auto* const all = new std::vector<std::unique_ptr<FatBinary>>;
  return *all;
}
std::map<const void*, Kernel>& kernels() {
  static auto* const all = new std::map<const void*, Kernel>;
  return *all;
}

template <typename T>
T value_at(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Variables in device memory, and in them the addresses of others.
void place_variables(ptx::Module& module) {
  for (ptx::Variable& v : module.globals) {
    if (v.space == ptx::SHARED || v.external) continue;
    void* const p = machine.allocate(std::max<uint64_t>(v.size, 1), true);
    std::memset(p, 0, v.size);
    std::memcpy(p, v.init.data(), v.init.size());
    v.offset = reinterpret_cast<uint64_t>(p);
  }
  for (ptx::Variable& v : module.globals) {
    for (const auto& [offset, name] : v.pointers) {
      for (const ptx::Variable& to : module.globals) {
        if (to.name == name) std::memcpy(reinterpret_cast<void*>(v.offset + offset), &to.offset, 8);
      }
    }
  }
}

ptx::Function* function_of(Kernel& kernel) {
  if (kernel.function) return kernel.function;
  FatBinary& binary = *kernel.binary;
  if (!binary.module) {
    binary.module = std::make_unique<ptx::Module>();
    ptx::parse(*binary.module, binary.ptx);
    place_variables(*binary.module);
  }
  const auto found = binary.module->functions.find(kernel.name);
  return found == binary.module->functions.end() ? nullptr : kernel.function = &found->second;
}

void run_kernel(const Kernel& kernel, dim3 grid, dim3 block, const std::vector<std::vector<uint8_t>>& arguments,
                size_t shared) {
  std::vector<void*> pointers;
  for (const auto& a : arguments) pointers.push_back(const_cast<uint8_t*>(a.data()));
  const uint32_t g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  try {
    machine.launch(*kernel.binary->module, *kernel.function, g, b, shared, pointers.data());
  } catch (const ptx::Fault&) {  // which was reported
    set_kernel_error(cudaErrorIllegalAddress);
  }
}

cudaError_t launch(const void* host_function, dim3 grid, dim3 block, void** arguments, size_t shared,
                   cudaStream_t stream) {
  const auto lock = lock_device();
  const auto found = kernels().find(host_function);
  if (found == kernels().end()) return returned(cudaErrorInvalidDeviceFunction);
  Kernel& kernel = found->second;
  const ptx::Function* const f = function_of(kernel);
  if (!f) return returned(cudaErrorNoKernelImageForDevice);
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024 || block.z > 64 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return returned(cudaErrorInvalidConfiguration);
  if (f->maxntid > 0 && threads > static_cast<uint64_t>(f->maxntid)) return returned(cudaErrorInvalidValue);
  if (shared > static_cast<size_t>(kernel.most_dynamic_shared)) return returned(cudaErrorInvalidValue);
  std::vector<std::vector<uint8_t>> copies;
  for (size_t i = 0; i < f->params.size(); ++i) {
    const uint8_t* const p = static_cast<const uint8_t*>(arguments[i]);
    copies.emplace_back(p, p + f->params[i].size);
  }
  return enqueue(stream, [&kernel, grid, block, copies = std::move(copies), shared] {
    run_kernel(kernel, grid, block, copies, shared);
  });
}

// A line per kernel: name, launches, instructions of threads, and for each instruction whether it was executed.
void write_coverage(const std::string& path) {
  std::ofstream out(path);
  for (const auto& binary : binaries()) {
    if (!binary->module) continue;
    for (const auto& [name, f] : binary->module->functions) {
      std::string executed(f.body.size(), '0');
      uint64_t lanes = 0;
      for (size_t k = 0; f.decoded && k < f.body.size(); ++k) {
        if (f.code[k].executed > 0) executed[k] = '1';
        lanes += f.code[k].lanes;
      }
      out << name << ' ' << f.launches << ' ' << lanes << ' ' << executed << '\n';
    }
  }
}

void finish() {
  if (const char* const path = std::getenv("PTXSIM_COVERAGE")) write_coverage(path);
  if (machine.findings.empty()) return;
  std::fprintf(stderr, "PTXSIM: %zu findings\n", machine.findings.size());
  std::fflush(nullptr);
  std::_Exit(97);
}

}  // namespace

std::vector<std::string> ptxsim_take_findings() {
  const auto lock = lock_device();
  machine.reported.clear();
  return std::exchange(machine.findings, {});
}

extern "C" {

// The layout of a fat binary: magic, version and size of the header, bytes of all entries; an entry has its kind (1:
// PTX), the sizes of its header and content, and at byte 28 the architecture.
void** __cudaRegisterFatBinary(void* wrapper) {
  ptx::setup();
  if (binaries().empty()) std::atexit(finish);
  struct Wrapper {
    int magic, version;
    const uint8_t* data;
    void* name;
  };
  const uint8_t* p = static_cast<const Wrapper*>(wrapper)->data;
  if (value_at<uint32_t>(p) != 0xba55ed50u) ptx::fail("this is no fat binary");
  auto binary = std::make_unique<FatBinary>();
  const uint8_t* const end = p + value_at<uint16_t>(p + 6) + value_at<uint64_t>(p + 8);
  int newest = 0;
  for (p += value_at<uint16_t>(p + 6); p < end;) {
    const uint32_t header = value_at<uint32_t>(p + 4);
    const uint64_t size = value_at<uint64_t>(p + 8);
    const int architecture = static_cast<int>(value_at<uint32_t>(p + 28));
    if (value_at<uint16_t>(p) == 1 && architecture > newest) {
      const char* const text = reinterpret_cast<const char*>(p + header);
      binary->ptx.assign(text, strnlen(text, size));
      if (binary->ptx.find(".version") == std::string::npos) ptx::fail("compressed PTX: compile with --no-compress");
      newest = architecture;
    }
    p += header + size;
  }
  if (machine.architecture && machine.architecture != newest) ptx::fail("PTX of two architectures");
  machine.architecture = newest;
  binaries().push_back(std::move(binary));
  return reinterpret_cast<void**>(binaries().back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host] = {reinterpret_cast<FatBinary*>(handle), name};
}
void __cudaRegisterVar(void**, char*, char*, const char* name, int, size_t, int, int) {
  ptx::fail(std::string("device variable ") + name + " reached from the host");
}

// ---- launches

// Of every kernel nvcc makes a function for <<<...>>> that calls the first of these and one of the others, which differ
// between its versions. All launches go through launch.cuh.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { ptx::fail("a launch by <<<...>>>"); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  if (config->numAttrs != 0) ptx::fail("launch attributes");
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}

// ---- attributes

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const auto lock = lock_device();
  const auto found = kernels().find(function);
  if (found == kernels().end()) return returned(cudaErrorInvalidDeviceFunction);
  ptx::Function* const f = function_of(found->second);
  if (!f) return returned(cudaErrorNoKernelImageForDevice);
  ptx::decode(*found->second.binary->module, *f);
  *attributes = {};
  attributes->sharedSizeBytes = f->static_shared;
  attributes->localSizeBytes = f->local_bytes;
  attributes->maxThreadsPerBlock = f->maxntid ? f->maxntid : 1024;
  attributes->maxDynamicSharedSizeBytes = found->second.most_dynamic_shared;
  attributes->ptxVersion = attributes->binaryVersion = machine.architecture;
  attributes->numRegs = 64;  // PTX has as many as it likes
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto lock = lock_device();
  const auto found = kernels().find(function);
  if (found == kernels().end()) return returned(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > most_shared_memory())
    return returned(cudaErrorInvalidValue);
  found->second.most_dynamic_shared = value;
  return cudaSuccess;
}
}
