// Attention of heads of 64 on a GPU whose multiprocessors have 100 KB of shared memory runs with smaller tiles, which
// give the same numbers but for rounding.
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <string>

#include "tests/backends.h"
#include "tests/cuda_on_cpu/stream.h"

namespace {

// Sets a variable while it exists.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Environment() { unsetenv(name_); }

 private:
  const char* name_;
};

struct Result {
  Values out, gradient, bias_gradient;
  std::map<std::string, uint64_t> kernels;
};

Result attend(const char* architecture, int64_t sequence, int head_dim) {
  const Environment environment("CUDA_ON_CPU_ARCH", architecture);
  TestDevice device("cuda");
  const int64_t batch = 2, heads = 3, channels = heads * head_dim;
  const Tensor qkv = device.random(1, DType::kBF16, {batch, sequence, 3 * channels}),
               dout = device.random(2, DType::kBF16, {batch, sequence, channels}),
               out = device.poisoned(DType::kBF16, {batch, sequence, channels}),
               lse = device.poisoned(DType::kF32, {batch, heads, sequence}),
               dqkv = device.poisoned(DType::kBF16, {batch, sequence, 3 * channels}),
               dbias = device.poisoned(DType::kF32, {3 * channels});
  Result result;
  const std::map<std::string, uint64_t> before = cuda_on_cpu::launches();
  device->attention_forward(out, lse, qkv, static_cast<int>(heads));
  device->attention_backward(dqkv, dbias, dout, out, lse, qkv, static_cast<int>(heads), false);
  for (const auto& [name, count] : cuda_on_cpu::launches()) {
    const auto old = before.find(name);
    if (old == before.end() || old->second != count) result.kernels[name] = 1;
  }
  result.out = device.read(out);
  result.gradient = device.read(dqkv);
  result.bias_gradient = device.read(dbias);
  return result;
}

TEST(SmallTiles, GiveTheSameNumbers) {
  for (int64_t sequence : {1, 31, 33, 64, 130, 257}) {
    const Result large = attend("90", sequence, 64), small = attend("120", sequence, 64);
    EXPECT_LE(relative_error(small.out, large.out), tolerance(DType::kBF16)) << sequence;
    EXPECT_LE(relative_error(small.gradient, large.gradient), tolerance(DType::kBF16)) << sequence;
    EXPECT_LE(relative_error(small.bias_gradient, large.bias_gradient), tolerance(DType::kBF16)) << sequence;
    EXPECT_NE(small.kernels, large.kernels);
  }
}

// Where two blocks fit anyway, or there are no smaller tiles, the same kernels run.
TEST(SmallTiles, AreForSmallMultiprocessors) {
  EXPECT_EQ(attend("80", 64, 64).kernels, attend("90", 64, 64).kernels);
  EXPECT_EQ(attend("120", 64, 96).kernels, attend("90", 64, 96).kernels);
}

}  // namespace
