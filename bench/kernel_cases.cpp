// kernel_cases.cpp: see kernel_cases.h.
#include "bench/kernel_cases.h"

#include <algorithm>
#include <utility>

#include "bench/case_list.h"

namespace {

const BenchModel kModels[] = {
    {.name = "124M",
     .batch = 16,
     .sequence = 1024,
     .channels = 768,
     .heads = 12,
     .wide_heads = 6,
     .vocabulary = 50257,
     .padded_vocabulary = 50304,
     .rank = 256,
     .attention_sequences = {1024, 2048, 4096},
     .head_chunks = {512, 4096}},
    {.name = "1558M",
     .batch = 16,
     .sequence = 1024,
     .channels = 1600,
     .heads = 25,
     .wide_heads = 12,
     .vocabulary = 50257,
     .padded_vocabulary = 50304,
     .rank = 256,
     .attention_sequences = {1024, 2048, 4096},
     .head_chunks = {512, 4096}},
    {.name = "toy",
     .batch = 4,
     .sequence = 16,
     .channels = 128,
     .heads = 2,
     .wide_heads = 1,
     .vocabulary = 257,
     .padded_vocabulary = 384,
     .rank = 16,
     .attention_sequences = {16, 32},
     .head_chunks = {16, 64}},
};

}  // namespace

const BenchModel* find_bench_model(const std::string& name) {
  for (const BenchModel& model : kModels)
    if (model.name == name) return &model;
  return nullptr;
}

std::vector<KernelCase> kernel_cases(const BenchModel& model) {
  std::vector<KernelCase> cases;
  add_model_cases(cases, model);
  add_optimizer_cases(cases, model);
  return cases;
}

size_t bench_workspace_bytes(const Backend& backend, const BenchModel& model) {
  size_t bytes = 0;
  for (int64_t sequence : model.attention_sequences) {
    for (const int64_t heads : {model.heads, model.wide_heads}) {
      bytes = std::max(bytes, backend.workspace_bytes({.batch = model.tokens() / sequence,
                                                       .sequence = sequence,
                                                       .channels = model.channels,
                                                       .heads = heads,
                                                       .vocabulary = model.padded_vocabulary,
                                                       .any_bf16 = true}));
    }
  }
  return bytes;
}

// ---- what the cases are made of

std::string dimensions(std::initializer_list<int64_t> shape) {
  std::string text;
  for (int64_t extent : shape) text += (text.empty() ? "" : "x") + std::to_string(extent);
  return text;
}

void CaseList::add(std::string operation, std::string shape, std::function<Call(Inputs&)> prepare) {
  cases_.push_back({std::move(operation), m_.name, std::move(shape), std::move(prepare)});
}

void CaseList::matmul(const std::string& name, int64_t m, int64_t n, int64_t k, MatmulOptions options, DType out_dtype,
                      bool with_bias, DType a_dtype) {
  add("matmul " + name, dimensions({m, n, k}) + " bf16", [=](Inputs& in) {
    const Tensor out = in.normal(out_dtype, {m, n});
    const Tensor a = options.transpose_a ? in.normal(a_dtype, {k, m}) : in.normal(a_dtype, {m, k});
    const Tensor b = options.transpose_b ? in.normal(kBF16, {n, k}) : in.normal(kBF16, {k, n});
    MatmulOptions all = options;
    if (with_bias) all.bias = in.normal(kBF16, {n});
    return Call{[=, &in] { in.backend.matmul(out, a, b, all); }};
  });
}

// ---- inputs

Inputs::~Inputs() {
  for (void* memory : memory_) backend.release(memory);
}

void* Inputs::allocate(size_t bytes) {
  memory_.push_back(backend.allocate(bytes));
  bytes_ += bytes;
  return memory_.back();
}

// Not zero either: what an operation overwrites is random bits before.
Tensor Inputs::empty(DType dtype, std::initializer_list<int64_t> shape) { return normal(dtype, shape); }

Tensor Inputs::normal(DType dtype, std::initializer_list<int64_t> shape, float mean, float stddev) {
  Tensor t = Tensor::of(nullptr, dtype, shape);
  t.data = allocate(t.bytes());
  backend.fill_normal(t, mean, stddev, {seed_, RandomPurpose::kInit, static_cast<uint32_t>(memory_.size()), 0});
  return t;
}

Tensor Inputs::quantized(DType dtype, std::initializer_list<int64_t> shape, float mean, float stddev) {
  Tensor t = Tensor::of(nullptr, dtype, shape);
  t.data = allocate(t.bytes());
  t.scales = static_cast<float*>(allocate(static_cast<size_t>(quant_blocks(t.elements())) * sizeof(float)));
  Inputs numbers(backend, seed_ + 1);
  backend.quantize(t, numbers.normal(DType::kF32, shape, mean, stddev));
  backend.synchronize();
  return t;
}

Tensor Inputs::indices(const std::vector<int32_t>& values, std::initializer_list<int64_t> shape) {
  Tensor t = Tensor::of(nullptr, DType::kI32, shape);
  t.data = allocate(t.bytes());
  backend.copy(t.data, values.data(), t.bytes());
  return t;
}

float* Inputs::number(float value) {
  float* const memory = static_cast<float*>(allocate(sizeof value));
  backend.copy(memory, &value, sizeof value);
  return memory;
}

StepScalars* Inputs::scalars() {
  const StepScalars values = {.lr = 1e-7f,
                              .beta2 = 0.95f,
                              .bias_correction1 = 0.5f,
                              .bias_correction2 = 0.5f,
                              .step = 7,
                              .projection_index = 1,
                              .next_projection_index = 2,
                              .rounding_counter = 3};
  scalars_ = static_cast<StepScalars*>(allocate(sizeof values));
  backend.copy(scalars_, &values, sizeof values);
  return scalars_;
}

bool Inputs::gate_is_open() const {
  if (!scalars_) return true;
  StepScalars values;
  backend.copy(&values, scalars_, sizeof values);
  backend.synchronize();
  return values.gate != 0;
}
