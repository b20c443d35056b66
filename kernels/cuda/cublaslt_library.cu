// cublaslt_library.cu: finds libcublasLt.so and its functions at run time. The version this program was compiled for
// comes first.
#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cuda/matmul.h"
#include "kernels/nvidia_libraries.h"

namespace {

void* open_library() {
  std::vector<std::string> names = {"libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR)};
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
    if (names[0] != name) names.push_back(name);
  }
  std::string reason;
  if (void* const library = open_nvidia_library(names, reason)) return library;
  std::string message = "matrix products on the GPU need NVIDIA's cuBLASLt, which cannot be loaded (" + reason +
                        "): install the CUDA Toolkit's libcublas, or add the folder of " + names[0] +
                        " to LD_LIBRARY_PATH. Looked for " + names[0];
  for (size_t i = 1; i < names.size(); ++i) message += ", " + names[i];
  message += " also in";
  for (const std::string& folder : nvidia_library_folders()) message += " " + folder;
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
