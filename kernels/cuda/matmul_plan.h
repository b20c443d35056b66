// matmul_plan.h: one kind of matrix product as cuBLASLt sees it: what distinguishes it from others (the key), and its
// descriptors, made once (the plan).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/cublaslt_library.h"
#include "kernels/tensor.h"

enum class MatmulEpilogue : uint8_t {
  kNone,
  kBias,          // + bias, of the result's dtype
  kGeluGradient,  // * gelu'(auxiliary input), of the result's dtype
};

// Everything that the choice of an algorithm depends on. Leading dimensions are in elements, alignments in bytes.
struct MatmulKey {
  int64_t m = 0, n = 0, k = 0;
  int64_t lda = 0, ldb = 0, ldd = 0, ld_extra = 0;
  uint32_t align_a = 0, align_b = 0, align_d = 0, align_extra = 0;  // extra: the epilogue's bias or auxiliary input
  DType operands = DType::kF32, result = DType::kF32;
  MatmulEpilogue epilogue = MatmulEpilogue::kNone;
  bool transpose_a = false, transpose_b = false, accumulate = false, tf32 = false;
  size_t workspace = 0;  // bytes an algorithm may use

  bool operator==(const MatmulKey&) const = default;

  // The key in words, different for different keys: part of the format of Backend::tuning().
  std::string text() const;
};

struct MatmulKeyHash {
  size_t operator()(const MatmulKey& key) const;
};

// One of cuBLASLt's algorithms, good for plans of one key. (The library's own type has no name, which nvcc 13 does not
// survive in a std::vector.)
struct MatmulAlgorithm {
  cublasLtMatmulAlgo_t code;

  // Its 64 bytes in hexadecimal, and back; false when the text is not such.
  std::string text() const;
  bool read(const std::string& text);
};

// The largest power of two, 256 at most, that divides the address.
uint32_t alignment_of(const void* address);

// The numbers of one call.
struct MatmulOperands {
  void* d;
  const void *a, *b, *extra;
  float alpha;
  void* workspace;
  cudaStream_t stream;
};

// cuBLASLt is column-major. What is row-major here is the transposed matrix there, so the product is computed as
// out^T = op(b)^T op(a)^T: the operands change places, and nothing is transposed.
class MatmulPlan {
 public:
  // Throws std::runtime_error when cuBLASLt refuses the descriptors.
  MatmulPlan(cublasLtHandle_t handle, const MatmulKey& key);

  static constexpr int kMostCandidates = 8;

  // At most `count` algorithms, and kMostCandidates, what cuBLASLt expects to be the fastest first. Only such that add
  // partial sums in fp32 and always in the same order. When there is none, `status` says why.
  std::vector<MatmulAlgorithm> candidates(int count, const MatmulOperands& operands, cublasStatus_t& status);

  // Whether an algorithm from elsewhere would do.
  bool accepts(const MatmulAlgorithm& algorithm) const;

  cublasStatus_t launch(const MatmulAlgorithm& algorithm, const MatmulOperands& operands);

  const MatmulKey& key() const { return key_; }

 private:
  struct Destroy {
    void operator()(cublasLtMatmulDescOpaque_t* operation) const { cublaslt().operation_destroy(operation); }
    void operator()(cublasLtMatrixLayoutOpaque_t* layout) const { cublaslt().layout_destroy(layout); }
    void operator()(cublasLtMatmulPreferenceOpaque_t* preference) const { cublaslt().preference_destroy(preference); }
  };
  using Operation = std::unique_ptr<cublasLtMatmulDescOpaque_t, Destroy>;
  using Layout = std::unique_ptr<cublasLtMatrixLayoutOpaque_t, Destroy>;
  using Preference = std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, Destroy>;

  static Layout make_layout(DType dtype, int64_t rows, int64_t cols, int64_t leading_dimension);
  void set_extra(const void* extra);  // the epilogue's pointer, where there is one

  cublasLtHandle_t handle_;
  MatmulKey key_;
  Operation operation_;
  Layout a_, b_, d_;
};

// Throws std::runtime_error saying what was being done when `status` is not success.
void check_cublaslt(cublasStatus_t status, const std::string& what);
