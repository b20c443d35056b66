// product.cpp: a matrix product as cuBLASLt defines it, column-major, by the CPU backend's gemm(). Sums in
// fp32, one rounding.
#include "tests/cublaslt/product.h"

#include <chrono>
#include <cstring>
#include <thread>

#include "kernels/cpu/gemm.h"
#include "kernels/tensor.h"
#include "tests/cublaslt/device.h"

namespace fake_cublaslt {

namespace {

float element(const void* matrix, cudaDataType type, size_t index) {
  if (type == CUDA_R_32F) return static_cast<const float*>(matrix)[index];
  return to_float(static_cast<const bf16*>(matrix)[index]);
}

// The matrix as fp32 with columns `rows` apart.
std::vector<float> widen(const void* matrix, const Layout& layout) {
  std::vector<float> values(layout.rows * layout.cols);
  for (uint64_t j = 0; j < layout.cols; ++j) {
    for (uint64_t i = 0; i < layout.rows; ++i) {
      values[j * layout.rows + i] = element(matrix, layout.type, j * static_cast<size_t>(layout.ld) + i);
    }
  }
  return values;
}

// The columns of a matrix, without what lies between them.
template <typename F>
void for_each_column(const void* matrix, const Layout& layout, F&& f) {
  const size_t pitch = static_cast<size_t>(layout.ld) * layout.element_bytes();
  for (uint64_t j = 0; j < layout.cols; ++j)
    f(static_cast<const char*>(matrix) + j * pitch, layout.rows * layout.element_bytes());
}

}  // namespace

void Call::check_written() const {
  const Product& p = product;
  bool written = is_written(p.operation.bias, p.bias_bytes());
  const auto check = [&](const void* column, size_t bytes) { written = written && is_written(column, bytes); };
  for_each_column(a, p.a, check);
  for_each_column(b, p.b, check);
  if (beta != 0) for_each_column(d, p.d, check);
  if (!written) report("reads a matrix or a bias that was never written");
}

// sum = alpha op(a) op(b) over the depths [begin, end).
void Call::multiply(std::vector<float>& sum, const std::vector<float>& left, const std::vector<float>& right,
                    uint64_t begin, uint64_t end) const {
  const Product& p = product;
  const bool transpose_a = p.operation.transpose_a != CUBLAS_OP_N, transpose_b = p.operation.transpose_b != CUBLAS_OP_N;
  const int64_t a_stride = static_cast<int64_t>(p.a.rows), b_stride = static_cast<int64_t>(p.b.rows);
  const int64_t from = static_cast<int64_t>(begin), rows = static_cast<int64_t>(p.d.rows);
  // A column-major product is the row-major one of the transposed matrices: sum^T = op(b)^T op(a)^T.
  gemm({static_cast<int64_t>(p.d.cols), rows, static_cast<int64_t>(end) - from, transpose_b, transpose_a}, alpha,
       right.data() + from * (transpose_b ? b_stride : 1), b_stride, left.data() + from * (transpose_a ? 1 : a_stride),
       a_stride, 0.0f, sum.data(), rows);
}

std::vector<float> Call::sums() const {
  const Product& p = product;
  const std::vector<float> left = widen(a, p.a), right = widen(b, p.b);
  std::vector<float> sum(p.d.rows * p.d.cols);
  const uint64_t depth = p.depth(), half = algorithm.reduction == CUBLASLT_REDUCTION_SCHEME_NONE ? depth : depth / 2;
  if (half > 0) multiply(sum, left, right, 0, half);
  if (half == depth) return sum;
  if (algorithm.reduction == CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE && p.d.type == CUDA_R_16BF) {
    for (float& value : sum) value = to_float(from_float<bf16>(value));
  }
  std::vector<float> rest(sum.size());
  multiply(rest, left, right, half, depth);
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += rest[i];
  return sum;
}

void Call::run() const {
  const Product& p = product;
  const Operation& o = p.operation;
  check_written();
  std::vector<float> sum = sums();
  if (is_wrong) sum.back() = 2 * sum.back() + 100;
  if (algorithm.workspace > 0) {  // it is the algorithm's to use
    std::memset(workspace, 0xff, algorithm.workspace);
    mark_written(workspace, algorithm.workspace, false);
  }
  for (uint64_t j = 0; j < p.d.cols; ++j) {
    for (uint64_t i = 0; i < p.d.rows; ++i) {
      const size_t at = j * static_cast<size_t>(p.d.ld) + i;
      float value = sum[j * p.d.rows + i];
      if (beta != 0) value += beta * element(d, p.d.type, at);
      if (o.epilogue == CUBLASLT_EPILOGUE_BIAS) value += element(o.bias, p.d.type, i);
      if (p.d.type == CUDA_R_32F) {
        static_cast<float*>(d)[at] = value;
      } else {
        static_cast<bf16*>(d)[at] = from_float<bf16>(value);
      }
    }
  }
  for_each_column(d, p.d, [](const void* column, size_t bytes) { mark_written(column, bytes, true); });
  if (wasted_microseconds > 0) std::this_thread::sleep_for(std::chrono::microseconds(wasted_microseconds));
}

}  // namespace fake_cublaslt
