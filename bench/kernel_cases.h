// kernel_cases.h: what bench/kernels.cpp times: every operation of kernels/backend.h at the shapes of a GPT-2, with
// inputs for it. scripts/bench_torch_kernels.py times PyTorch's kernels under the same names and shapes.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "kernels/backend.h"

// A micro-batch of `batch` sequences of a GPT-2. `heads` have channels / heads channels, in `wide_heads` of the same
// or nearly the same number of channels each has twice as many.
struct BenchModel {
  std::string name;
  int64_t batch, sequence, channels, heads, wide_heads, vocabulary, padded_vocabulary, rank;
  std::vector<int64_t> attention_sequences;  // each at batch * sequence tokens
  std::vector<int64_t> head_chunks;          // tokens whose logits exist at a time

  int64_t tokens() const { return batch * sequence; }
};

// nullptr when there is none of that name: "124M", "1558M" or "toy".
const BenchModel* find_bench_model(const std::string& name);

// Owns the device memory of one set of an operation's inputs and fills it with random numbers, never zeros: on a GPU
// a product of zeros takes less power and so less time.
class Inputs {
 public:
  Inputs(Backend& backend, uint32_t seed) : backend(backend), seed_(seed) {}
  ~Inputs();
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  Tensor empty(DType dtype, std::initializer_list<int64_t> shape);
  Tensor normal(DType dtype, std::initializer_list<int64_t> shape, float mean = 0.0f, float stddev = 1.0f);
  Tensor quantized(DType dtype, std::initializer_list<int64_t> shape, float mean, float stddev);
  Tensor indices(const std::vector<int32_t>& values, std::initializer_list<int64_t> shape);
  float* number(float value);
  StepScalars* scalars();  // of a set: small learning rate, open gate
  bool gate_is_open() const;
  size_t bytes() const { return bytes_; }

  Backend& backend;

 private:
  void* allocate(size_t bytes);

  uint32_t seed_;
  size_t bytes_ = 0;
  StepScalars* scalars_ = nullptr;
  std::vector<void*> memory_;
};

// An operation on one set of inputs.
struct Call {
  std::function<void()> run;
  // Of an operation that destroys what it works on in place: fills it anew. Others may run any number of times.
  std::function<void()> refresh = {};
  // Bytes that must move, where the profiler does not know: it counts the rows of an embedding as if all differed.
  double bytes = -1;
};

struct KernelCase {
  std::string operation;  // the name in Backend, which is the profiler's, and what else distinguishes it
  std::string model, shape;
  std::function<Call(Inputs&)> prepare;

  std::string method() const { return operation.substr(0, operation.find(' ')); }
};

std::vector<KernelCase> kernel_cases(const BenchModel& model);

// Scratch memory that is enough for all of them.
size_t bench_workspace_bytes(const Backend& backend, const BenchModel& model);
