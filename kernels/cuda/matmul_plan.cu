// matmul_plan.cu: descriptors of a product for cuBLASLt, and the question which algorithms it has.
#include "kernels/cuda/matmul_plan.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <stdexcept>

namespace {

cudaDataType_t data_type(DType dtype) { return dtype == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF; }

const char* epilogue_name(MatmulEpilogue epilogue) {
  switch (epilogue) {
    case MatmulEpilogue::kNone: return "";
    case MatmulEpilogue::kBias: return " +bias";
    case MatmulEpilogue::kGeluGradient: return " *gelu'";
  }
  return "?";
}

cublasLtEpilogue_t epilogue_code(MatmulEpilogue epilogue) {
  switch (epilogue) {
    case MatmulEpilogue::kNone: return CUBLASLT_EPILOGUE_DEFAULT;
    case MatmulEpilogue::kBias: return CUBLASLT_EPILOGUE_BIAS;
    case MatmulEpilogue::kGeluGradient: return CUBLASLT_EPILOGUE_DGELU;
  }
  return CUBLASLT_EPILOGUE_DEFAULT;
}

}  // namespace

void check_cublaslt(cublasStatus_t status, const std::string& what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw std::runtime_error("cuBLASLt: " + what + ": " + cublaslt().status_name(status));
  }
}

uint32_t alignment_of(const void* address) {
  uint32_t alignment = 256;
  while (reinterpret_cast<uintptr_t>(address) % alignment != 0) alignment /= 2;
  return alignment;
}

std::string MatmulKey::text() const {
  auto numbers = [](std::initializer_list<int64_t> values) {
    std::string text;
    for (const int64_t value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
    return text;
  };
  return "[" + std::to_string(m) + "," + std::to_string(k) + "]x[" + std::to_string(k) + "," + std::to_string(n) +
         "] " + dtype_name(operands) + (tf32 ? " (tf32)" : "") + " to " + dtype_name(result) + " " +
         (transpose_a ? "T" : "N") + (transpose_b ? "T" : "N") + (accumulate ? " accumulated" : "") +
         epilogue_name(epilogue) + ", pitches " + numbers({lda, ldb, ldd, ld_extra}) + ", aligned to " +
         numbers({align_a, align_b, align_d, align_extra}) + ", workspace " + std::to_string(workspace);
}

std::string MatmulAlgorithm::text() const {
  unsigned char bytes[sizeof code];
  std::memcpy(bytes, &code, sizeof bytes);
  std::string text;
  for (const unsigned char byte : bytes) {
    constexpr const char* kDigits = "0123456789abcdef";
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

bool MatmulAlgorithm::read(const std::string& text) {
  unsigned char bytes[sizeof code];
  if (text.size() != 2 * sizeof bytes) return false;
  if (text.find_first_not_of("0123456789abcdef") != std::string::npos) return false;
  for (size_t i = 0; i < sizeof bytes; ++i) {
    bytes[i] = static_cast<unsigned char>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  }
  std::memcpy(&code, bytes, sizeof bytes);
  return true;
}

size_t MatmulKeyHash::operator()(const MatmulKey& key) const {
  const int flags = key.transpose_a | key.transpose_b << 1 | key.accumulate << 2 | key.tf32 << 3;
  uint64_t hash = 0;
  for (const uint64_t part :
       {static_cast<uint64_t>(key.m), static_cast<uint64_t>(key.n), static_cast<uint64_t>(key.k),
        static_cast<uint64_t>(key.lda), static_cast<uint64_t>(key.ldb), static_cast<uint64_t>(key.ldd),
        static_cast<uint64_t>(key.ld_extra), static_cast<uint64_t>(key.align_a), static_cast<uint64_t>(key.align_b),
        static_cast<uint64_t>(key.align_d), static_cast<uint64_t>(key.align_extra), static_cast<uint64_t>(key.operands),
        static_cast<uint64_t>(key.result), static_cast<uint64_t>(key.epilogue), static_cast<uint64_t>(flags),
        static_cast<uint64_t>(key.workspace)}) {
    hash = (hash ^ part) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return static_cast<size_t>(hash);
}

MatmulPlan::Layout MatmulPlan::make_layout(DType dtype, int64_t rows, int64_t cols, int64_t leading_dimension) {
  cublasLtMatrixLayout_t layout = nullptr;
  check_cublaslt(cublaslt().layout_create(&layout, data_type(dtype), static_cast<uint64_t>(rows),
                                          static_cast<uint64_t>(cols), leading_dimension),
                 "describing a matrix");
  return Layout(layout);
}

// A row-major matrix of r rows and c columns is described as column-major, c by r.
MatmulPlan::MatmulPlan(cublasLtHandle_t handle, const MatmulKey& key)
    : handle_(handle),
      key_(key),
      a_(make_layout(key.operands, key.transpose_a ? key.m : key.k, key.transpose_a ? key.k : key.m, key.lda)),
      b_(make_layout(key.operands, key.transpose_b ? key.k : key.n, key.transpose_b ? key.n : key.k, key.ldb)),
      d_(make_layout(key.result, key.n, key.m, key.ldd)) {
  cublasLtMatmulDesc_t operation = nullptr;
  const cublasComputeType_t compute = key.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
  check_cublaslt(cublaslt().operation_create(&operation, compute, CUDA_R_32F), "describing " + key.text());
  operation_.reset(operation);
  auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    check_cublaslt(cublaslt().operation_set(operation, attribute, &value, sizeof value), "describing " + key.text());
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, static_cast<int32_t>(key.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N));
  set(CUBLASLT_MATMUL_DESC_TRANSB, static_cast<int32_t>(key.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N));
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<uint32_t>(epilogue_code(key.epilogue)));
  if (key.epilogue == MatmulEpilogue::kBias) {
    set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<int32_t>(data_type(key.result)));
  }
  if (key.epilogue == MatmulEpilogue::kGeluGradient) {
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, static_cast<int32_t>(data_type(key.result)));
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, key.ld_extra);
  }
  // What judges an algorithm looks at this pointer's alignment. accepts() comes before the first product brings one.
  set_extra(reinterpret_cast<const void*>(static_cast<uintptr_t>(key.align_extra)));
}

void MatmulPlan::set_extra(const void* extra) {
  if (key_.epilogue == MatmulEpilogue::kNone) return;
  const cublasLtMatmulDescAttributes_t pointer = key_.epilogue == MatmulEpilogue::kBias
                                                     ? CUBLASLT_MATMUL_DESC_BIAS_POINTER
                                                     : CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER;
  const cublasStatus_t status = cublaslt().operation_set(operation_.get(), pointer, &extra, sizeof extra);
  if (status != CUBLAS_STATUS_SUCCESS) check_cublaslt(status, "the epilogue of " + key_.text());
}

std::vector<MatmulAlgorithm> MatmulPlan::candidates(int count, const MatmulOperands& operands, cublasStatus_t& status) {
  cublasLtMatmulPreference_t created = nullptr;
  check_cublaslt(cublaslt().preference_create(&created), "describing a preference");
  const Preference preference(created);
  auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check_cublaslt(cublaslt().preference_set(preference.get(), attribute, &value, sizeof value),
                   "describing a preference");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(key_.workspace));
  // The other schemes add partial sums in the result's dtype: a bf16 result would be rounded more than once.
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key_.align_b);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key_.align_a);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key_.align_d);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key_.align_d);

  set_extra(operands.extra);
  cublasLtMatmulHeuristicResult_t results[kMostCandidates] = {};
  int found = 0;
  status = cublaslt().heuristic(handle_, operation_.get(), b_.get(), a_.get(), d_.get(), d_.get(), preference.get(),
                                std::min(count, kMostCandidates), results, &found);
  std::vector<MatmulAlgorithm> algorithms;
  if (status != CUBLAS_STATUS_SUCCESS) return algorithms;
  for (int i = 0; i < found; ++i) {
    const cublasLtMatmulHeuristicResult_t& result = results[i];
    if (result.state != CUBLAS_STATUS_SUCCESS) {
      status = result.state;
    } else if (result.workspaceSize <= key_.workspace) {
      algorithms.push_back({result.algo});
    }
  }
  return algorithms;
}

bool MatmulPlan::accepts(const MatmulAlgorithm& algorithm) const {
  cublasLtMatmulHeuristicResult_t result = {};
  const cublasStatus_t status =
      cublaslt().check(handle_, operation_.get(), b_.get(), a_.get(), d_.get(), d_.get(), &algorithm.code, &result);
  return status == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= key_.workspace;
}

cublasStatus_t MatmulPlan::launch(const MatmulAlgorithm& algorithm, const MatmulOperands& operands) {
  set_extra(operands.extra);
  const float beta = key_.accumulate ? 1.0f : 0.0f;
  return cublaslt().matmul(handle_, operation_.get(), &operands.alpha, operands.b, b_.get(), operands.a, a_.get(),
                           &beta, operands.d, d_.get(), operands.d, d_.get(), &algorithm.code, operands.workspace,
                           key_.workspace, operands.stream);
}
