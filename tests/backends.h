// backends.h: what the tests of operations share: the list of backends they run on, tensors in a backend's memory with
// poison around and inside them, and the comparison with float64 references.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/backend.h"

using Values = std::vector<double>;

// The backends that tests run on: those named in the environment variable TEST_BACKENDS ("cpu", "cuda" or "cpu,cuda"),
// or else every one this machine has. A binary linked against tests/cuda_on_cpu always has "cuda".
inline std::vector<std::string> backend_names() {
  const char* const given = std::getenv("TEST_BACKENDS");
  std::vector<std::string> names;
  for (const char* name : {"cpu", "cuda"}) {
    const bool wanted = given ? std::strstr(given, name) != nullptr : name[1] == 'p' || cuda_unavailable().empty();
    if (wanted) names.push_back(name);
  }
  return names;
}

// The same without the CPU: for what only the others have, and for comparisons with the CPU. May be empty.
inline std::vector<std::string> gpu_backend_names() {
  std::vector<std::string> names = backend_names();
  std::erase(names, "cpu");
  return names;
}

// For tests of what is built on a backend: they run on one, the first of backend_names().
inline std::string test_backend_name() { return backend_names().at(0); }

// Rows of any length at any address are for the CPU only; on a GPU they are whole octets and begin at multiples of 16
// bytes: the next longer length (or shift, in elements) that a backend takes.
inline int64_t row_length(const std::string& backend, int64_t length) {
  return backend == "cpu" ? length : (length + 7) / 8 * 8;
}

inline std::vector<int64_t> row_lengths(const std::string& backend, std::initializer_list<int64_t> lengths) {
  std::vector<int64_t> taken;
  for (const int64_t length : lengths) taken.push_back(row_length(backend, length));
  return taken;
}

// Autotuning chooses among algorithms that differ in the last bits, so it is only for tests of single operations.
inline std::unique_ptr<Backend> make_test_backend(const std::string& name = test_backend_name(), int threads = 2,
                                                  bool autotune = false) {
  if (name == "cpu") return make_cpu_backend({.threads = threads});
  if (name == "cpu_bf16") return make_cpu_backend({.threads = threads, .multiply_in_bf16 = true});
  if (name == "cuda") return make_cuda_backend({.autotune = autotune});
  throw std::runtime_error("unknown backend " + name);
}

// Of a GPU's workspace. Products take 32 MB of it, which other tests need not poison again and again: a file that tests
// products raises it (const bool, initialised by with_products()).
inline size_t most_workspace = size_t{8} << 20;
inline bool with_products() { return (most_workspace = SIZE_MAX) != 0; }

// A backend with a (poisoned) workspace, and tensors in its memory. Every byte that belongs to no tensor, around a
// buffer and between the rows of a strided view, is 0xff and must stay so: check_guards(), also called by the
// destructor. So is every element of a tensor made by poisoned(): a NaN in fp32 and bf16.
class TestDevice {
 public:
  explicit TestDevice(const std::string& name, int threads = 2) : backend_(make_test_backend(name, threads, true)) {
    const KernelShapes shapes = {
        .batch = 4, .sequence = 512, .channels = 1024, .heads = 4, .vocabulary = 2048, .any_bf16 = true};
    size_t bytes = backend_->workspace_bytes(shapes);
    if (name == "cuda") bytes = std::min(bytes, most_workspace);
    workspace_ = backend_->allocate(bytes);
    backend_->fill(workspace_, 0xff, bytes);
    backend_->set_workspace(workspace_, bytes);
  }

  ~TestDevice() {
    check_guards();
    for (const Buffer& buffer : buffers_) backend_->release(buffer.memory);
    backend_->release(workspace_);
    EXPECT_EQ(backend_->allocated_bytes(), 0u);
  }

  TestDevice(const TestDevice&) = delete;
  TestDevice& operator=(const TestDevice&) = delete;

  Backend* operator->() const { return backend_.get(); }
  Backend& backend() const { return *backend_; }

  // An uninitialised tensor, an 8-bit one with scales; rows `pitch` elements apart when that is given.
  Tensor poisoned(DType dtype, std::initializer_list<int64_t> shape, int64_t pitch = 0) {
    Tensor t = Tensor::of(nullptr, dtype, shape);
    if (pitch > 0) {
      for (int i = t.rank - 2; i >= 0; --i) t.stride[i] = i == t.rank - 2 ? pitch : t.stride[i + 1] * t.shape[i + 1];
    }
    Buffer buffer = {.view = t};
    buffer.bytes = 2 * kGuard + static_cast<size_t>(t.rows() * t.leading_dimension()) * dtype_size(dtype);
    buffer.memory = backend_->allocate(buffer.bytes);
    backend_->fill(buffer.memory, 0xff, buffer.bytes);
    t.data = static_cast<char*>(buffer.memory) + kGuard;
    buffer.view = t;
    buffers_.push_back(buffer);
    if (dtype_size(dtype) == 1) t.scales = poisoned(DType::kF32, {quant_blocks(t.elements())}).as<float>();
    return t;
  }

  Tensor upload(const Values& values, DType dtype, std::initializer_list<int64_t> shape, int64_t pitch = 0) {
    const Tensor t = poisoned(dtype, shape, pitch);
    write(t, values);
    return t;
  }

  // Normally distributed values, the same for the same seed.
  Tensor random(uint32_t seed, DType dtype, std::initializer_list<int64_t> shape, double stddev = 1.0,
                int64_t pitch = 0) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(0.0, stddev);
    Values values(static_cast<size_t>(Tensor::of(nullptr, dtype, shape).elements()));
    for (double& value : values) value = normal(generator);
    return upload(values, dtype, shape, pitch);
  }

  void write(const Tensor& t, const Values& values) {
    ASSERT_EQ(static_cast<int64_t>(values.size()), t.elements());
    const size_t size = dtype_size(t.dtype);
    std::vector<char> bytes(values.size() * size);
    for (size_t i = 0; i < values.size(); ++i) {
      char* const target = bytes.data() + i * size;
      if (t.dtype == DType::kF32) store(target, static_cast<float>(values[i]));
      if (t.dtype == DType::kBF16) store(target, from_float<bf16>(static_cast<float>(values[i])));
      if (t.dtype == DType::kI32) store(target, static_cast<int32_t>(values[i]));
    }
    for_each_piece(
        t, [&](char* piece, size_t begin, size_t count) { backend_->copy(piece, bytes.data() + begin, count); });
    backend_->synchronize();
  }

  // What a tensor holds, as float64: also the rounded inputs that a reference starts from.
  Values read(const Tensor& t) const {
    Values values;
    const std::vector<uint8_t> bytes = bits(t);
    for (size_t i = 0; i < bytes.size(); i += dtype_size(t.dtype)) {
      if (t.dtype == DType::kF32) values.push_back(load<float>(&bytes[i]));
      if (t.dtype == DType::kBF16) values.push_back(to_float(load<bf16>(&bytes[i])));
      if (t.dtype == DType::kI32) values.push_back(load<int32_t>(&bytes[i]));
    }
    return values;
  }

  // The bytes of a tensor's elements, for comparisons that must be exact.
  std::vector<uint8_t> bits(const Tensor& t) const {
    std::vector<uint8_t> bytes(t.bytes());
    for_each_piece(t, [&](char* piece, size_t begin, size_t count) { backend_->copy(&bytes[begin], piece, count); });
    backend_->synchronize();
    return bytes;
  }

  void check_guards() const {
    for (const Buffer& buffer : buffers_) {
      std::vector<uint8_t> bytes(buffer.bytes);
      backend_->copy(bytes.data(), buffer.memory, buffer.bytes);
      backend_->synchronize();
      const Tensor& t = buffer.view;
      const size_t size = dtype_size(t.dtype), row = static_cast<size_t>(t.cols()) * size;
      for (int64_t i = 0; i < t.rows(); ++i) {
        const size_t offset = kGuard + static_cast<size_t>(i * t.leading_dimension()) * size;
        std::memset(&bytes[offset], 0xff, row);
      }
      size_t changed = 0;
      for (uint8_t byte : bytes) changed += byte != 0xff;
      EXPECT_EQ(changed, 0u) << "bytes written outside a tensor";
    }
  }

 private:
  static constexpr size_t kGuard = 256;

  struct Buffer {
    Tensor view;
    void* memory = nullptr;
    size_t bytes = 0;
  };

  template <typename T>
  static void store(char* target, T value) {
    std::memcpy(target, &value, sizeof value);
  }
  template <typename T>
  static T load(const uint8_t* source) {
    T value;
    std::memcpy(&value, source, sizeof value);
    return value;
  }
  // f(address, begin, count) for the pieces that a tensor's bytes lie in: all of them at once, or row by row.
  template <typename F>
  static void for_each_piece(const Tensor& t, F&& f) {
    const int64_t pieces = t.contiguous() ? 1 : t.rows(), pitch = t.leading_dimension();
    const size_t size = dtype_size(t.dtype), count = t.bytes() / static_cast<size_t>(pieces);
    for (int64_t i = 0; i < pieces; ++i)
      f(static_cast<char*>(t.data) + static_cast<size_t>(i * pitch) * size, static_cast<size_t>(i) * count, count);
  }

  std::unique_ptr<Backend> backend_;
  void* workspace_ = nullptr;
  std::vector<Buffer> buffers_;
};

// What a tensor is in memory: elements and block scales.
inline void append_bits(const TestDevice& device, std::vector<uint8_t>& bits, const Tensor& t) {
  const std::vector<uint8_t> elements = device.bits(t);
  bits.insert(bits.end(), elements.begin(), elements.end());
  if (t.scales) append_bits(device, bits, Tensor::of(t.scales, DType::kF32, {quant_blocks(t.elements())}));
}

// A test of an operation on one backend and with one dtype.
class OperationTest : public ::testing::TestWithParam<std::tuple<std::string, DType>> {
 protected:
  std::string backend() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
};

inline std::string operation_test_name(const ::testing::TestParamInfo<OperationTest::ParamType>& info) {
  return std::get<0>(info.param) + "_" + std::string(dtype_name(std::get<1>(info.param)));
}

#define INSTANTIATE_ON_BACKENDS(suite, names, ...)                                                                     \
  INSTANTIATE_TEST_SUITE_P(All, suite, ::testing::Combine(::testing::ValuesIn(names), ::testing::Values(__VA_ARGS__)), \
                           operation_test_name)

// Most operations are tested on each backend in fp32 and in bf16.
#define INSTANTIATE_OPERATION_TESTS(suite) INSTANTIATE_ON_BACKENDS(suite, backend_names(), DType::kF32, DType::kBF16)

// A suite of what only a GPU has, or of comparisons with the CPU: without a GPU it is empty, and not a pass.
#define INSTANTIATE_GPU_TESTS(suite, ...)               \
  GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(suite); \
  INSTANTIATE_ON_BACKENDS(suite, gpu_backend_names(), __VA_ARGS__)

// The largest relative error allowed in a result of this dtype.
inline double tolerance(DType dtype) { return dtype == DType::kF32 ? 1e-5 : 1e-2; }

// ||out - reference|| / ||reference||; NaN when `out` holds one (and a NaN passes no comparison).
inline double relative_error(const Values& out, const Values& reference) {
  if (out.size() != reference.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    difference += (out[i] - reference[i]) * (out[i] - reference[i]);
    norm += reference[i] * reference[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

// d/dx of sum(f(x) * weights) by central differences in float64, for small x: what an analytic gradient is checked by.
inline Values numeric_gradient(const std::function<Values(const Values&)>& f, Values x, const Values& weights) {
  constexpr double kStep = 1e-5;
  Values gradient(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double center = x[i];
    x[i] = center + kStep;
    const Values above = f(x);
    x[i] = center - kStep;
    const Values below = f(x);
    x[i] = center;
    for (size_t j = 0; j < above.size(); ++j) gradient[i] += weights[j] * (above[j] - below[j]) / (2 * kStep);
  }
  return gradient;
}

// The bits `run` returns must not depend on how many threads the device uses.
inline void expect_independent_of_threads(const std::string& backend,
                                          const std::function<std::vector<uint8_t>(TestDevice&)>& run) {
  TestDevice one(backend, 1);
  const std::vector<uint8_t> expected = run(one);
  for (int threads : {2, 5}) {
    TestDevice several(backend, threads);
    EXPECT_EQ(run(several), expected) << threads << " threads";
  }
}

// Two runs on devices of the same kind give the same bits.
inline void expect_repeatable(const std::string& backend, const std::function<std::vector<uint8_t>(TestDevice&)>& run) {
  TestDevice first(backend), second(backend);
  const std::vector<uint8_t> expected = run(first);
  second->set_tuning(first->tuning());
  EXPECT_EQ(run(second), expected);
}
