// cublaslt_library.cu: finds libcublasLt.so and its functions with dlopen. The version this program was compiled for
// comes first, and the places the dynamic linker knows before the usual places of a CUDA Toolkit.
#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cuda/matmul.h"

namespace {

std::vector<std::string> candidates() {
  std::vector<std::string> folders = {""};
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* home = std::getenv(variable)) folders.push_back(std::string(home) + "/lib64/");
  }
  folders.push_back("/usr/local/cuda/lib64/");
  std::vector<std::string> names = {"libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR)};
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
    if (names[0] != name) names.push_back(name);
  }
  std::vector<std::string> paths;
  for (const std::string& name : names) {
    for (const std::string& folder : folders) paths.push_back(folder + name);
  }
  return paths;
}

void* open_library() {
  const std::vector<std::string> paths = candidates();
  std::string reason;
  for (const std::string& path : paths) {
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    if (reason.empty()) reason = dlerror();
  }
  std::string message = "matrix products on the GPU need NVIDIA's cuBLASLt, which cannot be loaded (" + reason +
                        "): install the CUDA Toolkit's libcublas, or add the folder of " + paths[0] +
                        " to LD_LIBRARY_PATH. Looked for";
  for (const std::string& path : paths) message += " " + path;
  throw std::runtime_error(message);
}

template <typename Function>
void find(Function& function, void* library, const char* name) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("this cuBLASLt is too old or damaged: it has no ") + name);
}

CublasLt load() {
  void* const library = open_library();
  CublasLt table = {};
  find(table.create, library, "cublasLtCreate");
  find(table.destroy, library, "cublasLtDestroy");
  find(table.version, library, "cublasLtGetVersion");
  find(table.status_name, library, "cublasLtGetStatusName");
  find(table.operation_create, library, "cublasLtMatmulDescCreate");
  find(table.operation_destroy, library, "cublasLtMatmulDescDestroy");
  find(table.operation_set, library, "cublasLtMatmulDescSetAttribute");
  find(table.layout_create, library, "cublasLtMatrixLayoutCreate");
  find(table.layout_destroy, library, "cublasLtMatrixLayoutDestroy");
  find(table.preference_create, library, "cublasLtMatmulPreferenceCreate");
  find(table.preference_destroy, library, "cublasLtMatmulPreferenceDestroy");
  find(table.preference_set, library, "cublasLtMatmulPreferenceSetAttribute");
  find(table.heuristic, library, "cublasLtMatmulAlgoGetHeuristic");
  find(table.check, library, "cublasLtMatmulAlgoCheck");
  find(table.matmul, library, "cublasLtMatmul");
  return table;
}

}  // namespace

const CublasLt& cublaslt() {
  static const CublasLt table = load();  // a failed load is tried again by the next call
  return table;
}
