// cublaslt.cpp: a stand-in for libcublasLt.so, loaded by name: products in fp32 and bf16, column-major, with the
// epilogues BIAS and DGELU, sums in double. Against NVIDIA's own header, so codes of attributes are the real ones.
#include <cublasLt.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "tests/ptx/runtime.h"

namespace {

struct Layout {
  cudaDataType type;
  uint64_t rows, cols;
  int64_t ld;
};
struct Operation {
  cublasComputeType_t compute;
  int32_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
  uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void *bias = nullptr, *aux = nullptr;
  int64_t aux_ld = 0;
  int32_t aux_type = -1, bias_type = -1;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t reductions = 0xffffffffu, align[4] = {256, 256, 256, 256};
};
struct Call {
  Operation o;
  Layout a, b, d;
  const void *pa, *pb;
  void* pd;
  float alpha, beta;
  uint64_t id;
  void* workspace;
  size_t workspace_bytes;
};

size_t size_of(cudaDataType t) { return t == CUDA_R_16BF ? 2 : 4; }
float load(const void* p, cudaDataType t, size_t i) {
  if (t == CUDA_R_32F) return static_cast<const float*>(p)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
void store(void* p, cudaDataType t, size_t i, float f) {
  if (t == CUDA_R_32F) {
    static_cast<float*>(p)[i] = f;
    return;
  }
  uint32_t u;
  std::memcpy(&u, &f, 4);
  static_cast<uint16_t*>(p)[i] = f != f ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
size_t span(const Layout& l) { return ((l.cols - 1) * static_cast<size_t>(l.ld) + l.rows) * size_of(l.type); }
void check_columns(const void* p, const Layout& l, const char* what) {
  for (uint64_t j = 0; j < l.cols; ++j) {
    const char* const column = static_cast<const char*>(p) + j * static_cast<size_t>(l.ld) * size_of(l.type);
    if (!ptxsim_is_defined(column, l.rows * size_of(l.type))) {
      ptxsim_finding("undefined matrix",
                     (std::string("cublasLtMatmul reads ") + what + ", which was never written").c_str());
      return;
    }
  }
}

// [k][i] with i across rows of op(a) or columns of op(b).
std::vector<float> widen(const void* p, const Layout& l, bool depth_is_rows, size_t depth, size_t across) {
  std::vector<float> out(depth * across);
  for (size_t k = 0; k < depth; ++k)
    for (size_t i = 0; i < across; ++i)
      out[k * across + i] =
          load(p, l.type, depth_is_rows ? i * static_cast<size_t>(l.ld) + k : k * static_cast<size_t>(l.ld) + i);
  return out;
}

void run(void* data) {
  const Call& c = *static_cast<const Call*>(data);
  const bool ta = c.o.transpose_a != CUBLAS_OP_N, tb = c.o.transpose_b != CUBLAS_OP_N;
  const size_t m = c.d.rows, n = c.d.cols, depth = ta ? c.a.rows : c.a.cols;
  check_columns(c.pa, c.a, "an operand");
  check_columns(c.pb, c.b, "an operand");
  if (c.beta != 0) check_columns(c.pd, c.d, "the matrix it adds to");
  if (c.o.epilogue == CUBLASLT_EPILOGUE_BIAS && !ptxsim_is_defined(c.o.bias, m * size_of(c.d.type)))
    ptxsim_finding("undefined matrix", "cublasLtMatmul reads a bias that was never written");
  const std::vector<float> a = widen(c.pa, c.a, ta, depth, m), b = widen(c.pb, c.b, !tb, depth, n);
  std::vector<double> sum(m);
  if (c.workspace_bytes) {
    std::memset(c.workspace, 0xff, c.workspace_bytes);
    ptxsim_mark_defined(c.workspace, c.workspace_bytes, false);
  }
  for (size_t j = 0; j < n; ++j) {
    std::fill(sum.begin(), sum.end(), 0.0);
    for (size_t k = 0; k < depth; ++k) {
      const double x = b[k * n + j];
      const float* const row = &a[k * m];
      for (size_t i = 0; i < m; ++i) sum[i] += row[i] * x;
    }
    for (size_t i = 0; i < m; ++i) {
      const size_t at = j * static_cast<size_t>(c.d.ld) + i;
      float value = static_cast<float>(c.alpha * sum[i]);
      if (c.beta != 0) value += c.beta * load(c.pd, c.d.type, at);
      if (c.o.epilogue == CUBLASLT_EPILOGUE_BIAS) value += load(c.o.bias, c.d.type, i);
      if (c.o.epilogue == CUBLASLT_EPILOGUE_DGELU) {
        const double x = load(c.o.aux, c.d.type, j * static_cast<size_t>(c.o.aux_ld) + i), s = std::sqrt(2 / M_PI),
                     t = std::tanh(s * (x + 0.044715 * x * x * x));
        value = static_cast<float>(value * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * s * (1 + 3 * 0.044715 * x * x)));
      }
      store(c.pd, c.d.type, at, value);
    }
    ptxsim_mark_defined(static_cast<char*>(c.pd) + j * static_cast<size_t>(c.d.ld) * size_of(c.d.type),
                        m * size_of(c.d.type), true);
  }
}

constexpr uint64_t kMagic = 0x707478;
struct Offer {
  uint64_t id;
  size_t workspace;
  uint32_t alignment;
};
constexpr Offer kOffers[] = {{1, 0, 16}, {2, 1 << 20, 16}, {3, 0, 0}};

cublasStatus_t check(const Operation& o, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  const bool ta = o.transpose_a != CUBLAS_OP_N, tb = o.transpose_b != CUBLAS_OP_N;
  if ((ta ? a.cols : a.rows) != d.rows || (tb ? b.rows : b.cols) != d.cols ||
      (ta ? a.rows : a.cols) != (tb ? b.cols : b.rows))
    return CUBLAS_STATUS_INVALID_VALUE;
  if (c.type != d.type || c.rows != d.rows || c.cols != d.cols || c.ld != d.ld) return CUBLAS_STATUS_INVALID_VALUE;
  if (a.type != b.type || (a.type == CUDA_R_32F && d.type != CUDA_R_32F)) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (o.bias_type != -1 && o.bias_type != d.type) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (o.epilogue == CUBLASLT_EPILOGUE_DGELU && (d.type != CUDA_R_16BF || o.aux_ld % 8 || !o.aux))
    return CUBLAS_STATUS_NOT_SUPPORTED;
  if (o.epilogue == CUBLASLT_EPILOGUE_BIAS && !o.bias) return CUBLAS_STATUS_INVALID_VALUE;
  return CUBLAS_STATUS_SUCCESS;
}
bool multiple(const void* p, uint32_t n) { return reinterpret_cast<uintptr_t>(p) % n == 0; }
bool fits(const Offer& offer, const Layout& l) {
  return offer.alignment == 0 || static_cast<size_t>(l.ld) * size_of(l.type) % offer.alignment == 0;
}

template <typename T>
cublasStatus_t set(T& to, const void* from, size_t bytes) {
  if (!from || bytes != sizeof to) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&to, from, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
const Layout& of(cublasLtMatrixLayout_t l) { return *reinterpret_cast<const Layout*>(l); }
Operation& of(cublasLtMatmulDesc_t o) { return *reinterpret_cast<Operation*>(o); }

}  // namespace

extern "C" {
cublasStatus_t cublasLtCreate(cublasLtHandle_t* h) {
  *h = reinterpret_cast<cublasLtHandle_t>(new int);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) {
  delete reinterpret_cast<int*>(h);
  return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
const char* cublasLtGetStatusName(cublasStatus_t s) {
  return s == CUBLAS_STATUS_SUCCESS         ? "CUBLAS_STATUS_SUCCESS"
         : s == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED"
                                            : "CUBLAS_STATUS_INVALID_VALUE";
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType type, uint64_t rows, uint64_t cols,
                                          int64_t ld) {
  if (type != CUDA_R_32F && type != CUDA_R_16BF) return CUBLAS_STATUS_NOT_SUPPORTED;
  *l = reinterpret_cast<cublasLtMatrixLayout_t>(new Layout{type, rows, cols, ld});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(const cublasLtMatrixLayout_t l) {
  delete reinterpret_cast<Layout*>(l);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* o, cublasComputeType_t compute, cudaDataType_t scale) {
  if (scale != CUDA_R_32F || (compute != CUBLAS_COMPUTE_32F && compute != CUBLAS_COMPUTE_32F_FAST_TF32))
    return CUBLAS_STATUS_NOT_SUPPORTED;
  *o = reinterpret_cast<cublasLtMatmulDesc_t>(new Operation{.compute = compute});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(const cublasLtMatmulDesc_t o) {
  delete reinterpret_cast<Operation*>(o);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attr,
                                              const void* buf, size_t bytes) {
  Operation& o = of(desc);
  switch (attr) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return set(o.transpose_a, buf, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB: return set(o.transpose_b, buf, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return set(o.epilogue, buf, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return set(o.bias, buf, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return set(o.aux, buf, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return set(o.aux_ld, buf, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE: return set(o.aux_type, buf, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return set(o.bias_type, buf, bytes);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
  *p = reinterpret_cast<cublasLtMatmulPreference_t>(new Preference);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(const cublasLtMatmulPreference_t p) {
  delete reinterpret_cast<Preference*>(p);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref,
                                                    cublasLtMatmulPreferenceAttributes_t attr, const void* buf,
                                                    size_t bytes) {
  Preference& p = *reinterpret_cast<Preference*>(pref);
  switch (attr) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return set(p.workspace, buf, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return set(p.reductions, buf, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return set(p.align[0], buf, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return set(p.align[1], buf, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return set(p.align[2], buf, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return set(p.align[3], buf, bytes);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t o, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t pref, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int* found) {
  *found = 0;
  const cublasStatus_t status = check(of(o), of(a), of(b), of(c), of(d));
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const Preference& p = *reinterpret_cast<const Preference*>(pref);
  for (const Offer& offer : kOffers) {
    if (*found == wanted || offer.workspace > p.workspace) continue;
    if (offer.alignment && (p.align[0] % 16 || p.align[1] % 16 || p.align[2] % 16 || p.align[3] % 16)) continue;
    if (!fits(offer, of(a)) || !fits(offer, of(b)) || !fits(offer, of(d))) continue;
    cublasLtMatmulHeuristicResult_t r = {};
    r.algo.data[0] = kMagic, r.algo.data[1] = offer.id;
    r.workspaceSize = offer.workspace;
    r.state = CUBLAS_STATUS_SUCCESS;
    results[(*found)++] = r;
  }
  return *found ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t o, cublasLtMatrixLayout_t a,
                                       cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t* algo, cublasLtMatmulHeuristicResult_t* r) {
  const cublasStatus_t status = check(of(o), of(a), of(b), of(c), of(d));
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  for (const Offer& offer : kOffers) {
    if (algo->data[0] != kMagic || algo->data[1] != offer.id || !fits(offer, of(a)) || !fits(offer, of(b)) ||
        !fits(offer, of(d)))
      continue;
    *r = {};
    r->algo = *algo, r->workspaceSize = offer.workspace, r->state = CUBLAS_STATUS_SUCCESS;
    return CUBLAS_STATUS_SUCCESS;
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t o, const void* alpha, const void* A,
                              cublasLtMatrixLayout_t a, const void* B, cublasLtMatrixLayout_t b, const void* beta,
                              const void* C, cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t* algo, void* workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
  cublasLtMatmulHeuristicResult_t r;
  if (!algo) return CUBLAS_STATUS_INVALID_VALUE;
  const cublasStatus_t status = cublasLtMatmulAlgoCheck(nullptr, o, a, b, c, d, algo, &r);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const Operation& op = of(o);
  if (C != D || r.workspaceSize > workspace_bytes) return CUBLAS_STATUS_INVALID_VALUE;
  const auto inside = [](const void* p, const Layout& l) {
    return ptxsim_is_device_range(p, span(l)) && multiple(p, static_cast<uint32_t>(size_of(l.type)));
  };
  const bool wide = algo->data[1] != 3;
  if (!inside(A, of(a)) || !inside(B, of(b)) || !inside(D, of(d)) ||
      (r.workspaceSize && !ptxsim_is_device_range(workspace, r.workspaceSize)) ||
      (op.epilogue == CUBLASLT_EPILOGUE_BIAS && !ptxsim_is_device_range(op.bias, of(d).rows * size_of(of(d).type))) ||
      (wide &&
       (!multiple(A, 16) || !multiple(B, 16) || !multiple(D, 16) || !multiple(op.bias, 16) || !multiple(op.aux, 16)))) {
    ptxsim_finding("cublasLtMatmul",
                   "a matrix, bias or workspace outside device memory or not aligned for this algorithm");
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  ptxsim_enqueue(stream, run,
                 new Call{op, of(a), of(b), of(d), A, B, D, *static_cast<const float*>(alpha),
                          *static_cast<const float*>(beta), algo->data[1], workspace, r.workspaceSize});
  return CUBLAS_STATUS_SUCCESS;
}
}
