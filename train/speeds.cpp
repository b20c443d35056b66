// speeds.cpp: see speeds.h. Each operation runs at two amounts of tokens, which tells what a call costs from what a
// token costs. A slow device gets fewer tokens: one call should take about a tenth of a second.
#include "train/speeds.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>

#include "flora/optimizer.h"
#include "train/version.h"

namespace {

constexpr double kSlowCall = 0.1;       // seconds: called twice at most, and not with a larger amount
constexpr double kEnough = 0.03;        // seconds of repeated calls
constexpr int64_t kAmounts[] = {1, 4};  // micro-batches that are timed
constexpr size_t kCopyBytes = size_t{16} << 20;

// Device memory that is given back at the end.
class Memory {
 public:
  explicit Memory(Backend& backend) : backend_(backend) {}
  ~Memory() {
    for (void* block : device_) backend_.release(block);
    for (void* block : host_) backend_.release_host(block);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* bytes(size_t count) {
    device_.push_back(backend_.allocate(std::max<size_t>(count, 1)));
    backend_.fill(device_.back(), 0, count);
    return device_.back();
  }
  void* host(size_t count) {
    host_.push_back(backend_.allocate_host(count));
    return host_.back();
  }
  Tensor zeros(DType dtype, std::initializer_list<int64_t> shape) {
    Tensor tensor = Tensor::of(nullptr, dtype, shape);
    tensor.data = bytes(tensor.bytes());
    if (dtype == DType::kI8)
      tensor.scales = static_cast<float*>(bytes(static_cast<size_t>(quant_blocks(tensor.elements())) * sizeof(float)));
    return tensor;
  }
  // Products of zeros are faster than those of numbers.
  Tensor numbers(DType dtype, std::initializer_list<int64_t> shape) {
    const Tensor tensor = zeros(dtype, shape);
    backend_.fill_normal(tensor, 0.0f, 0.02f, {.seed = 1, .purpose = RandomPurpose::kInit, .tensor = 1});
    return tensor;
  }

 private:
  Backend& backend_;
  std::vector<void*> device_, host_;
};

// The fastest of a few calls, in seconds.
double seconds_of(Backend& backend, const std::function<void()>& call) {
  double best = INFINITY, total = 0;
  int calls = 1;
  for (int i = 0; i < 8 && total < kEnough; ++i) {
    backend.synchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int k = 0; k < calls; ++k) call();
    backend.synchronize();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / calls;
    // The first call touches new memory, or chooses an algorithm, and says how many are worth timing together. A slow
    // one gets a second chance: another process may have had the processor.
    if (i > 0) best = std::min(best, seconds);
    if (i > 0 && best > kSlowCall) break;
    if (i > 0) total += seconds * calls;
    if (i == 0) calls = static_cast<int>(std::clamp(2e-3 / std::max(seconds, 1e-7), 1.0, 50.0));
  }
  return best;
}

// A line through two amounts; through the origin where the second would take too long or was not slower.
Cost cost_of(Backend& backend, double unit, const std::function<void(int64_t)>& call) {
  const double first = unit * static_cast<double>(kAmounts[0]), second = unit * static_cast<double>(kAmounts[1]);
  const double t1 = seconds_of(backend, [&] { call(kAmounts[0]); });
  if (t1 > kSlowCall) return {0, t1 / first};
  const double t2 = seconds_of(backend, [&] { call(kAmounts[1]); });
  const double slope = (t2 - t1) / (second - first), start = t1 - slope * first;
  return slope <= 0 || start <= 0 ? Cost{0, t2 / second} : Cost{start, slope};
}

// Tokens of the smaller amount: a sequence, or so few that a block's products stay near kSlowCall.
int64_t timed_tokens(const EngineConfig& config, const std::string& backend) {
  const double flops = kSlowCall * (backend == "cpu" ? 1e11 : 3e14) / static_cast<double>(kAmounts[1]);
  const double channels = static_cast<double>(config.model.channels);
  const int64_t most = static_cast<int64_t>(flops / (24 * channels * channels));
  return std::clamp<int64_t>(config.shapes.sequence, 1, std::max<int64_t>(64, most));
}

class Measurement {
 public:
  Measurement(const EngineConfig& config, Backend& backend)
      : config_(config),
        backend_(backend),
        workspace_(backend),
        tokens_(timed_tokens(config, backend.name())),
        channels_(config.model.channels),
        act_(config.shapes.dtype),
        weight_(config.weight_dtype == DType::kI8 ? config.shapes.dtype : config.weight_dtype),
        gradient_(config.gradients.gradient_dtype) {
    const KernelShapes shapes{.batch = kAmounts[1],
                              .sequence = config.shapes.sequence,
                              .channels = channels_,
                              .heads = config.model.heads,
                              .vocabulary = config.model.padded_vocabulary(),
                              .any_bf16 = true};
    const size_t bytes = backend.workspace_bytes(shapes);
    backend.set_workspace(workspace_.bytes(bytes), bytes);
    speeds_.measured = true;
    speeds_.copies_overlap = backend.name() != "cpu";  // there both streams are the calling thread
  }
  ~Measurement() { backend_.set_workspace(nullptr, 0); }

  Speeds run() {
    measure_products();
    measure_norms();
    measure_attention();
    measure_head();
    measure_update();
    measure_codes();
    measure_copies();
    return speeds_;
  }

 private:
  Cost per_token(const std::function<void(int64_t)>& call) {
    return cost_of(backend_, static_cast<double>(tokens_), [&](int64_t amount) { call(amount * tokens_); });
  }
  int64_t most_tokens() const { return kAmounts[1] * tokens_; }
  // The first `count` rows of a buffer, as wide as asked for.
  static Tensor rows(const Tensor& buffer, int64_t count, int64_t cols) {
    return Tensor::of(buffer.data, buffer.dtype, {count, cols});
  }

  // All four products of a block share one matrix of [C, 4C] and its gradient.
  void measure_products() {
    Memory memory(backend_);
    const int64_t n_most = most_tokens(), C = channels_;
    const Tensor narrow = memory.numbers(act_, {n_most, C}), out = memory.numbers(act_, {n_most, C});
    const Tensor wide = memory.numbers(act_, {n_most, 4 * C}), d_wide = memory.numbers(act_, {n_most, 4 * C});
    const Tensor matrix = memory.numbers(weight_, {C, 4 * C}), d_matrix = memory.zeros(gradient_, {C, 4 * C});
    const Tensor vector = memory.numbers(weight_, {1, 4 * C});
    const auto bias = [&](int64_t cols) { return Tensor::of(vector.data, weight_, {cols}); };
    const auto four = [&](const std::function<void(int64_t n, int64_t inner, int64_t outer)>& f) {
      return per_token([&](int64_t n) { f(n, C, 3 * C), f(n, C, C), f(n, C, 4 * C), f(n, 4 * C, C); });
    };
    speeds_.linear_forward = four([&](int64_t n, int64_t inner, int64_t outer) {
      backend_.matmul(rows(outer == C ? out : d_wide, n, outer), rows(inner == C ? narrow : wide, n, inner),
                      rows(matrix, inner, outer), {.bias = bias(outer)});
    });
    speeds_.linear_input_gradient = four([&](int64_t n, int64_t inner, int64_t outer) {
      backend_.matmul(rows(inner == C ? out : d_wide, n, inner), rows(outer == C ? narrow : wide, n, outer),
                      rows(matrix, inner, outer), {.transpose_b = true});
      if (inner != C) backend_.gelu_backward(rows(d_wide, n, inner), rows(wide, n, inner));
    });
    speeds_.linear_weight_gradient = four([&](int64_t n, int64_t inner, int64_t outer) {
      backend_.matmul(rows(d_matrix, inner, outer), rows(inner == C ? narrow : wide, n, inner),
                      rows(outer == C ? out : d_wide, n, outer), {.transpose_a = true});
    });
    speeds_.gelu = per_token([&](int64_t n) { backend_.gelu_forward(rows(d_wide, n, 4 * C), rows(wide, n, 4 * C)); });
    speeds_.bandwidth = 8.0 * static_cast<double>(C) * static_cast<double>(dtype_size(act_)) / speeds_.gelu.per_unit;
  }

  void measure_norms() {
    Memory memory(backend_);
    const int64_t n_most = most_tokens(), C = channels_;
    const Tensor in = memory.numbers(act_, {n_most, C}), out = memory.numbers(act_, {n_most, C});
    const Tensor residual = memory.zeros(act_, {n_most, C}), wide = memory.numbers(act_, {n_most, 4 * C});
    const Tensor mean = memory.zeros(DType::kF32, {n_most}), rstd = memory.zeros(DType::kF32, {n_most});
    const Tensor weights = memory.numbers(weight_, {C}), other = memory.zeros(gradient_, {C});
    const Tensor d_vector = memory.zeros(gradient_, {1, 4 * C});
    const auto d_bias = [&](int64_t cols) { return Tensor::of(d_vector.data, gradient_, {cols}); };
    speeds_.norms = per_token([&](int64_t n) {
      for (int i = 0; i < 2; ++i) {
        backend_.residual_layernorm_forward(rows(residual, n, C), rows(out, n, C), mean.slice(0, n), rstd.slice(0, n),
                                            rows(in, n, C), rows(in, n, C), weights, weights);
      }
    });
    speeds_.norms_backward = per_token([&](int64_t n) {
      for (int i = 0; i < 2; ++i) {
        backend_.layernorm_backward(rows(residual, n, C), d_bias(C), other, false, rows(out, n, C), rows(in, n, C),
                                    mean.slice(0, n), rstd.slice(0, n), weights);
      }
      for (const int64_t cols : {C, 4 * C, C, 3 * C}) {
        backend_.bias_backward(d_bias(cols), rows(cols == C ? in : wide, n, cols), false);
      }
    });
  }

  void measure_attention() {
    Memory memory(backend_);
    const int64_t most = kAmounts[1], T = config_.shapes.sequence, heads = config_.model.heads, C = channels_;
    const Tensor qkv = memory.numbers(act_, {most, T, 3 * C}), d_qkv = memory.zeros(act_, {most, T, 3 * C});
    const Tensor out = memory.numbers(act_, {most, T, C}), lse = memory.zeros(DType::kF32, {most, heads, T});
    const int count = static_cast<int>(heads);
    speeds_.attention_forward = cost_of(backend_, 1, [&](int64_t n) {
      backend_.attention_forward(out.slice(0, n), lse.slice(0, n), qkv.slice(0, n), count);
    });
    speeds_.attention_backward = cost_of(backend_, 1, [&](int64_t n) {
      backend_.attention_backward(d_qkv.slice(0, n), out.slice(0, n), out.slice(0, n), lse.slice(0, n), qkv.slice(0, n),
                                  count);
    });
  }

  // A slice of the vocabulary, for chunks of different lengths; the costs grow with it.
  void measure_head() {
    Memory memory(backend_);
    const int64_t C = channels_, V = std::min<int64_t>(config_.model.padded_vocabulary(), 8192);
    const int64_t chunk = std::min<int64_t>(tokens_, 128), most = kAmounts[1] * chunk;
    const Tensor in = memory.numbers(act_, {most, C}), d_in = memory.zeros(act_, {most, C});
    const Tensor table = memory.numbers(weight_, {V, C}), d_table = memory.zeros(DType::kF32, {V, C});
    const Tensor logits = memory.numbers(act_, {most, V});
    const Tensor losses = memory.zeros(DType::kF32, {most}), targets = memory.zeros(DType::kI32, {most});
    const auto per_row = [&](const std::function<void(int64_t)>& call) {
      const Cost cost = cost_of(backend_, static_cast<double>(chunk), [&](int64_t amount) { call(amount * chunk); });
      return Cost{cost.per_call / static_cast<double>(V), cost.per_unit / static_cast<double>(V)};
    };
    speeds_.logits =
        per_row([&](int64_t n) { backend_.matmul(logits.slice(0, n), in.slice(0, n), table, {.transpose_b = true}); });
    speeds_.head_input_gradient =
        per_row([&](int64_t n) { backend_.matmul(d_in.slice(0, n), logits.slice(0, n), table); });
    speeds_.head_weight_gradient = per_row([&](int64_t n) {
      backend_.matmul(d_table, logits.slice(0, n), in.slice(0, n), {.transpose_a = true, .accumulate = true});
    });
    speeds_.classifier = per_row([&](int64_t n) {
      backend_.classifier(losses.slice(0, n), logits.slice(0, n), targets.slice(0, n), V, 1e-3f, true);
    });
  }

  // The optimizer on a matrix of [C, 4C], a third of a block, and on a slice of the token embedding, tall enough to be
  // treated as one.
  void measure_update() {
    const int64_t C = channels_, table_rows = std::min<int64_t>(config_.model.vocabulary, 5 * C);
    std::vector<Parameter> parameters(2);
    for (int i = 0; i < 2; ++i) {
      Parameter& p = parameters[static_cast<size_t>(i)];
      p.index = i;
      p.name = i == 0 ? "matrix" : "table";
      p.layer = i - 1;
      p.rows = p.padded_rows = i == 0 ? C : table_rows;
      p.cols = i == 0 ? 4 * C : C;
      p.matrix = p.decay = true;
      p.embedding = i == 1;
    }
    const auto optimizer = make_optimizer(config_.optimizer, parameters, gradient_, backend_);
    MemoryPlan plan;
    optimizer->declare(plan);
    Arena arena(backend_, plan);
    optimizer->states().zero();
    speeds_.update_block = 3 * update_seconds(*optimizer, parameters[0], gradient_);
    speeds_.update_row = update_seconds(*optimizer, parameters[1], DType::kF32) / static_cast<double>(table_rows);
  }

  double update_seconds(Optimizer& optimizer, const Parameter& p, DType gradient_dtype) {
    Memory memory(backend_);
    StepScalars scalars;
    optimizer.begin_step(2, scalars);
    scalars.lr = 1e-6f;
    auto* const on_device = static_cast<StepScalars*>(memory.bytes(sizeof scalars));
    backend_.copy(on_device, &scalars, sizeof scalars);
    const Tensor squares = memory.zeros(DType::kF32, {1});
    const Tensor weight = memory.numbers(weight_, {p.rows, p.cols});
    const Tensor gradient = memory.numbers(gradient_dtype, {p.rows, p.cols});
    const Tensor master = config_.master_weights ? memory.numbers(DType::kF32, {p.rows, p.cols}) : Tensor{};
    return seconds_of(backend_, [&] {
      backend_.sum_squares(squares, gradient, false);
      optimizer.update(p, weight, master, gradient, on_device);
    });
  }

  void measure_codes() {
    if (config_.weight_dtype != DType::kI8) return;
    Memory memory(backend_);
    const int64_t count = 4 * channels_ * channels_;
    const Tensor codes = memory.zeros(DType::kI8, {count}), numbers = memory.numbers(DType::kF32, {count});
    const Tensor decoded = memory.zeros(act_, {count});
    const RandomKey key{.seed = 1, .purpose = RandomPurpose::kInit, .tensor = 1};
    speeds_.encode_block = 3 * seconds_of(backend_, [&] { backend_.quantize_weight(codes, numbers, key, nullptr); });
    speeds_.decode_block = 3 * seconds_of(backend_, [&] { backend_.dequantize_weight(decoded, codes); });
  }

  void measure_copies() {
    Memory memory(backend_);
    void* const device = memory.bytes(kCopyBytes);
    void* const host = memory.host(kCopyBytes);
    const auto rate = [&](void* to, const void* from) {
      return static_cast<double>(kCopyBytes) / seconds_of(backend_, [&] { backend_.copy(to, from, kCopyBytes); });
    };
    speeds_.to_device = rate(device, host);
    speeds_.to_host = rate(host, device);
    // Copies of pageable memory make the host wait.
    speeds_.copies_overlap = speeds_.copies_overlap && backend_.host_memory_note().empty();
  }

  const EngineConfig& config_;
  Backend& backend_;
  Memory workspace_;
  Speeds speeds_;
  int64_t tokens_, channels_;
  DType act_, weight_, gradient_;
};

}  // namespace

Speeds measure_speeds(const EngineConfig& config, Backend& backend) {
  try {
    return Measurement(config, backend).run();
  } catch (const std::runtime_error&) {
    return nominal_speeds(config, backend.name());
  }
}

// Nominal rates. GPU: an H100 at what matmuls and attention reach in practice, PCIe 4; CPU: a few cores. Only the order
// of settings depends on them.
Speeds nominal_speeds(const EngineConfig& config, const std::string& backend) {
  const bool cpu = backend == "cpu";
  const double flops = cpu ? 2e11 : config.shapes.dtype == DType::kBF16 ? 4e14 : 5e13;
  const double bytes = cpu ? 3e10 : 2.5e12, call = cpu ? 2e-6 : 5e-6, transfer = cpu ? 1e10 : 2.5e10;
  const double C = static_cast<double>(config.model.channels), T = static_cast<double>(config.shapes.sequence);
  const double size = static_cast<double>(dtype_size(config.shapes.dtype));
  const double elements = 12 * C * C;
  Speeds s;
  s.copies_overlap = !cpu;
  s.linear_forward = s.linear_input_gradient = s.linear_weight_gradient = {4 * call, 2 * elements / flops};
  s.attention_forward = {call, 2 * C * T * T / (0.5 * flops)};
  s.attention_backward = {call, 5 * C * T * T / (0.4 * flops)};
  s.norms = {2 * call, 8 * C * size / bytes};
  s.gelu = {call, 8 * C * size / bytes};
  s.norms_backward = {6 * call, 17 * C * size / bytes};
  // A product over few tokens waits for the table, or for the fp32 gradient that it is added to.
  s.logits = s.head_input_gradient = {C * size / bytes, 2 * C / flops};
  s.head_weight_gradient = {8 * C / bytes, 2 * C / flops};
  s.classifier = {0, 2 * size / bytes};
  const double state = config.optimizer.kind == OptimizerKind::kAdamW ? 16 : 4;
  s.update_block = elements * (4 * size + state) / bytes;
  if (config.optimizer.kind == OptimizerKind::kFlora)
    s.update_block += 4 * elements * static_cast<double>(config.optimizer.rank) / flops;
  s.update_row = C * (16 + state) / bytes;
  if (config.weight_dtype == DType::kI8) {
    s.decode_block = elements * (1 + size) / bytes;
    s.encode_block = elements * (4 + size) / bytes;
  }
  s.bandwidth = bytes;
  s.to_device = s.to_host = transfer;
  return s;
}

std::string speeds_key(const EngineConfig& config, const Backend& backend) {
  const OptimizerConfig& o = config.optimizer;
  std::string key = std::string(kVersion) + " | " + backend.description();
  const auto add = [&](const char* name, const auto& value) {
    key += std::string(key.ends_with(backend.description()) ? " | " : " ") + name + "=";
    if constexpr (std::is_convertible_v<decltype(value), std::string>) {
      key += value;
    } else {
      key += std::to_string(value);
    }
  };
  add("C", config.model.channels);
  add("heads", config.model.heads);
  add("V", config.model.vocabulary);
  add("T", config.shapes.sequence);
  add("activations", dtype_name(config.shapes.dtype));
  add("weights", dtype_name(config.weight_dtype));
  add("master", config.master_weights);
  add("gradients", dtype_name(config.gradients.gradient_dtype));
  add("states", dtype_name(o.state_dtype));
  add("optimizer", static_cast<int>(o.kind));
  add("rank", o.rank);
  add("momentum", o.beta1 > 0);
  add("clip", o.clip > 0);
  add("factored", o.factored);
  add("scale_parameter", o.scale_parameter);
  add("compress_embeddings", o.compress_embeddings);
  add("projection", static_cast<int>(o.projection));
  return key;
}
