// operations.cpp: every operation of a training step at the shapes of GPT-2 124M on 1024 tokens, as a percentage of
// what this machine can do: matmuls and attention against the largest sgemm rate, the others against a copy of memory,
// both measured in the same run. Google Benchmark does the repetitions. Usage: build/bench/operations
// [--benchmark_filter=REGEX]
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/library_settings.h"

namespace {

constexpr int64_t kBatch = 2, kSequence = 512, kTokens = kBatch * kSequence, kChannels = 768, kHeads = 12;
constexpr int64_t kVocabulary = 50257, kPadded = 50304, kHeadChunk = 512, kRank = 256;

double peak_flops, copy_bytes_per_second;

double measure_copy(Backend& backend) {
  const size_t bytes = size_t{256} << 20;
  void* a = backend.allocate(bytes);
  void* b = backend.allocate(bytes);
  backend.fill(a, 1, bytes);
  backend.fill(b, 2, bytes);
  const Tensor from = Tensor::of(a, DType::kF32, {static_cast<int64_t>(bytes / 4)});
  const Tensor to = Tensor::of(b, DType::kF32, {static_cast<int64_t>(bytes / 4)});
  double best = 1e9;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    backend.convert(to, from);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  backend.release(a);
  backend.release(b);
  return 2.0 * static_cast<double>(bytes) / best;
}

// Memory of one benchmark, filled with numbers that are not zero.
class Bench {
 public:
  explicit Bench(Backend& backend) : backend(backend) {
    const KernelShapes shapes{kBatch, kSequence, kChannels, kHeads, kPadded, true};
    const size_t bytes = backend.workspace_bytes(shapes);
    workspace_ = backend.allocate(bytes);
    backend.set_workspace(workspace_, bytes);
  }
  ~Bench() {
    backend.release(workspace_);
    for (void* memory : memory_) backend.release(memory);
  }
  Tensor tensor(std::initializer_list<int64_t> shape, float mean = 0.0f, float stddev = 1.0f) {
    Tensor t = Tensor::of(nullptr, DType::kF32, shape);
    t.data = backend.allocate(t.bytes());
    memory_.push_back(t.data);
    backend.fill_normal(t, mean, stddev, {42, RandomPurpose::kInit, static_cast<uint32_t>(memory_.size())});
    return t;
  }
  Tensor ids(int64_t count, int64_t limit) {
    Tensor t = Tensor::of(nullptr, DType::kI32, {count});
    t.data = backend.allocate(t.bytes());
    memory_.push_back(t.data);
    for (int64_t i = 0; i < count; ++i) t.as<int32_t>()[i] = static_cast<int32_t>(i * 7919 % limit);
    return t;
  }
  Backend& backend;

 private:
  void* workspace_ = nullptr;
  std::vector<void*> memory_;
};

// Runs `prepare` once; what it returns is the operation. The profiler knows FLOPs and bytes of every call.
void add(const char* name, std::function<std::function<void()>(Bench&)> prepare) {
  benchmark::RegisterBenchmark(name, [prepare](benchmark::State& state) {
    const std::unique_ptr<Backend> backend = make_cpu_backend();
    Bench bench(*backend);
    const std::function<void()> operation = prepare(bench);
    operation();
    Profiler profiler;
    backend->profiler = &profiler;
    for (auto _ : state) operation();
    double seconds = 0, flops = 0, bytes = 0;
    for (const auto& [key, entry] : profiler.entries()) {
      seconds += entry.seconds;
      flops += entry.flops;
      bytes += entry.bytes;
    }
    state.counters["GFLOP/s"] = flops / seconds / 1e9;
    state.counters["GB/s"] = bytes / seconds / 1e9;
    state.counters["%sgemm"] = 100 * flops / seconds / peak_flops;
    state.counters["%copy"] = 100 * bytes / seconds / copy_bytes_per_second;
  })->Unit(benchmark::kMillisecond);
}

void add_matmul(const char* name, int64_t m, int64_t n, int64_t k, MatmulOptions options) {
  add(name, [=](Bench& b) {
    const Tensor out = b.tensor({m, n});
    const Tensor a = options.transpose_a ? b.tensor({k, m}) : b.tensor({m, k});
    const Tensor w = options.transpose_b ? b.tensor({n, k}) : b.tensor({k, n});
    return [=, &b] { b.backend.matmul(out, a, w, options); };
  });
}

void add_model() {
  const int64_t T = kTokens, C = kChannels;
  add_matmul("matmul/qkv", T, 3 * C, C, {});
  add_matmul("matmul/fc", T, 4 * C, C, {});
  add_matmul("matmul/fc_d_input", T, C, 4 * C, {.transpose_b = true});
  add_matmul("matmul/fc_d_weight", C, 4 * C, T, {.transpose_a = true});
  add_matmul("matmul/head_chunk", kHeadChunk, kPadded, C, {.transpose_b = true});
  add("attention/forward", [](Bench& b) {
    const Tensor out = b.tensor({kBatch, kSequence, kChannels}), lse = b.tensor({kBatch, kHeads, kSequence});
    const Tensor qkv = b.tensor({kBatch, kSequence, 3 * kChannels});
    return [=, &b] { b.backend.attention_forward(out, lse, qkv, kHeads); };
  });
  add("attention/backward", [](Bench& b) {
    const Tensor out = b.tensor({kBatch, kSequence, kChannels}), lse = b.tensor({kBatch, kHeads, kSequence});
    const Tensor qkv = b.tensor({kBatch, kSequence, 3 * kChannels}),
                 dqkv = b.tensor({kBatch, kSequence, 3 * kChannels});
    const Tensor dout = b.tensor({kBatch, kSequence, kChannels}), dbias = b.tensor({3 * kChannels});
    b.backend.attention_forward(out, lse, qkv, kHeads);
    return [=, &b] { b.backend.attention_backward(dqkv, dbias, dout, out, lse, qkv, kHeads, false); };
  });
  add("layernorm/residual_forward", [=](Bench& b) {
    const Tensor r = b.tensor({T, C}), out = b.tensor({T, C}), x = b.tensor({T, C}), y = b.tensor({T, C});
    const Tensor mean = b.tensor({T}), rstd = b.tensor({T}), w = b.tensor({C}), bias = b.tensor({C});
    return [=, &b] { b.backend.residual_layernorm_forward(r, out, mean, rstd, x, y, w, bias); };
  });
  add("layernorm/backward", [=](Bench& b) {
    const Tensor din = b.tensor({T, C}), dw = b.tensor({C}), db = b.tensor({C}), dout = b.tensor({T, C});
    const Tensor x = b.tensor({T, C}), mean = b.tensor({T}), rstd = b.tensor({T}, 1.0f, 0.1f), w = b.tensor({C});
    return [=, &b] { b.backend.layernorm_backward(din, dw, db, false, dout, x, mean, rstd, w); };
  });
  add("gelu/forward", [=](Bench& b) {
    const Tensor out = b.tensor({T, 4 * C}), in = b.tensor({T, 4 * C});
    return [=, &b] { b.backend.gelu_forward(out, in); };
  });
  add("gelu/backward", [=](Bench& b) {
    // Around 3 GELU's slope is nearly 1: d, which every call multiplies by it, stays a usual number.
    const Tensor d = b.tensor({T, 4 * C}, 0.0f, 1e-3f), in = b.tensor({T, 4 * C}, 3.0f, 0.1f);
    const Tensor dbias = b.tensor({4 * C});
    return [=, &b] { b.backend.gelu_backward(d, dbias, in, false); };
  });
  add("classifier", [](Bench& b) {
    const Tensor losses = b.tensor({kHeadChunk}), logits = b.tensor({kHeadChunk, kPadded});
    const Tensor targets = b.ids(kHeadChunk, kVocabulary);
    return [=, &b] { b.backend.classifier(losses, logits, targets, kVocabulary, 1.0f, true); };
  });
}

// One matrix of the MLP, [768, 3072]: the optimizer's operations on it.
void add_optimizers() {
  const int64_t n = kChannels, m = 4 * kChannels;
  static StepScalars scalars;
  scalars.lr = 1e-3f;
  scalars.beta2 = 0.95f;
  scalars.step = 1;
  add("adamw", [=](Bench& b) {
    const Tensor w = b.tensor({n, m}), first = b.tensor({n, m}, 0.0f, 1e-3f), second = b.tensor({n, m}, 1.0f, 0.1f);
    const Tensor g = b.tensor({n, m});
    const ParameterUpdate update = {.weight = w, .momentum = first, .second_moment = second, .grad = g};
    return [=, &b] { b.backend.adamw_update(update, {}, &scalars); };
  });
  add("flora/second_moment", [=](Bench& b) {
    const Tensor row = b.tensor({n}, 1.0f, 0.1f), col = b.tensor({m}, 1.0f, 0.1f), g = b.tensor({n, m});
    const Tensor row_scale = b.tensor({n}), col_scale = b.tensor({m});
    return [=, &b] { b.backend.factored_second_moment(row, col, row_scale, col_scale, g, 1e-30f, &scalars); };
  });
  add("flora/projection", [=](Bench& b) {
    const Tensor p = b.tensor({kRank, n});
    return [=, &b] {
      b.backend.generate_projection(p, ProjectionKind::kGaussian, {1, RandomPurpose::kProjection, 2, 0},
                                    &scalars.projection_index);
    };
  });
  add("flora/cosine_down", [=](Bench& b) {
    const Tensor s = b.tensor({kRank, m}), g = b.tensor({n, m}), scale = b.tensor({n}, 1.0f, 0.1f);
    const CosineProjection p = {kRank, true, {1, RandomPurpose::kProjection, 2, 0}, &scalars.projection_index};
    return [=, &b] { b.backend.cosine_down(s, g, scale, p); };
  });
  add("flora/cosine_up", [=](Bench& b) {
    const Tensor s = b.tensor({kRank, m}), g = b.tensor({n, m}), squares = b.tensor({1}, 1.0f, 0.0f);
    const Tensor rows = b.tensor({n}, 1.0f, 0.1f), cols = b.tensor({m}, 1.0f, 0.1f);
    const CosineProjection p = {kRank, true, {1, RandomPurpose::kProjection, 2, 0}, &scalars.projection_index};
    return [=, &b] { b.backend.cosine_up({g, g, rows, cols}, s, p, 1e-3f, {squares.as<float>()}); };
  });
  add_matmul("flora/down", kRank, m, n, {});
  add_matmul("flora/up", n, m, kRank, {.transpose_a = true, .accumulate = true, .alpha = 1e-3f});
  add("flora/apply", [=](Bench& b) {
    const Tensor w = b.tensor({n, m}), u = b.tensor({n, m}), squares = b.tensor({1}, 1.0f, 0.0f);
    return [=, &b] { b.backend.apply_update(w, {}, u, {}, squares.as<float>(), nullptr, n * m, {}, &scalars); };
  });
}

}  // namespace

int main(int argc, char** argv) {
  choose_library_settings(argv);
  {
    const std::unique_ptr<Backend> backend = make_cpu_backend();
    peak_flops = backend->measure_peak_flops();
    copy_bytes_per_second = measure_copy(*backend);
    std::printf("%s: sgemm %.0f GFLOP/s, copy %.1f GB/s (read + write)\n", backend->description().c_str(),
                peak_flops / 1e9, copy_bytes_per_second / 1e9);
  }
  add_model();
  add_optimizers();
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
