// matmul_tuning.cu: which algorithm of cuBLASLt computes a product: chosen by time, kept for the next run, replaced
// when its results are wrong.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda_workspace.h"

namespace {

constexpr int kMostCandidates = 8;

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "asking whether a graph is being recorded");
  return status != cudaStreamCaptureStatusNone;
}

// ---- an algorithm as text: its 64 bytes in hexadecimal

constexpr char kDigits[] = "0123456789abcdef";

std::string to_text(const cublasLtMatmulAlgo_t& algorithm) {
  unsigned char bytes[sizeof algorithm];
  std::memcpy(bytes, &algorithm, sizeof bytes);
  std::string text;
  for (const unsigned char byte : bytes) text += {kDigits[byte >> 4], kDigits[byte & 15]};
  return text;
}

// False when the text is not such.
bool from_text(cublasLtMatmulAlgo_t& algorithm, const std::string& text) {
  unsigned char bytes[sizeof algorithm];
  if (text.size() != 2 * sizeof bytes || text.find_first_not_of(kDigits) != std::string::npos) return false;
  for (size_t i = 0; i < sizeof bytes; ++i)
    bytes[i] = static_cast<unsigned char>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  std::memcpy(&algorithm, bytes, sizeof bytes);
  return true;
}

// ---- measuring

class Event {
 public:
  Event() { check_cuda(cudaEventCreate(&event_), "creating an event"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check_cuda(cudaEventRecord(event_, stream), "recording an event"); }

  // Waits for this event; the time since an earlier one.
  float milliseconds_since(const Event& start) const {
    check_cuda(cudaEventSynchronize(event_), "timing a matrix product");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, start.event_, event_), "timing a matrix product");
    return milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// Each enqueues its work on one stream; false when it cannot.
using Ways = std::vector<std::function<bool()>>;

// The shortest of several times of each way in milliseconds, infinity for one that fails. In rounds over all ways, so
// that a device that changes its clock is fair to them; all of a round are enqueued before the host waits, behind an
// untimed one, so that the device always has work and what is measured is not the host.
std::vector<float> shortest_times(const Ways& ways, cudaStream_t stream) {
  constexpr int kRounds = 4;  // the first only warms up
  std::vector<float> times(ways.size(), INFINITY);
  std::vector<bool> works(ways.size(), true);
  std::vector<Event> events(ways.size() + 1);
  for (int round = 0; round < kRounds; ++round) {
    ways[0]();
    events[0].record(stream);
    for (size_t i = 0; i < ways.size(); ++i) {
      works[i] = works[i] && ways[i]();
      events[i + 1].record(stream);
    }
    for (size_t i = 0; i < ways.size(); ++i) {
      const float time = events[i + 1].milliseconds_since(events[i]);
      if (works[i] && round > 0) times[i] = std::min(times[i], time);
    }
  }
  return times;
}

// The index of the way to take: the first unless another is clearly faster.
size_t fastest(const Ways& ways, cudaStream_t stream) {
  constexpr float kClearlyFaster = 0.98f;  // of the time of the first way
  const std::vector<float> times = shortest_times(ways, stream);
  const size_t best = static_cast<size_t>(std::min_element(times.begin(), times.end()) - times.begin());
  return times[best] < kClearlyFaster * times[0] ? best : 0;
}

}  // namespace

// Takes over what set_tuning() brought, if it can be used.
void CudaMatmul::recall(Product& product) const {
  const auto found = remembered_.find(text(product.kind));
  Algorithm algorithm;
  if (found == remembered_.end() || !from_text(algorithm.code, found->second)) return;
  const std::vector<std::string>& wrong = product.distrusted;
  if (std::find(wrong.begin(), wrong.end(), found->second) != wrong.end()) return;
  cublasLtMatmulHeuristicResult_t result = {};
  const cublasStatus_t status = cublaslt().check(handle_, product.operation.get(), product.b.get(), product.a.get(),
                                                 product.out.get(), product.out.get(), &algorithm.code, &result);
  if (status != CUBLAS_STATUS_SUCCESS || result.workspaceSize > static_cast<size_t>(product.kind.workspace)) return;
  product.algorithm = algorithm;
  product.choice = Product::kFinal;
}

// At most `count` algorithms, what cuBLASLt expects to be the fastest first. Only such that add partial sums in fp32
// and always in the same order.
std::vector<CudaMatmul::Algorithm> CudaMatmul::candidates(Product& product, int count) const {
  cublasLtMatmulPreference_t created = nullptr;
  check_cublaslt(cublaslt().preference_create(&created), "describing a preference");
  const std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, Destroy> preference(created);
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check_cublaslt(cublaslt().preference_set(created, attribute, &value, sizeof value), "describing a preference");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(product.kind.workspace));
  // The other schemes add partial sums in the result's dtype: a bf16 result would be rounded more than once.
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  for (const auto matrix : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    set(matrix, static_cast<uint32_t>(product.kind.alignment));

  cublasLtMatmulHeuristicResult_t results[kMostCandidates] = {};
  int found = 0;
  product.status = cublaslt().heuristic(handle_, product.operation.get(), product.b.get(), product.a.get(),
                                        product.out.get(), product.out.get(), created, count, results, &found);
  std::vector<Algorithm> algorithms;
  for (int i = 0; i < found && product.status == CUBLAS_STATUS_SUCCESS; ++i) {
    if (results[i].state != CUBLAS_STATUS_SUCCESS) {
      product.status = results[i].state;
    } else if (results[i].workspaceSize <= static_cast<size_t>(product.kind.workspace)) {
      algorithms.push_back({results[i].algo});
    }
  }
  return algorithms;
}

// Does not change `out` in the end. While a graph is recorded nothing can be measured: the library's first guess is
// taken until there is a chance.
void CudaMatmul::choose(Product& product, const Call& call) const {
  if (product.choice == Product::kFinal) return;
  const bool measure = options_.autotune && !is_capturing(call.stream);
  if (product.choice == Product::kUnmeasured && !measure) return;
  product.choice = measure || !options_.autotune ? Product::kFinal : Product::kUnmeasured;
  const std::vector<Algorithm> algorithms = candidates(product, measure ? kMostCandidates : 1);
  if (algorithms.empty()) return;
  product.algorithm = algorithms[0];
  if (algorithms.size() == 1) return;

  Ways ways;
  for (const Algorithm& candidate : algorithms)
    ways.push_back([&] { return launch(product, candidate, call) == CUBLAS_STATUS_SUCCESS; });
  // What is added to waits on the host meanwhile.
  const size_t elements = static_cast<size_t>((product.kind.m - 1) * product.kind.pitch_out + product.kind.n);
  std::vector<char> before(product.kind.accumulate ? elements * dtype_size(product.kind.result) : 0);
  const auto copy = [&](void* destination, const void* source) {
    check_cuda(cudaMemcpyAsync(destination, source, before.size(), cudaMemcpyDefault, call.stream), "saving a result");
    check_cuda(cudaStreamSynchronize(call.stream), "saving a result");
  };
  if (product.kind.accumulate) copy(before.data(), call.out.data);
  product.algorithm = algorithms[fastest(ways, call.stream)];
  if (product.kind.accumulate) copy(call.out.data, before.data());
}

// The library's next guesses in turn, the plain kernel at last.
std::string CudaMatmul::distrust() {
  std::string taken;
  for (Product* product : last_) {
    if (!product->algorithm) continue;
    product->distrusted.push_back(to_text(product->algorithm->code));
    product->algorithm.reset();
    product->choice = Product::kFinal;
    for (const Algorithm& other : candidates(*product, kMostCandidates)) {
      const std::string code = to_text(other.code);
      if (std::find(product->distrusted.begin(), product->distrusted.end(), code) != product->distrusted.end())
        continue;
      product->algorithm = other;
      break;
    }
    taken = product->algorithm ? "another algorithm of cuBLASLt" : "the plain kernel";
  }
  return taken;
}

// ---- choices as text: the header, then "; kind: algorithm" for each kind in alphabetical order

std::string CudaMatmul::header() const { return "cuBLASLt " + std::to_string(cublaslt().version()) + " on " + device_; }

// The kind in words, different for different kinds.
std::string CudaMatmul::text(const Kind& kind) const {
  const auto list = [](std::initializer_list<int64_t> values) {
    std::string text;
    for (const int64_t value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
    return text;
  };
  return "[" + list({kind.m, kind.k}) + "]x[" + list({kind.k, kind.n}) + "] " + dtype_name(kind.operands) +
         (options_.tf32 && kind.operands == DType::kF32 ? " (tf32)" : "") + " to " + dtype_name(kind.result) + " " +
         (kind.transpose_a ? "T" : "N") + (kind.transpose_b ? "T" : "N") + (kind.accumulate ? " accumulated" : "") +
         (kind.bias ? " +bias" : "") + ", pitches " + list({kind.pitch_a, kind.pitch_b, kind.pitch_out}) +
         ", aligned to " + std::to_string(kind.alignment) +
         (kind.workspace < static_cast<int64_t>(kCublasWorkspaceBytes)
              ? ", workspace " + std::to_string(kind.workspace >> 20) + " MiB"
              : "");
}

std::string CudaMatmul::tuning() const {
  std::map<std::string, std::string> choices = remembered_;
  for (const auto& [kind, product] : products_) {
    if (product.algorithm) choices[text(kind)] = to_text(product.algorithm->code);
  }
  if (choices.empty()) return "";
  std::string line = header();
  for (const auto& [kind, algorithm] : choices) line += "; " + kind + ": " + algorithm;
  return line;
}

void CudaMatmul::set_tuning(const std::string& tuning) {
  if (tuning.empty()) return;
  const std::string expected = header();
  if (tuning.compare(0, expected.size(), expected) != 0) return;
  remembered_.clear();
  size_t begin = expected.size();
  while (tuning.compare(begin, 2, "; ") == 0) {
    begin += 2;
    const size_t end = std::min(tuning.find("; ", begin), tuning.size()), colon = tuning.find(": ", begin);
    if (colon < end) remembered_[tuning.substr(begin, colon - begin)] = tuning.substr(colon + 2, end - colon - 2);
    begin = end;
  }
  for (auto& entry : products_) recall(entry.second);
}

void CudaMatmul::end_tuning() { options_.autotune = false; }

// ---- the backend's

std::string CudaBackend::tuning() const { return matmul_->tuning(); }
void CudaBackend::set_tuning(const std::string& tuning) { matmul_->set_tuning(tuning); }
void CudaBackend::end_tuning() { matmul_->end_tuning(); }

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
  CudaMatmul products({}, "");  // of its own: these shapes are not the run's
  const Temporary workspace = {*this, allocate(kCublasWorkspaceBytes)};
  Profiler* const outer_profiler = std::exchange(profiler, nullptr);
  double best = 0;
  float milliseconds = 0;
  for (int64_t size = kSmallest; size <= kLargest && milliseconds < kLongEnough; size *= 2) {
    const size_t bytes = static_cast<size_t>(size * size) * sizeof(bf16);
    const Temporary memory = {*this, allocate(3 * bytes)};
    const auto matrix = [&](size_t index) {
      return Tensor::of(static_cast<char*>(memory.memory) + index * bytes, DType::kBF16, {size, size});
    };
    const Tensor out = matrix(0), a = matrix(1), b = matrix(2);
    fill_normal(a, 0.0f, 1.0f, RandomKey{});
    fill_normal(b, 0.0f, 1.0f, RandomKey{});
    const auto multiply = [&] {
      products.run(out, a, b, {}, workspace.memory, stream_);
      return true;
    };
    const std::vector<float> times = shortest_times(Ways(kRepeats, multiply), stream_);
    milliseconds = *std::min_element(times.begin(), times.end());
    const double dimension = static_cast<double>(size);
    best = std::max(best, 2e3 * dimension * dimension * dimension / static_cast<double>(milliseconds));
  }
  profiler = outer_profiler;
  return best;
}
