// case_list.h: what the two files of cases share: the list they add to, matrix products, and words for shapes. Dtypes
// are those of a run in bf16: weights, activations, their gradients and momentum bf16; statistics, losses, second
// moments and the gradients of vectors and of the embedding fp32.
#pragma once

#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "bench/kernel_cases.h"

inline constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16;

std::string dimensions(std::initializer_list<int64_t> shape);  // "16x768"

inline double bytes_of(const Tensor& tensor) { return static_cast<double>(tensor.bytes()); }

// The cases of one model.
class CaseList {
 public:
  CaseList(std::vector<KernelCase>& cases, const BenchModel& model) : m_(model), cases_(cases) {}

 protected:
  void add(std::string operation, std::string shape, std::function<Call(Inputs&)> prepare);

  // out [m,n] of the dtype given; the operands are bf16 unless a_dtype says otherwise.
  void matmul(const std::string& name, int64_t m, int64_t n, int64_t k, MatmulOptions options, DType out_dtype = kBF16,
              bool with_bias = false, DType a_dtype = kBF16);

  const BenchModel& m_;

 private:
  std::vector<KernelCase>& cases_;
};

void add_model_cases(std::vector<KernelCase>& cases, const BenchModel& model);
void add_optimizer_cases(std::vector<KernelCase>& cases, const BenchModel& model);
