// product.h: what a matrix product of cublaslt.cpp consists of, and its computation.
#pragma once

#include <cublasLt.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fake_cublaslt {

struct Layout : cublasLtMatrixLayoutOpaque_t {
  cudaDataType type = CUDA_R_32F;
  uint64_t rows = 0, cols = 0;
  int64_t ld = 0;

  size_t element_bytes() const { return type == CUDA_R_16BF ? 2 : 4; }
  size_t bytes() const {
    return ((cols - 1) * static_cast<size_t>(ld) + rows) * element_bytes();
  }  // from first to last
  bool operator==(const Layout& other) const {
    return type == other.type && rows == other.rows && cols == other.cols && ld == other.ld;
  }
};

struct Operation : cublasLtMatmulDescOpaque_t {
  cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
  int32_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
  uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
  int32_t bias_type = -1;  // -1: the type of the result
};

struct Algorithm {
  uint64_t id;
  size_t workspace;
  uint32_t alignment;  // of pointers and pitches, in bytes; 1: that of an element
  uint32_t reduction;
};

struct Product {
  Operation operation;
  Layout a, b, d;

  uint64_t depth() const { return operation.transpose_a == CUBLAS_OP_N ? a.cols : a.rows; }
  size_t bias_bytes() const { return operation.epilogue == CUBLASLT_EPILOGUE_BIAS ? d.rows * d.element_bytes() : 0; }

  // The same number for products that the same algorithms are made for.
  uint64_t kind() const {
    uint64_t code = 0;
    for (const uint64_t part :
         {uint64_t(operation.compute), uint64_t(operation.transpose_a), uint64_t(operation.transpose_b),
          uint64_t(operation.epilogue), uint64_t(a.type), uint64_t(b.type), uint64_t(d.type)}) {
      code = code * 257 + part;
    }
    return code;
  }
};

// A call of cublasLtMatmul that was found to be right.
struct Call {
  Product product;
  Algorithm algorithm;
  float alpha, beta;
  const void *a, *b;
  void *d, *workspace;
  uint64_t wasted_microseconds;
  bool is_wrong;

  void run() const;

 private:
  void check_written() const;
  void multiply(std::vector<float>& sum, const std::vector<float>& left, const std::vector<float>& right,
                uint64_t begin, uint64_t end) const;
  std::vector<float> sums() const;
};

}  // namespace fake_cublaslt
