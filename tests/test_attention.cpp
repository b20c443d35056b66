// test_attention.cpp: causal self-attention, forward and backward, against full T x T matrices in float64.
#include "tests/backends.h"

namespace {

struct Shape {
  int64_t batch, sequence, heads, head_dim;

  int64_t channels() const { return heads * head_dim; }
  // Position of a channel of Q (which = 0), K (1) or V (2) in the packed projection, and of a channel in the output.
  size_t packed(int which, int64_t b, int64_t t, int64_t h, int64_t j) const {
    return static_cast<size_t>((b * sequence + t) * 3 * channels() + which * channels() + h * head_dim + j);
  }
  size_t channel(int64_t b, int64_t t, int64_t h, int64_t j) const {
    return static_cast<size_t>((b * sequence + t) * channels() + h * head_dim + j);
  }
};

struct Attended {
  Values out, lse;
};

// Probabilities of query t over keys 0..t, and the log-sum-exp of its scores.
Values probabilities(const Shape& s, const Values& qkv, int64_t b, int64_t h, int64_t t, double* lse) {
  Values scores;
  double maximum = -INFINITY, sum = 0;
  for (int64_t key = 0; key <= t; ++key) {
    double dot = 0;
    for (int64_t j = 0; j < s.head_dim; ++j) dot += qkv[s.packed(0, b, t, h, j)] * qkv[s.packed(1, b, key, h, j)];
    scores.push_back(dot / std::sqrt(static_cast<double>(s.head_dim)));
    maximum = std::max(maximum, scores.back());
  }
  for (double score : scores) sum += std::exp(score - maximum);
  *lse = maximum + std::log(sum);
  for (double& score : scores) score = std::exp(score - *lse);
  return scores;
}

Attended reference_forward(const Shape& s, const Values& qkv) {
  Attended result = {Values(static_cast<size_t>(s.batch * s.sequence * s.channels())), {}};
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.heads; ++h) {
      for (int64_t t = 0; t < s.sequence; ++t) {
        double lse;
        const Values p = probabilities(s, qkv, b, h, t, &lse);
        result.lse.push_back(lse);
        for (int64_t key = 0; key <= t; ++key) {
          for (int64_t j = 0; j < s.head_dim; ++j) {
            result.out[s.channel(b, t, h, j)] += p[static_cast<size_t>(key)] * qkv[s.packed(2, b, key, h, j)];
          }
        }
      }
    }
  }
  return result;
}

// dscore = p (dp - sum p dp): the Jacobian of the softmax itself, without the out . dout shortcut of the kernels.
Values reference_backward(const Shape& s, const Values& dout, const Values& qkv) {
  Values dqkv(qkv.size());
  const double factor = 1 / std::sqrt(static_cast<double>(s.head_dim));
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.heads; ++h) {
      for (int64_t t = 0; t < s.sequence; ++t) {
        double lse, average = 0;
        const Values p = probabilities(s, qkv, b, h, t, &lse);
        Values dp(p.size());
        for (int64_t key = 0; key <= t; ++key) {
          for (int64_t j = 0; j < s.head_dim; ++j) {
            const double d = dout[s.channel(b, t, h, j)];
            dqkv[s.packed(2, b, key, h, j)] += p[static_cast<size_t>(key)] * d;
            dp[static_cast<size_t>(key)] += d * qkv[s.packed(2, b, key, h, j)];
          }
          average += p[static_cast<size_t>(key)] * dp[static_cast<size_t>(key)];
        }
        for (int64_t key = 0; key <= t; ++key) {
          const double dscore = p[static_cast<size_t>(key)] * (dp[static_cast<size_t>(key)] - average) * factor;
          for (int64_t j = 0; j < s.head_dim; ++j) {
            dqkv[s.packed(0, b, t, h, j)] += dscore * qkv[s.packed(1, b, key, h, j)];
            dqkv[s.packed(1, b, key, h, j)] += dscore * qkv[s.packed(0, b, t, h, j)];
          }
        }
      }
    }
  }
  return dqkv;
}

// One token; fewer tokens than a tile; exactly a tile; just above; several; heads of 80; a head of 1.
const Shape kShapes[] = {{1, 1, 1, 1},   {2, 1, 3, 80},  {2, 7, 2, 5},    {3, 33, 1, 1},
                         {1, 64, 2, 16}, {2, 65, 3, 80}, {1, 200, 2, 64}, {1, 301, 5, 24}};

std::string describe(const Shape& s) {
  return "B " + std::to_string(s.batch) + " T " + std::to_string(s.sequence) + " NH " + std::to_string(s.heads) +
         " HD " + std::to_string(s.head_dim);
}

class Attention : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(Attention);

TEST_P(Attention, Forward) {
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(describe(s));
    TestDevice device(backend());
    const Tensor qkv = device.random(1, dtype(), {s.batch, s.sequence, 3 * s.channels()}, 1.5);
    const Tensor out = device.poisoned(dtype(), {s.batch, s.sequence, s.channels()});
    const Tensor lse = device.poisoned(DType::kF32, {s.batch, s.heads, s.sequence});
    device->attention_forward(out, lse, qkv, static_cast<int>(s.heads));
    const Attended expected = reference_forward(s, device.read(qkv));
    EXPECT_LE(relative_error(device.read(out), expected.out), tolerance(dtype()));
    EXPECT_LE(relative_error(device.read(lse), expected.lse), 1e-5);
  }
}

// Scores of several hundred: exp would overflow without the maximum.
TEST_P(Attention, LargeScores) {
  const Shape s = {1, 70, 1, 16};
  TestDevice device(backend());
  const Tensor qkv = device.random(1, dtype(), {s.batch, s.sequence, 3 * s.channels()}, 12);
  const Tensor out = device.poisoned(dtype(), {s.batch, s.sequence, s.channels()});
  const Tensor lse = device.poisoned(DType::kF32, {s.batch, s.heads, s.sequence});
  device->attention_forward(out, lse, qkv, 1);
  const Attended expected = reference_forward(s, device.read(qkv));
  EXPECT_LE(relative_error(device.read(out), expected.out), 10 * tolerance(dtype()));  // scores carry 1e-7 of 1000
}

TEST(AttentionReference, GradientsMatchFiniteDifferences) {
  const Shape s = {2, 6, 2, 3};
  std::mt19937 generator(1);
  std::normal_distribution<double> normal;
  Values qkv(static_cast<size_t>(s.batch * s.sequence * 3 * s.channels())), dout(qkv.size() / 3);
  for (double& value : qkv) value = normal(generator);
  for (double& value : dout) value = normal(generator);
  auto forward = [&](const Values& x) { return reference_forward(s, x).out; };
  EXPECT_LE(relative_error(reference_backward(s, dout, qkv), numeric_gradient(forward, qkv, dout)), 1e-8);
}

TEST_P(Attention, Backward) {
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(describe(s));
    TestDevice device(backend());
    const Tensor qkv = device.random(1, dtype(), {s.batch, s.sequence, 3 * s.channels()}, 1.2);
    const Tensor dout = device.random(2, dtype(), {s.batch, s.sequence, s.channels()});
    const Tensor out = device.poisoned(dtype(), {s.batch, s.sequence, s.channels()});
    const Tensor lse = device.poisoned(DType::kF32, {s.batch, s.heads, s.sequence});
    const Tensor dqkv = device.poisoned(dtype(), {s.batch, s.sequence, 3 * s.channels()});
    device->attention_forward(out, lse, qkv, static_cast<int>(s.heads));
    device->attention_backward(dqkv, dout, out, lse, qkv, static_cast<int>(s.heads));
    const Values expected = reference_backward(s, device.read(dout), device.read(qkv));
    EXPECT_LE(relative_error(device.read(dqkv), expected), tolerance(dtype()));
  }
}

TEST_P(Attention, SameBitsTwice) {
  expect_repeatable(backend(), [&](TestDevice& device) {
    const Shape s = {3, 77, 2, 24};
    const Tensor qkv = device.random(1, dtype(), {s.batch, s.sequence, 3 * s.channels()});
    const Tensor dout = device.random(2, dtype(), {s.batch, s.sequence, s.channels()});
    const Tensor out = device.poisoned(dtype(), {s.batch, s.sequence, s.channels()});
    const Tensor lse = device.poisoned(DType::kF32, {s.batch, s.heads, s.sequence});
    const Tensor dqkv = device.poisoned(dtype(), {s.batch, s.sequence, 3 * s.channels()});
    device->attention_forward(out, lse, qkv, 2);
    device->attention_backward(dqkv, dout, out, lse, qkv, 2);
    std::vector<uint8_t> all = device.bits(out);
    const std::vector<uint8_t> gradient = device.bits(dqkv);
    all.insert(all.end(), gradient.begin(), gradient.end());
    return all;
  });
}

}  // namespace
