// matmul.cu: matrix products through cuBLASLt. Compute-bound: 2 M N K operations.
//
// Which algorithm is the fastest depends on the shape and is found by trying: the first time a shape is seen, the
// library's best guesses are timed on the real operands, and the winner stays for the whole run. Algorithms differ in
// the order of their sums, so the choice belongs to the result: tuning() keeps it for the next run. Products that
// cuBLASLt does not know are computed by matmul_plain().
#include "kernels/cuda/matmul.h"

#include <algorithm>
#include <climits>
#include <map>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/fastest_way.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul_plain.cuh"
#include "kernels/cuda/matmul_plan.h"
#include "kernels/cuda_workspace.h"
#include "kernels/operands.h"

namespace {

constexpr uint32_t kWideAccess = 16;           // bytes; what fast kernels demand of addresses and pitches
constexpr const char* kSeparate = "separate";  // in the place of an algorithm: GELU's gradient by a kernel of its own

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "asking whether a graph is being recorded");
  return status != cudaStreamCaptureStatusNone;
}

// A matrix that is added to, kept on the host while algorithms are tried on it.
class Saved {
 public:
  Saved(const Tensor& matrix, cudaStream_t stream)
      : matrix_(matrix),
        stream_(stream),
        bytes_(static_cast<size_t>((matrix.rows() - 1) * matrix.leading_dimension() + matrix.cols()) *
               dtype_size(matrix.dtype)) {
    copy(bytes_.data(), matrix.data);
  }
  void restore() { copy(matrix_.data, bytes_.data()); }

 private:
  void copy(void* destination, const void* source) {
    check_cuda(cudaMemcpyAsync(destination, source, bytes_.size(), cudaMemcpyDefault, stream_), "saving a result");
    check_cuda(cudaStreamSynchronize(stream_), "saving a result");
  }

  Tensor matrix_;
  cudaStream_t stream_;
  std::vector<char> bytes_;
};

// ---- which products cuBLASLt can compute

int64_t pitch(const Tensor& t) { return t.rows() == 1 ? t.cols() : t.leading_dimension(); }

// The largest power of two that divides the address of every row.
uint32_t row_alignment(const Tensor& t) {
  return alignment_of(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(t.data) |
                                                    static_cast<size_t>(pitch(t)) * dtype_size(t.dtype)));
}

bool is_wide(const Tensor& t) { return row_alignment(t) % kWideAccess == 0; }

// Operands of one dtype; a result of the same, or fp32; a bias of the result's dtype.
bool cublaslt_knows(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias) {
  if (a.dtype != b.dtype || (a.dtype == DType::kF32 && out.dtype != DType::kF32)) return false;
  if (!bias.empty() && (bias.dtype != out.dtype || alignment_of(bias.data) < kWideAccess)) return false;
  return std::max({out.rows(), out.cols(), a.rows(), a.cols(), pitch(out), pitch(a), pitch(b)}) <= INT_MAX;
}

// Its GELU gradient wants everything in bf16, and rows of whole 16 bytes.
bool gelu_can_be_fused(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& gelu_input) {
  for (const Tensor& t : {out, a, b, gelu_input}) {
    if (t.dtype != DType::kBF16 || !is_wide(t)) return false;
  }
  return out.rows() % 8 == 0 && out.cols() % 8 == 0 && a.rows() % 8 == 0 && a.cols() % 8 == 0;
}

}  // namespace

struct CudaMatmul::State {
  enum class Choice : uint8_t { kNone, kUntried, kFinal };

  // A plan with the algorithm chosen for it.
  struct ChosenPlan {
    ChosenPlan(cublasLtHandle_t handle, const MatmulKey& key) : plan(handle, key) {}

    void launch(const MatmulOperands& operands) {
      const cublasStatus_t result = plan.launch(algorithm, operands);
      if (result != CUBLAS_STATUS_SUCCESS) check_cublaslt(result, plan.key().text());
    }

    MatmulPlan plan;
    Choice choice = Choice::kNone;  // kUntried: the library's first guess, where there was no chance to try others
    bool usable = false;            // there is an algorithm, and (GELU's gradient) it is the better way
    MatmulAlgorithm algorithm = {};
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;  // why there is no algorithm
  };

  CudaOptions options;
  int architecture = 0;
  cublasLtHandle_t handle = nullptr;
  std::unordered_map<MatmulKey, std::unique_ptr<ChosenPlan>, MatmulKeyHash> plans;
  std::map<std::string, std::string> remembered;  // from set_tuning(), by the key's text

  ~State() {
    plans.clear();
    if (handle) cublaslt().destroy(handle);
  }

  ChosenPlan& plan_for(const MatmulKey& key);
  void recall(ChosenPlan& chosen) const;
  void choose(ChosenPlan& chosen, const MatmulOperands& operands, const Tensor& out) const;
  void choose_gelu(ChosenPlan& fused, ChosenPlan& product, const MatmulOperands& operands, const Tensor& out,
                   const Tensor& gelu_input, const GeluBackward& gelu_backward) const;
  std::string header() const;
};

CudaMatmul::CudaMatmul(const CudaOptions& options, int architecture)
    : state_(new State{.options = options, .architecture = architecture, .handle = {}, .plans = {}, .remembered = {}}) {
}

CudaMatmul::~CudaMatmul() = default;

CudaMatmul::State::ChosenPlan& CudaMatmul::State::plan_for(const MatmulKey& key) {
  const auto found = plans.find(key);
  if (found != plans.end()) return *found->second;
  if (!handle) check_cublaslt(cublaslt().create(&handle), "starting");
  auto chosen = std::make_unique<ChosenPlan>(handle, key);
  recall(*chosen);
  return *plans.emplace(key, std::move(chosen)).first->second;
}

// Takes over what set_tuning() brought, if it can be used.
void CudaMatmul::State::recall(ChosenPlan& chosen) const {
  const auto found = remembered.find(chosen.plan.key().text());
  if (found == remembered.end()) return;
  MatmulAlgorithm algorithm;
  const bool is_algorithm = algorithm.read(found->second) && chosen.plan.accepts(algorithm);
  const bool is_separate = found->second == kSeparate && chosen.plan.key().epilogue == MatmulEpilogue::kGeluGradient;
  if (!is_algorithm && !is_separate) return;
  if (is_algorithm) chosen.algorithm = algorithm;
  chosen.usable = is_algorithm;
  chosen.choice = Choice::kFinal;
}

// Does not change `out` in the end.
void CudaMatmul::State::choose(ChosenPlan& chosen, const MatmulOperands& operands, const Tensor& out) const {
  if (chosen.choice == Choice::kFinal) return;
  const bool can_try = options.autotune && !is_capturing(operands.stream);
  if (chosen.choice == Choice::kUntried && !can_try) return;
  const auto candidates = chosen.plan.candidates(can_try ? MatmulPlan::kMostCandidates : 1, operands, chosen.status);
  chosen.usable = !candidates.empty();
  chosen.choice = can_try || !options.autotune ? Choice::kFinal : Choice::kUntried;
  if (!chosen.usable) return;
  chosen.algorithm = candidates[0];
  if (candidates.size() == 1) return;
  Ways ways;
  for (const MatmulAlgorithm& candidate : candidates) {
    ways.push_back([&, candidate] { return chosen.plan.launch(candidate, operands) == CUBLAS_STATUS_SUCCESS; });
  }
  if (chosen.plan.key().accumulate) {
    Saved saved(out, operands.stream);
    chosen.algorithm = candidates[fastest(ways, operands.stream)];
    saved.restore();
  } else {
    chosen.algorithm = candidates[fastest(ways, operands.stream)];
  }
}

// One kernel or two. Without a measurement two, which is what the CPU does.
void CudaMatmul::State::choose_gelu(ChosenPlan& fused, ChosenPlan& product, const MatmulOperands& operands,
                                    const Tensor& out, const Tensor& gelu_input,
                                    const GeluBackward& gelu_backward) const {
  if (fused.choice == Choice::kFinal || !options.autotune || is_capturing(operands.stream)) return;
  choose(product, operands, out);
  fused.choice = Choice::kFinal;
  if (!product.usable || !gelu_backward) return;
  const auto candidates = fused.plan.candidates(MatmulPlan::kMostCandidates, operands, fused.status);
  Ways ways = {[&] {
    const bool done = product.plan.launch(product.algorithm, operands) == CUBLAS_STATUS_SUCCESS;
    if (done) gelu_backward(out, gelu_input);
    return done;
  }};
  for (const MatmulAlgorithm& candidate : candidates) {
    ways.push_back([&, candidate] { return fused.plan.launch(candidate, operands) == CUBLAS_STATUS_SUCCESS; });
  }
  if (candidates.empty()) return;
  const size_t best = fastest(ways, operands.stream);
  fused.usable = best > 0;
  if (fused.usable) fused.algorithm = candidates[best - 1];
}

bool CudaMatmul::run(Tensor out, Tensor a, Tensor b, const MatmulOptions& options, void* workspace,
                     size_t workspace_bytes, cudaStream_t stream, const GeluBackward& gelu_backward) {
  const Tensor bias = options.bias, gelu_input = options.gelu_input;
  if (!cublaslt_knows(out, a, b, bias)) {
    matmul_plain(out, a, b, options, stream);
    return false;
  }
  MatmulKey key = {.m = out.rows(),
                   .n = out.cols(),
                   .k = options.transpose_a ? a.rows() : a.cols(),
                   .lda = pitch(a),
                   .ldb = pitch(b),
                   .ldd = pitch(out),
                   .align_a = alignment_of(a.data),
                   .align_b = alignment_of(b.data),
                   .align_d = alignment_of(out.data),
                   .operands = a.dtype,
                   .result = out.dtype,
                   .transpose_a = options.transpose_a,
                   .transpose_b = options.transpose_b,
                   .accumulate = options.accumulate,
                   .tf32 = state_->options.tf32 && a.dtype == DType::kF32,
                   .workspace = std::min(workspace_bytes, kCublasWorkspaceBytes)};
  MatmulOperands operands = {.d = out.data,
                             .a = a.data,
                             .b = b.data,
                             .extra = bias.data,
                             .alpha = options.alpha,
                             .workspace = workspace,
                             .stream = stream};
  if (!bias.empty()) {
    key.epilogue = MatmulEpilogue::kBias;
    key.align_extra = alignment_of(bias.data);
  }
  State::ChosenPlan& product = state_->plan_for(key);

  if (!gelu_input.empty() && gelu_can_be_fused(out, a, b, gelu_input)) {
    key.epilogue = MatmulEpilogue::kGeluGradient;
    key.ld_extra = pitch(gelu_input);
    key.align_extra = alignment_of(gelu_input.data);
    operands.extra = gelu_input.data;
    State::ChosenPlan& fused = state_->plan_for(key);
    state_->choose_gelu(fused, product, operands, out, gelu_input, gelu_backward);
    if (fused.usable) {
      fused.launch(operands);
      return true;
    }
  }

  state_->choose(product, operands, out);
  if (product.usable) {
    product.launch(operands);
  } else if (is_wide(out) && is_wide(a) && is_wide(b)) {
    throw std::runtime_error("cuBLASLt has no algorithm for the matrix product " + product.plan.key().text() + " (" +
                             cublaslt().status_name(product.status) + ")");
  } else {
    matmul_plain(out, a, b, options, stream);  // odd pitches or addresses, which not every version can do
  }
  return false;
}

// What the choices depend on beside the shapes.
std::string CudaMatmul::State::header() const {
  int device = 0;
  cudaDeviceProp properties;
  check_cuda(cudaGetDevice(&device), "asking for the device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "reading the device's properties");
  return "cuBLASLt " + std::to_string(cublaslt().version()) + " on " + properties.name + " sm_" +
         std::to_string(architecture) + " with " + std::to_string(properties.multiProcessorCount) + " multiprocessors";
}

// One line: the header, then "; shape: algorithm" for each shape in alphabetical order.
std::string CudaMatmul::tuning() const {
  std::map<std::string, std::string> choices = state_->remembered;
  for (const auto& [key, chosen] : state_->plans) {
    if (chosen->usable) {
      choices[key.text()] = chosen->algorithm.text();
    } else if (chosen->choice == State::Choice::kFinal && key.epilogue == MatmulEpilogue::kGeluGradient) {
      choices[key.text()] = kSeparate;
    }
  }
  if (choices.empty()) return "";
  std::string text = state_->header();
  for (const auto& [key, choice] : choices) text += "; " + key + ": " + choice;
  return text;
}

void CudaMatmul::set_tuning(const std::string& tuning) {
  if (tuning.empty()) return;
  const std::string header = state_->header();
  if (tuning.compare(0, header.size(), header) != 0) return;
  state_->remembered.clear();
  size_t begin = header.size();
  while (tuning.compare(begin, 2, "; ") == 0) {
    begin += 2;
    const size_t end = std::min(tuning.find("; ", begin), tuning.size());
    const size_t colon = tuning.find(": ", begin);
    if (colon < end)
      state_->remembered[tuning.substr(begin, colon - begin)] = tuning.substr(colon + 2, end - colon - 2);
    begin = end;
  }
  for (const auto& plan : state_->plans) state_->recall(*plan.second);
}

void CudaMatmul::end_tuning() { state_->options.autotune = false; }

// ---- the backend's operations

void CudaBackend::matmul(Tensor out, Tensor a, Tensor b, const MatmulOptions& options) {
  const MatmulShape shape = check_matmul(out, a, b, options);
  bool gelu_done = false;
  {
    const Timed timed(*this, "matmul", 2.0 * shape.m * shape.n * shape.k,
                      static_cast<double>(a.bytes() + b.bytes() + out.bytes() * (options.accumulate ? 2 : 1)));
    gelu_done = matmul_->run(out, a, b, options, workspace_, workspace_bytes_, stream_, [this](Tensor d, Tensor in) {
      Profiler* const outer_profiler = std::exchange(profiler, nullptr);
      gelu_backward(d, in);
      profiler = outer_profiler;
    });
  }
  if (options.gelu_input && !gelu_done) gelu_backward(out, options.gelu_input);
}

// Sizes double until one takes a millisecond: enough to fill any GPU, and no more than a slow one can do in no time.
double CudaBackend::measure_peak_flops() {
  constexpr int64_t kSmallest = 1024, kLargest = 8192;
  constexpr int kRepeats = 6;
  constexpr float kLongEnough = 1.0f;  // milliseconds
  struct Temporary {
    CudaBackend& backend;
    void* memory;
    ~Temporary() { backend.release(memory); }
  };
  CudaMatmul products({}, architecture_);  // of its own: these shapes are not the run's
  const Temporary workspace = {*this, allocate(kCublasWorkspaceBytes)};
  Profiler* const outer_profiler = std::exchange(profiler, nullptr);
  double best = 0;
  float milliseconds = 0;
  for (int64_t size = kSmallest; size <= kLargest && milliseconds < kLongEnough; size *= 2) {
    const size_t bytes = static_cast<size_t>(size * size) * sizeof(bf16);
    const Temporary memory = {*this, allocate(3 * bytes)};
    auto matrix = [&](size_t index) {
      return Tensor::of(static_cast<char*>(memory.memory) + index * bytes, DType::kBF16, {size, size});
    };
    const Tensor out = matrix(0), a = matrix(1), b = matrix(2);
    fill_normal(a, 0.0f, 1.0f, RandomKey{});
    fill_normal(b, 0.0f, 1.0f, RandomKey{});
    const std::vector<float> times =
        shortest_times(Ways(kRepeats,
                            [&] {
                              products.run(out, a, b, {}, workspace.memory, kCublasWorkspaceBytes, stream_);
                              return true;
                            }),
                       stream_);
    milliseconds = *std::min_element(times.begin(), times.end());
    const double dimension = static_cast<double>(size);
    best = std::max(best, 2e3 * dimension * dimension * dimension / static_cast<double>(milliseconds));
  }
  profiler = outer_profiler;
  return best;
}
