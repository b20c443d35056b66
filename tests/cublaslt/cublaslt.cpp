// cublaslt.cpp: cuBLASLt on the CPU, as far as kernels/cuda uses it, for tests/cuda_on_cpu and tests/ptx (device.h).
// Descriptors store what they are told and refuse what the library refuses; a product is checked when it is enqueued
// and computed (product.cpp) when its stream gets there.
//
// The algorithms offered differ in what they demand (alignment, workspace, a way to add partial sums) and one of them
// in its last bits, so that a caller who ignores their conditions fails. Choices by time must be repeatable here, so
// every algorithm but one wastes some: all but the first in the list, or but number FAKE_CUBLASLT_ALGORITHM.
// FAKE_CUBLASLT_NO_ALGORITHM=1: the heuristic finds none. FAKE_CUBLASLT_WRONG_ALGORITHMS=2: the first two in its list
// compute one number wrongly.
#include <cublasLt.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "tests/cublaslt/device.h"
#include "tests/cublaslt/product.h"

struct cublasLtContext {
  int unused = 0;
};

using namespace fake_cublaslt;

namespace {

constexpr uint64_t kMagic = 0x6c74636f6d70ull;
constexpr size_t kVersion = 990000;

struct Preference : cublasLtMatmulPreferenceOpaque_t {
  uint64_t workspace = 0;
  uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
  uint32_t align_a = 256, align_b = 256, align_c = 256, align_d = 256;
};

const Layout& of(cublasLtMatrixLayout_t layout) { return *static_cast<const Layout*>(layout); }
const Operation& of(cublasLtMatmulDesc_t operation) { return *static_cast<const Operation*>(operation); }
const Preference& of(cublasLtMatmulPreference_t preference) { return *static_cast<const Preference*>(preference); }

template <typename T>
cublasStatus_t set(T& attribute, const void* value, size_t bytes) {
  if (!value || bytes != sizeof attribute) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&attribute, value, sizeof attribute);
  return CUBLAS_STATUS_SUCCESS;
}

// ---- algorithms

constexpr Algorithm kAlgorithms[] = {{34, 64 << 10, 1, CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE},  // rounds partial sums
                                     {21, 0, 16, CUBLASLT_REDUCTION_SCHEME_NONE},
                                     {66, 1 << 20, 16, CUBLASLT_REDUCTION_SCHEME_NONE},
                                     {24, 256 << 10, 1, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE},  // K in two halves
                                     {0, 0, 1, CUBLASLT_REDUCTION_SCHEME_NONE}};

// What the library writes into an algorithm: which one, what kind of product it was made for, its position in the list.
cublasLtMatmulAlgo_t encode(const Algorithm& algorithm, uint64_t kind, uint64_t position) {
  cublasLtMatmulAlgo_t code = {};
  code.data[0] = kMagic;
  code.data[1] = algorithm.id;
  code.data[2] = algorithm.workspace;
  code.data[3] = kind;
  code.data[4] = position;
  code.data[7] = (kMagic ^ algorithm.id * 0x9e3779b97f4a7c15ull) + kind;
  return code;
}

const Algorithm* decode(const cublasLtMatmulAlgo_t& code, uint64_t kind) {
  for (const Algorithm& algorithm : kAlgorithms) {
    const cublasLtMatmulAlgo_t expected = encode(algorithm, kind, code.data[4]);
    if (std::memcmp(&expected, &code, sizeof code) == 0) return &algorithm;
  }
  return nullptr;
}

// Microseconds that an algorithm wastes.
uint64_t wasted_time(const cublasLtMatmulAlgo_t& code) {
  const char* const quick = std::getenv("FAKE_CUBLASLT_ALGORITHM");
  return code.data[4] == (quick ? std::strtoull(quick, nullptr, 10) : 0) ? 0 : 500;
}

// ---- a product

bool is_layout(const Layout& layout) {
  return layout.rows > 0 && layout.cols > 0 && layout.ld >= static_cast<int64_t>(layout.rows);
}

// The table "supported data types" of cublasLtMatmul for fp32 arithmetic, as far as it concerns fp32 and bf16; a bias
// has the type of the result.
cublasStatus_t check_types(const Product& p) {
  const Operation& o = p.operation;
  const bool bf16_operands = p.a.type == CUDA_R_16BF && p.b.type == CUDA_R_16BF;
  const bool fp32_operands = p.a.type == CUDA_R_32F && p.b.type == CUDA_R_32F;
  if (o.compute != CUBLAS_COMPUTE_32F && o.compute != CUBLAS_COMPUTE_32F_FAST_TF32) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (bf16_operands && o.compute != CUBLAS_COMPUTE_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (!(fp32_operands && p.d.type == CUDA_R_32F) &&
      !(bf16_operands && (p.d.type == CUDA_R_16BF || p.d.type == CUDA_R_32F))) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  if (o.bias_type != -1 && o.bias_type != p.d.type) return CUBLAS_STATUS_NOT_SUPPORTED;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t check_product(const Product& p, const Layout& c) {
  const Operation& o = p.operation;
  if (!is_layout(p.a) || !is_layout(p.b) || !is_layout(p.d) || !(c == p.d)) return CUBLAS_STATUS_INVALID_VALUE;
  const uint64_t rows = o.transpose_a == CUBLAS_OP_N ? p.a.rows : p.a.cols;
  const uint64_t cols = o.transpose_b == CUBLAS_OP_N ? p.b.cols : p.b.rows;
  const uint64_t depth = o.transpose_b == CUBLAS_OP_N ? p.b.rows : p.b.cols;
  if (rows != p.d.rows || cols != p.d.cols || depth != p.depth()) return CUBLAS_STATUS_INVALID_VALUE;
  // "Routines that don't dereference this pointer depend on its value to determine expected pointer alignment."
  if (o.epilogue == CUBLASLT_EPILOGUE_BIAS && !o.bias) return CUBLAS_STATUS_INVALID_VALUE;
  return check_types(p);
}

bool is_aligned(const void* address, size_t alignment) { return reinterpret_cast<uintptr_t>(address) % alignment == 0; }

// Whether an algorithm can work with these pitches, and with pointers aligned as given.
bool fits(const Algorithm& algorithm, const Product& p, uint32_t align_a, uint32_t align_b, uint32_t align_d) {
  const uint32_t alignment = algorithm.alignment;
  if (alignment == 1) return true;
  for (const Layout* layout : {&p.a, &p.b, &p.d}) {
    if (static_cast<uint64_t>(layout->ld) * layout->element_bytes() % alignment != 0) return false;
  }
  return align_a % alignment == 0 && align_b % alignment == 0 && align_d % alignment == 0 &&
         is_aligned(p.operation.bias, alignment);
}

bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
  return first < second + b_bytes && second < first + a_bytes;
}

cublasStatus_t mistake(const char* what) {
  report(what);
  return CUBLAS_STATUS_INVALID_VALUE;
}

// What `Call` points to is device memory, and large enough.
cublasStatus_t check_memory(const Call& call) {
  const Product& p = call.product;
  const size_t workspace = call.algorithm.workspace;
  const std::pair<const void*, const Layout*> matrices[] = {{call.a, &p.a}, {call.b, &p.b}, {call.d, &p.d}};
  for (const auto& [matrix, layout] : matrices) {
    if (!is_device_range(matrix, layout->bytes())) return mistake("a matrix is not inside device memory");
    if (!is_aligned(matrix, layout->element_bytes())) return mistake("a matrix is not aligned to its elements");
    if (overlap(matrix, layout->bytes(), call.workspace, workspace)) return mistake("the workspace overlaps a matrix");
    if (layout != &p.d && overlap(matrix, layout->bytes(), call.d, p.d.bytes()))
      return mistake("the result overlaps an operand");
  }
  if (workspace > 0 && !(is_device_range(call.workspace, workspace) && is_aligned(call.workspace, 256)))
    return mistake("the workspace is not inside device memory, or not aligned to 256 bytes");
  if (p.bias_bytes() > 0 && !is_device_range(p.operation.bias, p.bias_bytes()))
    return mistake("the bias is not inside device memory");
  return CUBLAS_STATUS_SUCCESS;
}

uint32_t alignment_of(const void* address) {
  uint32_t alignment = 256;
  while (!is_aligned(address, alignment)) alignment /= 2;
  return alignment;
}

}  // namespace

// ---- the interface

cublasStatus_t cublasLtCreate(cublasLtHandle_t* lightHandle) {
  if (!lightHandle) return CUBLAS_STATUS_INVALID_VALUE;
  *lightHandle = new cublasLtContext;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t lightHandle) {
  delete lightHandle;
  return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion() { return kVersion; }

const char* cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "CUBLAS_STATUS_OTHER";
  }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* matLayout, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
  if (!matLayout) return CUBLAS_STATUS_INVALID_VALUE;
  if (type != CUDA_R_32F && type != CUDA_R_16BF) return CUBLAS_STATUS_NOT_SUPPORTED;
  Layout* const layout = new Layout;
  layout->type = type;
  layout->rows = rows;
  layout->cols = cols;
  layout->ld = ld;
  *matLayout = layout;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t matLayout) {
  delete static_cast<Layout*>(matLayout);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* matmulDesc, cublasComputeType_t computeType,
                                        cudaDataType scaleType) {
  if (!matmulDesc) return CUBLAS_STATUS_INVALID_VALUE;
  if (scaleType != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
  Operation* const operation = new Operation;
  operation->compute = computeType;
  *matmulDesc = operation;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t matmulDesc) {
  delete static_cast<Operation*>(matmulDesc);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t matmulDesc, cublasLtMatmulDescAttributes_t attr,
                                              const void* buf, size_t sizeInBytes) {
  if (!matmulDesc) return CUBLAS_STATUS_INVALID_VALUE;
  Operation& operation = *static_cast<Operation*>(matmulDesc);
  switch (attr) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return set(operation.transpose_a, buf, sizeInBytes);
    case CUBLASLT_MATMUL_DESC_TRANSB: return set(operation.transpose_b, buf, sizeInBytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return set(operation.epilogue, buf, sizeInBytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return set(operation.bias, buf, sizeInBytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return set(operation.bias_type, buf, sizeInBytes);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* pref) {
  if (!pref) return CUBLAS_STATUS_INVALID_VALUE;
  *pref = new Preference;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t pref) {
  delete static_cast<Preference*>(pref);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref,
                                                    cublasLtMatmulPreferenceAttributes_t attr, const void* buf,
                                                    size_t sizeInBytes) {
  if (!pref) return CUBLAS_STATUS_INVALID_VALUE;
  Preference& preference = *static_cast<Preference*>(pref);
  switch (attr) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return set(preference.workspace, buf, sizeInBytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return set(preference.reductions, buf, sizeInBytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return set(preference.align_a, buf, sizeInBytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return set(preference.align_b, buf, sizeInBytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return set(preference.align_c, buf, sizeInBytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return set(preference.align_d, buf, sizeInBytes);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t lightHandle, cublasLtMatmulDesc_t operationDesc,
                                              cublasLtMatrixLayout_t Adesc, cublasLtMatrixLayout_t Bdesc,
                                              cublasLtMatrixLayout_t Cdesc, cublasLtMatrixLayout_t Ddesc,
                                              cublasLtMatmulPreference_t preference, int requestedAlgoCount,
                                              cublasLtMatmulHeuristicResult_t heuristicResultsArray[],
                                              int* returnAlgoCount) {
  if (!lightHandle) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!operationDesc || !Adesc || !Bdesc || !Cdesc || !Ddesc || !preference || requestedAlgoCount <= 0 ||
      !heuristicResultsArray || !returnAlgoCount) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  *returnAlgoCount = 0;
  if (std::getenv("FAKE_CUBLASLT_NO_ALGORITHM")) return CUBLAS_STATUS_NOT_SUPPORTED;
  const Product product = {of(operationDesc), of(Adesc), of(Bdesc), of(Ddesc)};
  const cublasStatus_t status = check_product(product, of(Cdesc));
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const Preference& limits = of(preference);
  for (const Algorithm& algorithm : kAlgorithms) {
    if (*returnAlgoCount == requestedAlgoCount) break;
    const bool reduction_allowed = (algorithm.reduction & limits.reductions) == algorithm.reduction;
    if (!reduction_allowed || algorithm.workspace > limits.workspace) continue;
    if (!fits(algorithm, product, limits.align_a, limits.align_b, std::min(limits.align_c, limits.align_d))) continue;
    cublasLtMatmulHeuristicResult_t result = {};
    result.algo = encode(algorithm, product.kind(), static_cast<uint64_t>(*returnAlgoCount));
    result.workspaceSize = algorithm.workspace;
    result.state = CUBLAS_STATUS_SUCCESS;
    result.wavesCount = 1.0f;
    heuristicResultsArray[(*returnAlgoCount)++] = result;
  }
  return *returnAlgoCount > 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t lightHandle, cublasLtMatmulDesc_t operationDesc,
                                       cublasLtMatrixLayout_t Adesc, cublasLtMatrixLayout_t Bdesc,
                                       cublasLtMatrixLayout_t Cdesc, cublasLtMatrixLayout_t Ddesc,
                                       const cublasLtMatmulAlgo_t* algo, cublasLtMatmulHeuristicResult_t* result) {
  if (!lightHandle) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!operationDesc || !Adesc || !Bdesc || !Cdesc || !Ddesc || !algo || !result) return CUBLAS_STATUS_INVALID_VALUE;
  const Product product = {of(operationDesc), of(Adesc), of(Bdesc), of(Ddesc)};
  const cublasStatus_t status = check_product(product, of(Cdesc));
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const Algorithm* const algorithm = decode(*algo, product.kind());
  if (!algorithm || !fits(*algorithm, product, 256, 256, 256)) return CUBLAS_STATUS_INVALID_VALUE;
  result->workspaceSize = algorithm->workspace;
  result->state = CUBLAS_STATUS_SUCCESS;
  result->wavesCount = 1.0f;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t lightHandle, cublasLtMatmulDesc_t computeDesc, const void* alpha,
                              const void* A, cublasLtMatrixLayout_t Adesc, const void* B, cublasLtMatrixLayout_t Bdesc,
                              const void* beta, const void* C, cublasLtMatrixLayout_t Cdesc, void* D,
                              cublasLtMatrixLayout_t Ddesc, const cublasLtMatmulAlgo_t* algo, void* workspace,
                              size_t workspaceSizeInBytes, cudaStream_t stream) {
  if (!lightHandle) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!computeDesc || !alpha || !A || !Adesc || !B || !Bdesc || !beta || !Cdesc || !D || !Ddesc || !algo) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  Call call = {.product = {of(computeDesc), of(Adesc), of(Bdesc), of(Ddesc)},
               .algorithm = {},
               .alpha = *static_cast<const float*>(alpha),
               .beta = *static_cast<const float*>(beta),
               .a = A,
               .b = B,
               .d = D,
               .workspace = workspace,
               .wasted_microseconds = wasted_time(*algo),
               .is_wrong = false};
  if (C != D) return mistake("only in place (C == D) on the CPU");
  const Product& product = call.product;
  const cublasStatus_t status = check_product(product, of(Cdesc));
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const Algorithm* const algorithm = decode(*algo, product.kind());
  if (!algorithm) return mistake("the algorithm is not one for this product");
  if (!fits(*algorithm, product, alignment_of(A), alignment_of(B), alignment_of(D))) {
    return mistake("the algorithm needs a better alignment");
  }
  if (algorithm->workspace > workspaceSizeInBytes) return CUBLAS_STATUS_INVALID_VALUE;
  call.algorithm = *algorithm;
  const char* const wrong = std::getenv("FAKE_CUBLASLT_WRONG_ALGORITHMS");
  call.is_wrong = wrong && algo->data[4] < std::strtoull(wrong, nullptr, 10);
  const cublasStatus_t memory = check_memory(call);
  if (memory != CUBLAS_STATUS_SUCCESS) return memory;
  return enqueue(stream, [call] { call.run(); }) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                                : CUBLAS_STATUS_EXECUTION_FAILED;
}
