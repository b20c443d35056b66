// matmul.h: matrix products on tensor cores through cuBLASLt, and by a plain kernel what that does not compute.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/backend.h"

// The functions of cuBLASLt, found in the shared library at run time (cublaslt_library.cu). The library is hundreds of
// megabytes; linked to it, the program would start later by a good part of a second on every machine, also on those
// without a GPU.
struct CublasLt {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtGetVersion) version;
  decltype(&cublasLtGetStatusName) status_name;
  decltype(&cublasLtMatmulDescCreate) operation_create;
  decltype(&cublasLtMatmulDescDestroy) operation_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) operation_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmulAlgoCheck) check;
  decltype(&cublasLtMatmul) matmul;
};

// Loads the library in the first call. Throws std::runtime_error when there is none, saying where it was looked for.
const CublasLt& cublaslt();

// Products of one run. For each kind (sizes, pitches, dtypes, transposition, ...) the library's descriptors are made
// and an algorithm is chosen once, then reused.
class CudaMatmul {
 public:
  // `device`: name and size of the GPU, which the choices depend on. Nothing is loaded before the first product.
  CudaMatmul(const CudaOptions& options, std::string device);
  ~CudaMatmul();

  // out[M,N] (+)= alpha op(a) op(b) + bias on `stream`, as Backend::matmul() says, which has checked the shapes.
  // `workspace`: kCublasWorkspaceBytes of device memory. Throws std::runtime_error naming the product when cuBLASLt has
  // no algorithm for it.
  void run(Tensor out, Tensor a, Tensor b, const MatmulOptions& options, void* workspace, cudaStream_t stream);

  // The algorithms chosen so far, as one line for a checkpoint, and back. What was made by another cuBLASLt or for
  // another GPU is ignored.
  std::string tuning() const;
  void set_tuning(const std::string& tuning);
  void end_tuning();  // from now on the library's first choice, where nothing else is remembered

 private:
  // What the choice of an algorithm depends on. Pitches are in elements; `alignment` in bytes, of every row.
  struct Kind {
    int64_t m, n, k, pitch_a, pitch_b, pitch_out, alignment;
    DType operands, result;
    bool transpose_a, transpose_b, accumulate, bias;
    auto operator<=>(const Kind&) const = default;
  };
  // (The library's own type has no name, which nvcc 13 does not survive in a std::vector.)
  struct Algorithm {
    cublasLtMatmulAlgo_t code;
  };
  struct Destroy {
    void operator()(cublasLtMatmulDescOpaque_t* operation) const { cublaslt().operation_destroy(operation); }
    void operator()(cublasLtMatrixLayoutOpaque_t* layout) const { cublaslt().layout_destroy(layout); }
    void operator()(cublasLtMatmulPreferenceOpaque_t* preference) const { cublaslt().preference_destroy(preference); }
  };
  // One kind of product as the library sees it, and the algorithm chosen for it.
  struct Product {
    Kind kind;
    std::unique_ptr<cublasLtMatmulDescOpaque_t, Destroy> operation;
    std::unique_ptr<cublasLtMatrixLayoutOpaque_t, Destroy> a, b, out;
    std::optional<Algorithm> algorithm;
    enum { kNew, kUnmeasured, kFinal } choice = kNew;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;  // why there is no algorithm
  };
  struct Call;

  Product& product_for(const Kind& kind);
  std::string text(const Kind& kind) const;
  std::string header() const;
  void recall(Product& product) const;
  std::vector<Algorithm> candidates(Product& product, int count) const;
  void choose(Product& product, const Call& call) const;
  cublasStatus_t launch(const Product& product, const Algorithm& algorithm, const Call& call) const;

  CudaOptions options_;
  std::string device_;
  cublasLtHandle_t handle_ = nullptr;
  std::map<Kind, Product> products_;
  std::map<std::string, std::string> remembered_;  // from set_tuning(), by the kind's text
};

// out (+)= alpha op(a) op(b) + bias without tensor cores, rounded once: for operands of different dtypes, a bf16 result
// of fp32 operands, a bias of another dtype, sizes beyond int. Slower than cuBLASLt by far. A model whose weights and
// activations have one dtype comes here only where fp32 meets a bf16 projection: a compressed sum of gradients once a
// step, a transfer of the momentum once in kappa steps, an fp32 momentum of bf16 gradients every step.
void matmul_plain(Tensor out, Tensor a, Tensor b, const MatmulOptions& options, cudaStream_t stream);
