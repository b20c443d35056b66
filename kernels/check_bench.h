// check_bench.h: what checks.h's checks are written with: memory, random numbers that the host knows, comparisons.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/checks.h"

// A contiguous matrix of random numbers on the device: number i is the i-th normal one of a stream, rounded to its
// dtype.
struct RandomMatrix {
  Tensor tensor;
  RandomKey key;

  // `count` neighbours of a row, in float64.
  std::vector<double> numbers(int64_t row, int64_t column, int64_t count) const {
    std::vector<double> out(static_cast<size_t>(count));
    const uint64_t begin = static_cast<uint64_t>(row * tensor.cols() + column);
    float four[4];
    for (uint64_t i = begin, block = ~uint64_t{0}; i < begin + out.size(); ++i) {
      if (i / 4 != block) {
        block = i / 4;
        const PhiloxWords words = philox_block(key, 0, block);
        normal_pair(words.w[0], words.w[1], four[0], four[1]);
        normal_pair(words.w[2], words.w[3], four[2], four[3]);
      }
      out[i - begin] = rounded(four[i % 4]);
    }
    return out;
  }
  std::vector<double> row(int64_t index) const { return numbers(index, 0, tensor.cols()); }
  double at(int64_t row, int64_t column) const { return numbers(row, column, 1)[0]; }

 private:
  double rounded(float x) const { return tensor.dtype == DType::kBF16 ? to_float(from_float<bf16>(x)) : x; }
};

// Device memory of one check, given back at its end.
class CheckBench {
 public:
  explicit CheckBench(Backend& backend) : backend_(backend) {}
  ~CheckBench() {
    for (void* memory : blocks_) backend_.release(memory);
  }
  CheckBench(const CheckBench&) = delete;
  CheckBench& operator=(const CheckBench&) = delete;

  // NaN in every floating element, and in the scales of 8-bit ones.
  Tensor poisoned(DType dtype, std::initializer_list<int64_t> shape) {
    Tensor t = Tensor::of(nullptr, dtype, shape);
    t.data = backend_.allocate(t.bytes());
    blocks_.push_back(t.data);
    backend_.fill(t.data, 0xff, t.bytes());
    if (dtype == DType::kI8 || dtype == DType::kU8)
      t.scales = poisoned(DType::kF32, {quant_blocks(t.elements())}).as<float>();
    return t;
  }
  // The same number in every element, one that each dtype has.
  Tensor filled(DType dtype, std::initializer_list<int64_t> shape, float value) {
    const Tensor t = poisoned(dtype, shape);
    if (!t.scales) {
      backend_.fill_constant(t, value);
    } else {
      backend_.quantize(t, filled(DType::kF32, shape, value));
    }
    return t;
  }
  RandomMatrix normal(DType dtype, int64_t rows, int64_t cols) {
    RandomMatrix m{poisoned(dtype, {rows, cols}), {.seed = 1, .tensor = ++streams_}};
    backend_.fill_normal(m.tensor, 0.0f, 1.0f, m.key);
    return m;
  }
  Tensor upload(const std::vector<int32_t>& values) {
    const Tensor t = poisoned(DType::kI32, {static_cast<int64_t>(values.size())});
    backend_.copy(t.data, values.data(), t.bytes());
    return t;
  }
  StepScalars* upload(const StepScalars& scalars) {
    void* const memory = backend_.allocate(sizeof scalars);
    blocks_.push_back(memory);
    backend_.copy(memory, &scalars, sizeof scalars);
    return static_cast<StepScalars*>(memory);
  }

  // One row of a result, or several, one after another.
  std::vector<double> read(const Tensor& t, int64_t row, int64_t rows = 1) const {
    const size_t count = static_cast<size_t>(rows * t.cols()), size = dtype_size(t.dtype);
    std::vector<char> bytes(count * size);
    backend_.copy(bytes.data(), static_cast<char*>(t.data) + static_cast<size_t>(row * t.cols()) * size, bytes.size());
    backend_.synchronize();
    std::vector<double> out(count);
    for (size_t i = 0; i < count; ++i) {
      out[i] = t.dtype == DType::kF32 ? reinterpret_cast<const float*>(bytes.data())[i]
                                      : to_float(reinterpret_cast<const bf16*>(bytes.data())[i]);
    }
    return out;
  }

  // The sum of the squares of some tensors.
  double squares(std::span<const Tensor> tensors) {
    const Tensor sum = poisoned(DType::kF32, {1});
    backend_.sum_squares(sum, tensors, false);
    return read(sum, 0)[0];
  }

  // False when an element is NaN or infinite, as it is where nothing was written.
  bool all_finite(const Tensor& t) { return std::isfinite(squares({&t, 1})); }

 private:
  Backend& backend_;
  std::vector<void*> blocks_;
  uint32_t streams_ = 0;
};

class Comparison {
 public:
  // `size`: the size of what was added up for the expected number, at least its own.
  void add(double result, double expected, double size) {
    const double difference = std::abs(result - expected) / std::max({size, std::abs(expected), 1e-30});
    largest_ = std::isnan(difference) ? std::numeric_limits<double>::infinity() : std::max(largest_, difference);
  }
  void require(bool holds) {
    if (!holds) largest_ = std::numeric_limits<double>::infinity();
  }
  Difference allowing(double allowed) const { return {largest_, allowed}; }

 private:
  double largest_ = 0;
};

// At most `count` of the indices 0 .. n - 1, with the first and the last one.
inline std::vector<int64_t> spread(int64_t n, int64_t count) {
  std::vector<int64_t> indices;
  count = std::min(n, count);
  for (int64_t i = 0; i < count; ++i) indices.push_back(count == 1 ? 0 : i * (n - 1) / (count - 1));
  return indices;
}

// What one rounding to a dtype, and the sums before it, may make of a number.
inline double rounding_of(DType dtype) { return dtype == DType::kBF16 ? 0.01 : 1e-4; }

std::string shape_text(std::initializer_list<int64_t> shape);  // "[3,4]"

// Attention of B sequences in whole heads, or its backward pass.
Difference attention_difference(Backend& backend, const CheckShapes& shapes, bool backward);

// The last token's row of it alone.
Difference attention_decode_difference(Backend& backend, const CheckShapes& shapes);

// The check of one matrix product, [m,k] x [k,n].
struct ProductShape {
  int64_t m, n, k;
  DType out, a, b;
  bool transpose_a = false, transpose_b = false, accumulate = false, bias = false;
};
Check product_check(const ProductShape& product, bool tf32);
