// onednn_gemm.cpp: products by oneDNN (versions 2 and 3), which generates code for the processor that is there. In fp32
// its sgemm, which is fast for matrices of any size with any stride and needs no preparation; in bf16 its matmul
// primitive, made once for each shape. Both on the calling thread: the backend divides the work.
#include <omp.h>
#include <dnnl.hpp>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "kernels/cpu/gemm.h"

namespace {

// oneDNN would divide a product among all of OpenMP's threads.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

// Products run in parallel loops, which no exception may leave; and a run without them cannot go on.
[[noreturn]] void give_up(const char* what) {
  std::fprintf(stderr, "train_gpt2: oneDNN cannot multiply two matrices: %s\n", what);
  std::_Exit(1);
}

char transposed(bool yes) { return yes ? 'T' : 'N'; }

constexpr int64_t kMostColumns = 1024, kColumnsAtOnce = 48;  // of the result; a kernel works on up to 48

// What a primitive is made for. beta is 0 or 1.
using Key = std::tuple<int64_t, int64_t, int64_t, bool, bool, int64_t, int64_t, int64_t, float, float>;

struct Bf16Gemm {
  dnnl::memory::desc a, b, c, scratch;
  dnnl::matmul product;
};

dnnl::engine& cpu() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

Bf16Gemm make_bf16_gemm(const GemmShape& s, float alpha, int64_t lda, int64_t ldb, float beta, int64_t ldc) {
  using dnnl::memory;
  const auto matrix = [](int64_t rows, int64_t cols, bool transpose, int64_t stride, memory::data_type type) {
    return memory::desc({rows, cols}, type, transpose ? memory::dims{1, stride} : memory::dims{stride, 1});
  };
  Bf16Gemm gemm = {matrix(s.m, s.k, s.transpose_a, lda, memory::data_type::bf16),
                   matrix(s.k, s.n, s.transpose_b, ldb, memory::data_type::bf16),
                   matrix(s.m, s.n, false, ldc, memory::data_type::f32),
                   {},
                   {}};
  dnnl::post_ops after;
  dnnl::primitive_attr attributes;
#if DNNL_VERSION_MAJOR >= 3
  if (alpha != 1.0f) after.append_eltwise(dnnl::algorithm::eltwise_linear, alpha, 0.0f);
#else
  if (alpha != 1.0f) after.append_eltwise(1.0f, dnnl::algorithm::eltwise_linear, alpha, 0.0f);
#endif
  if (beta != 0.0f) after.append_sum(beta);
  attributes.set_post_ops(after);
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);  // a primitive's own could serve one thread only
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc made(cpu(), gemm.a, gemm.b, gemm.c, attributes);
#else
  const dnnl::matmul::primitive_desc made({gemm.a, gemm.b, gemm.c}, attributes, cpu());
#endif
  gemm.scratch = made.scratchpad_desc();
  gemm.product = dnnl::matmul(made);
  return gemm;
}

// Shapes come from a model's few matrices, cut into tiles; where they do not (samples of many lengths), it starts anew.
constexpr size_t kMostShapes = 1024;

std::shared_ptr<const Bf16Gemm> bf16_gemm(const GemmShape& s, float alpha, int64_t lda, int64_t ldb, float beta,
                                          int64_t ldc) {
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<const Bf16Gemm>> made;
  const Key key{s.m, s.n, s.k, s.transpose_a, s.transpose_b, lda, ldb, ldc, alpha, beta};
  const std::lock_guard lock(mutex);
  if (const auto found = made.find(key); found != made.end()) return found->second;
  if (made.size() >= kMostShapes) made.clear();
  return made[key] = std::make_shared<const Bf16Gemm>(make_bf16_gemm(s, alpha, lda, ldb, beta, ldc));
}

#if defined(__x86_64__)
bool has(dnnl_cpu_isa_t instructions) {
  return (static_cast<unsigned>(dnnl_get_effective_cpu_isa()) & static_cast<unsigned>(instructions)) ==
         static_cast<unsigned>(instructions);
}

bool is_from_amd() { return __builtin_cpu_is("amd"); }
#else
// The instructions that it names are all of x86.
bool has(dnnl_cpu_isa_t) { return false; }

bool is_from_amd() { return false; }
#endif

}  // namespace

// The library packs 384 rows of as many columns as there are, 15 MiB of 12,800; it gets fewer at a time.
void gemm(const GemmShape& shape, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb, float beta,
          float* c, int64_t ldc) {
  const OneThread one_thread;
  const int64_t pieces = divide_up(shape.n, kMostColumns);
  const int64_t columns = pieces < 2 ? shape.n : divide_up(divide_up(shape.n, pieces), kColumnsAtOnce) * kColumnsAtOnce;
  for (int64_t j = 0; j < shape.n; j += columns) {
    const dnnl_status_t status = dnnl_sgemm(transposed(shape.transpose_a), transposed(shape.transpose_b), shape.m,
                                            std::min(columns, shape.n - j), shape.k, alpha, a, lda,
                                            shape.transpose_b ? b + j * ldb : b + j, ldb, beta, c + j, ldc);
    if (status != dnnl_success) give_up(status == dnnl_out_of_memory ? "out of memory" : "unexpected error");
  }
}

bool gemm_bf16(const GemmShape& shape, float alpha, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float beta,
               float* c, int64_t ldc, void* scratch, size_t scratch_bytes) {
  if (!has(dnnl_cpu_isa_avx512_core_bf16)) return false;
  // oneDNN 3 takes a vector's numbers to lie side by side: with m = 1 it ignores a transposed a's lda (3.7.2, 3.9.1),
  // with n = 1 ldc, and so writes beside c (3.7.2). Its sgemm does neither.
  if (std::min({shape.m, shape.n, shape.k}) == 1) return false;
  const OneThread one_thread;
  try {
    const auto made = bf16_gemm(shape, alpha, lda, ldb, beta, ldc);
    if (made->scratch.get_size() > scratch_bytes) return false;
    // oneDNN does not write to its inputs.
    const dnnl::memory in_a(made->a, cpu(), const_cast<bf16*>(a)), in_b(made->b, cpu(), const_cast<bf16*>(b));
    const dnnl::memory out(made->c, cpu(), c), room(made->scratch, cpu(), scratch);
    dnnl::stream stream(cpu());
    made->product.execute(
        stream, {{DNNL_ARG_SRC, in_a}, {DNNL_ARG_WEIGHTS, in_b}, {DNNL_ARG_DST, out}, {DNNL_ARG_SCRATCHPAD, room}});
    stream.wait();
  } catch (const dnnl::error& error) {
    give_up(error.what());
  }
  return true;
}

bool multiplies_bf16_faster() {
  static const bool faster = has(dnnl_cpu_isa_avx512_core_amx) || (has(dnnl_cpu_isa_avx512_core_bf16) && is_from_amd());
  return faster;
}

std::string gemm_description() {
  const dnnl_version_t* const version = dnnl_version();
  std::string text = "oneDNN " + std::to_string(version->major) + "." + std::to_string(version->minor) + "." +
                     std::to_string(version->patch);
  if (has(dnnl_cpu_isa_avx512_core_amx)) return text + " with AMX";
  if (has(dnnl_cpu_isa_avx512_core_bf16)) return text + " with AVX512-BF16";
  if (has(dnnl_cpu_isa_avx512_core)) return text + " with AVX-512";
  if (has(dnnl_cpu_isa_avx2)) return text + " with AVX2";
  return text;
}
