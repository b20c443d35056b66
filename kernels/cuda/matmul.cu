// matmul.cu: matrix products through cuBLASLt. Compute-bound: 2 M N K operations.
//
// The library takes two operands of one dtype whose rows begin at multiples of 16 bytes; everything else is copied for
// it (matmul_staging.cu). Which of its algorithms computes a product is chosen in matmul_tuning.cu.
//
// cuBLASLt is column-major. What is row-major here is the transposed matrix there, so a product is computed as
// out^T = op(b)^T op(a)^T: the operands change places, and nothing is transposed.
#include "kernels/cuda/matmul.h"

#include <algorithm>
#include <climits>
#include <stdexcept>
#include <utility>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda_workspace.h"
#include "kernels/operands.h"

namespace {

cudaDataType_t data_type(DType dtype) { return dtype == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF; }

}  // namespace

void check_cublaslt(cublasStatus_t status, const std::string& what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error("cuBLASLt: " + what + ": " + cublaslt().status_name(status));
}

CudaMatmul::CudaMatmul(const CudaOptions& options, std::string device)
    : options_(options), device_(std::move(device)) {}

CudaMatmul::~CudaMatmul() {
  products_.clear();
  if (handle_) cublaslt().destroy(handle_);
}

// A single row may have any pitch: one that its elements could have.
int64_t CudaMatmul::pitch(const Tensor& t) {
  if (t.rows() > 1) return t.leading_dimension();
  const int64_t whole = kWideAccess / static_cast<int64_t>(dtype_size(t.dtype));
  return divide_up(t.cols(), whole) * whole;
}

// The largest power of two, kWideAccess at most, that divides the address of every row.
int64_t CudaMatmul::row_alignment(const Tensor& t) {
  const auto bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data)) |
                    pitch(t) * static_cast<int64_t>(dtype_size(t.dtype)) | kWideAccess;
  return bits & -bits;
}

// The library's sizes are ints.
bool CudaMatmul::in_range(const Tensor& out, const Tensor& a, const Tensor& b) {
  return std::max({out.rows(), out.cols(), a.rows(), a.cols(), pitch(out), pitch(a), pitch(b)}) <= INT_MAX;
}

void CudaMatmul::run(Tensor out, Tensor a, Tensor b, const MatmulOptions& options, void* workspace,
                     cudaStream_t stream) {
  last_.clear();
  if (!in_range(out, a, b)) return run_plain(out, a, b, options, "a side of 2^31 or more", stream);
  const Staging needed = staging(out, a, b, options.bias);
  if (needed.any()) return run_in_pieces(out, a, b, options, needed, workspace, stream);
  if (run_by_library(out, a, b, options, {workspace, kCublasWorkspaceBytes}, stream)) return;
  const Product& product = *last_.back();
  throw std::runtime_error("cuBLASLt has no algorithm for the matrix product " + text(product.kind) + " (" +
                           cublaslt().status_name(product.status) + ")");
}

bool CudaMatmul::run_by_library(const Tensor& out, const Tensor& a, const Tensor& b, const MatmulOptions& options,
                                Workspace workspace, cudaStream_t stream) {
  const Kind kind = {.m = out.rows(),
                     .n = out.cols(),
                     .k = options.transpose_a ? a.rows() : a.cols(),
                     .pitch_a = pitch(a),
                     .pitch_b = pitch(b),
                     .pitch_out = pitch(out),
                     .alignment = std::min({row_alignment(a), row_alignment(b), row_alignment(out)}),
                     .workspace = static_cast<int64_t>(workspace.bytes),
                     .operands = a.dtype,
                     .result = out.dtype,
                     .transpose_a = options.transpose_a,
                     .transpose_b = options.transpose_b,
                     .accumulate = options.accumulate,
                     .bias = !options.bias.empty()};
  const Call call = {out, a.data, b.data, options.bias.data, options.alpha, workspace.memory, stream};
  Product& product = product_for(kind);
  last_.push_back(&product);
  choose(product, call);
  if (!product.algorithm) {
    if (product.distrusted.empty()) return false;
    run_plain(out, a, b, options, "cuBLASLt's results are wrong", stream);
    return true;
  }
  const cublasStatus_t status = launch(product, *product.algorithm, call);
  if (status == CUBLAS_STATUS_SUCCESS) return true;
  // The library only says that something failed; it may have been an earlier kernel.
  if (const cudaError_t error = cudaPeekAtLastError(); error != cudaSuccess) throw launch_error(error, "matmul");
  check_cublaslt(status, text(kind));
  return false;
}

void CudaMatmul::run_plain(const Tensor& out, const Tensor& a, const Tensor& b, const MatmulOptions& options,
                           const char* why, cudaStream_t stream) {
  const int64_t k = options.transpose_a ? a.rows() : a.cols();
  ++plain_["[" + std::to_string(out.rows()) + "," + std::to_string(k) + "]x[" + std::to_string(k) + "," +
           std::to_string(out.cols()) + "] " + dtype_name(a.dtype) + " and " + dtype_name(b.dtype) + " to " +
           dtype_name(out.dtype) + " (" + why + ")"];
  matmul_plain(out, a, b, options, stream);
}

std::string CudaMatmul::slow_products() const {
  constexpr size_t kMostNamed = 4;
  if (plain_.empty()) return "";
  std::string line = "matrix products that the plain kernel computed, which is slow: ";
  size_t named = 0;
  for (const auto& [product, count] : plain_) {
    if (named == kMostNamed) return line + "; and " + std::to_string(plain_.size() - named) + " more kinds";
    line += (named++ > 0 ? "; " : "") + std::to_string(count) + " x " + product;
  }
  return line;
}

CudaMatmul::Product& CudaMatmul::product_for(const Kind& kind) {
  const auto found = products_.find(kind);
  if (found != products_.end()) return found->second;
  if (!handle_) check_cublaslt(cublaslt().create(&handle_), "starting");
  const std::string name = text(kind);
  // A row-major matrix of r rows and c columns is described as column-major, c by r.
  const auto layout = [&](DType dtype, bool transposed, int64_t rows, int64_t cols, int64_t leading_dimension) {
    if (transposed) std::swap(rows, cols);
    cublasLtMatrixLayout_t made = nullptr;
    check_cublaslt(cublaslt().layout_create(&made, data_type(dtype), static_cast<uint64_t>(cols),
                                            static_cast<uint64_t>(rows), leading_dimension),
                   "describing a matrix of " + name);
    return std::unique_ptr<cublasLtMatrixLayoutOpaque_t, Destroy>(made);
  };
  Product product = {.kind = kind,
                     .operation = nullptr,
                     .a = layout(kind.operands, kind.transpose_a, kind.m, kind.k, kind.pitch_a),
                     .b = layout(kind.operands, kind.transpose_b, kind.k, kind.n, kind.pitch_b),
                     .out = layout(kind.result, false, kind.m, kind.n, kind.pitch_out),
                     .algorithm = {}};
  const bool tf32 = options_.tf32 && kind.operands == DType::kF32;
  cublasLtMatmulDesc_t operation = nullptr;
  check_cublaslt(
      cublaslt().operation_create(&operation, tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F),
      "describing " + name);
  product.operation.reset(operation);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    check_cublaslt(cublaslt().operation_set(operation, attribute, &value, sizeof value), "describing " + name);
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, static_cast<int32_t>(kind.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N));
  set(CUBLASLT_MATMUL_DESC_TRANSB, static_cast<int32_t>(kind.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N));
  set(CUBLASLT_MATMUL_DESC_EPILOGUE,
      static_cast<uint32_t>(kind.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT));
  if (kind.bias) {
    set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<int32_t>(data_type(kind.result)));
    // Any address of the right alignment, which is what an algorithm is judged by before a product brings the real one.
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, reinterpret_cast<const void*>(kWideAccess));
  }
  recall(product);
  return products_.emplace(kind, std::move(product)).first->second;
}

cublasStatus_t CudaMatmul::launch(const Product& product, const Algorithm& algorithm, const Call& call) const {
  if (product.kind.bias) {
    const cublasStatus_t status = cublaslt().operation_set(product.operation.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                           &call.bias, sizeof call.bias);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
  }
  const float beta = product.kind.accumulate ? 1.0f : 0.0f;
  return cublaslt().matmul(handle_, product.operation.get(), &call.alpha, call.b, product.b.get(), call.a,
                           product.a.get(), &beta, call.out.data, product.out.get(), call.out.data, product.out.get(),
                           &algorithm.code, call.workspace, static_cast<size_t>(product.kind.workspace), call.stream);
}

// ---- the backend's operations

void CudaBackend::matmul(Tensor out, Tensor a, Tensor b, const MatmulOptions& options) {
  const MatmulShape shape = check_matmul(out, a, b, options);
  const Timed timed(*this, "matmul", 2.0 * shape.m * shape.n * shape.k,
                    static_cast<double>(a.bytes() + b.bytes() + out.bytes() * (options.accumulate ? 2 : 1)));
  matmul_->run(out, a, b, options, scratch(kCublasWorkspaceBytes), stream_);
}

std::string CudaBackend::slow_products() const { return matmul_->slow_products(); }
