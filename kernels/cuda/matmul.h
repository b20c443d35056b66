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

// Throws std::runtime_error saying what was being done when `status` is not success.
void check_cublaslt(cublasStatus_t status, const std::string& what);

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
  // Operands of different dtypes are multiplied in bf16. `workspace`: kCublasWorkspaceBytes of device memory. Throws
  // std::runtime_error naming the product when cuBLASLt has no algorithm for it.
  void run(Tensor out, Tensor a, Tensor b, const MatmulOptions& options, void* workspace, cudaStream_t stream);

  // The algorithms chosen so far, as one line for a checkpoint, and back. What was made by another cuBLASLt or for
  // another GPU is ignored.
  std::string tuning() const;
  void set_tuning(const std::string& tuning);
  void end_tuning();  // from now on the library's first choice, where nothing else is remembered

  // Backend::slow_products() and, for products, Backend::distrust().
  std::string slow_products() const;
  std::string distrust();

 private:
  static constexpr int64_t kWideAccess = 16;  // bytes; what fast kernels demand of addresses and pitches

  // What the choice of an algorithm depends on. Pitches are in elements; `alignment` in bytes, of every row, and
  // `workspace`, too.
  struct Kind {
    int64_t m, n, k, pitch_a, pitch_b, pitch_out, alignment, workspace;
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
    std::vector<std::string> distrusted = {};       // algorithms that gave wrong results
  };
  // The numbers of one call.
  struct Call {
    Tensor out;
    const void *a, *b, *bias;
    float alpha;
    void* workspace;
    cudaStream_t stream;
  };
  struct Workspace {
    void* memory;
    size_t bytes;
  };
  // Which matrices of a product are copied, so that the library can compute it: its operands to a common dtype, what
  // has odd rows to even ones. The result of the copies has the dtype `result`.
  struct Staging {
    DType operands = DType::kF32, result = DType::kF32;
    bool a = false, b = false, out = false, bias = false;
    bool any() const { return a || b || out || bias; }
  };

  // matmul_staging.cu
  static Staging staging(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias);
  void run_in_pieces(const Tensor& out, const Tensor& a, const Tensor& b, const MatmulOptions& options,
                     const Staging& staging, void* workspace, cudaStream_t stream);

  // False when the library has no algorithm.
  bool run_by_library(const Tensor& out, const Tensor& a, const Tensor& b, const MatmulOptions& options,
                      Workspace workspace, cudaStream_t stream);
  void run_plain(const Tensor& out, const Tensor& a, const Tensor& b, const MatmulOptions& options, const char* why,
                 cudaStream_t stream);
  static int64_t pitch(const Tensor& t);
  static int64_t row_alignment(const Tensor& t);
  static bool in_range(const Tensor& out, const Tensor& a, const Tensor& b);

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
  std::map<std::string, int64_t> plain_;           // products that took the plain kernel, in words, and how often
  std::vector<Product*> last_;                     // what the last run() was computed by
};

// out = in, between fp32 and bf16, on `stream` (elementwise.cu).
void convert_elements(const Tensor& out, const Tensor& in, cudaStream_t stream);

// out (+)= alpha op(a) op(b) + bias in any mix of dtypes without tensor cores, rounded once. Slower than cuBLASLt by
// far: for sizes beyond int, and for what the library has no algorithm for, or only such whose results are wrong.
void matmul_plain(Tensor out, Tensor a, Tensor b, const MatmulOptions& options, cudaStream_t stream);
