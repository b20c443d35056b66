// test_attention.cpp: causal self-attention, forward and backward, against full T x T matrices in float64.
#include "kernels/cuda/attention_tiles.h"
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

// Of the queries from `first` on.
Attended reference_forward(const Shape& s, const Values& qkv, int64_t first = 0) {
  Attended result = {Values(static_cast<size_t>(s.batch * s.sequence * s.channels())), {}};
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.heads; ++h) {
      for (int64_t t = first; t < s.sequence; ++t) {
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

// One token; fewer tokens than a tile; exactly a tile; just above; several; heads of 1, of odd sizes and of more than
// 128. Then the head dimensions that tensor cores take, at the ends of tiles of 16, 32, 64 and 128.
const Shape kShapes[] = {{1, 1, 1, 1},    {2, 7, 2, 5},     {3, 33, 1, 1},   {1, 64, 2, 16},  {1, 150, 5, 24},
                         {2, 66, 1, 33},  {1, 70, 1, 99},   {1, 40, 1, 200}, {1, 65, 11, 1},  {2, 1, 3, 80},
                         {1, 2, 2, 128},  {1, 17, 3, 96},   {2, 63, 1, 64},  {1, 64, 2, 128}, {2, 65, 3, 80},
                         {1, 100, 1, 96}, {1, 129, 1, 128}, {1, 129, 2, 96}, {1, 200, 2, 64}, {1, 193, 1, 80}};

std::string describe(const Shape& s) {
  return "B " + std::to_string(s.batch) + " T " + std::to_string(s.sequence) + " NH " + std::to_string(s.heads) +
         " HD " + std::to_string(s.head_dim);
}

// With as many heads as make channels that the backend takes.
Shape taken_by(const std::string& backend, Shape s) {
  while (row_length(backend, s.channels()) != s.channels()) ++s.heads;
  return s;
}

class Attention : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(Attention);

struct AttentionTensors {
  Tensor qkv, dout, out, lse, dqkv, dbias;
};

AttentionTensors make_tensors(TestDevice& device, const Shape& s, DType activation, DType output, DType gradient,
                              double stddev) {
  return {.qkv = device.random(1, activation, {s.batch, s.sequence, 3 * s.channels()}, stddev),
          .dout = device.random(2, gradient, {s.batch, s.sequence, s.channels()}),
          .out = device.poisoned(output, {s.batch, s.sequence, s.channels()}),
          .lse = device.poisoned(DType::kF32, {s.batch, s.heads, s.sequence}),
          .dqkv = device.poisoned(gradient, {s.batch, s.sequence, 3 * s.channels()}),
          .dbias = device.poisoned(gradient, {3 * s.channels()})};
}

void run_forward(TestDevice& device, const Shape& s, const AttentionTensors& x) {
  device->attention_forward(x.out, x.lse, x.qkv, static_cast<int>(s.heads));
}

void run_backward(TestDevice& device, const Shape& s, const AttentionTensors& x, bool accumulate = false) {
  device->attention_backward(x.dqkv, x.dbias, x.dout, x.out, x.lse, x.qkv, static_cast<int>(s.heads), accumulate);
}

// The bias's gradient is `before` and the sums of the columns of dqkv as it is stored, each by itself: those of K are
// small, because what softmax gives to one key it takes from the others.
void expect_sums(TestDevice& device, const AttentionTensors& x, Values before = {}) {
  const Values result = device.read(x.dbias), gradient = device.read(x.dqkv);
  Values sums = before.empty() ? Values(result.size()) : std::move(before), squares = sums;
  for (double& square : squares) square *= square;
  for (size_t i = 0; i < gradient.size(); ++i) {
    sums[i % sums.size()] += gradient[i];
    squares[i % sums.size()] += gradient[i] * gradient[i];
  }
  for (size_t j = 0; j < sums.size(); ++j)
    EXPECT_NEAR(result[j], sums[j], tolerance(x.dbias.dtype) * (std::abs(sums[j]) + std::sqrt(squares[j]))) << j;
}

void expect_right(TestDevice& device, const Shape& s, const AttentionTensors& x, double allowed) {
  const Values qkv = device.read(x.qkv);
  const Attended expected = reference_forward(s, qkv);
  EXPECT_LE(relative_error(device.read(x.out), expected.out), allowed);
  EXPECT_LE(relative_error(device.read(x.lse), expected.lse), 1e-5);
  const Values gradient = device.read(x.dqkv), expected_gradient = reference_backward(s, device.read(x.dout), qkv);
  EXPECT_LE(relative_error(gradient, expected_gradient), allowed);
  expect_sums(device, x);
  if (s.sequence == 1) return;               // dQ and dK of a softmax over one key are 0 but for rounding
  for (int which = 0; which < 3; ++which) {  // dV is large and would hide an error in dQ or dK
    Values part, expected_part;
    const int64_t width = s.channels();
    for (size_t i = 0; i < gradient.size(); ++i) {
      if (static_cast<int64_t>(i) / width % 3 != which) continue;
      part.push_back(gradient[i]);
      expected_part.push_back(expected_gradient[i]);
    }
    EXPECT_LE(relative_error(part, expected_part), allowed) << "dQ, dK or dV: " << which;
  }
}

TEST_P(Attention, ForwardAndBackward) {
  for (const Shape& any : kShapes) {
    const Shape s = taken_by(backend(), any);
    SCOPED_TRACE(describe(s));
    TestDevice device(backend());
    const AttentionTensors x = make_tensors(device, s, dtype(), dtype(), dtype(), 1.3);
    run_forward(device, s, x);
    run_backward(device, s, x);
    expect_right(device, s, x, tolerance(dtype()));
  }
}

// Added to what is there, in the other dtype; tiles of several sequences.
TEST_P(Attention, BiasGradientIsAdded) {
  const Shape shapes[] = {{1, 1, 1, 1},   {1, 150, 5, 24}, {1, 70, 1, 99},  {1, 40, 1, 200}, {2, 65, 3, 80},
                          {2, 63, 1, 64}, {1, 129, 2, 96}, {3, 150, 2, 64}, {3, 70, 1, 128}};
  const DType other = dtype() == DType::kF32 ? DType::kBF16 : DType::kF32;
  for (const Shape& any : shapes) {
    const Shape s = taken_by(backend(), any);
    SCOPED_TRACE(describe(s));
    TestDevice device(backend());
    AttentionTensors x = make_tensors(device, s, dtype(), dtype(), dtype(), 1.3);
    x.dbias = device.random(3, other, {3 * s.channels()}, 2);
    const Values before = device.read(x.dbias);
    run_forward(device, s, x);
    run_backward(device, s, x, true);
    expect_sums(device, x, before);
  }
}

TEST_P(Attention, MixedTypes) {
  const DType other = dtype() == DType::kF32 ? DType::kBF16 : DType::kF32;
  const Shape s = {2, 37, 2, 64};
  for (int mix = 1; mix < 8; ++mix) {
    SCOPED_TRACE(mix);
    TestDevice device(backend());
    const AttentionTensors x =
        make_tensors(device, s, mix & 1 ? other : dtype(), mix & 2 ? other : dtype(), mix & 4 ? other : dtype(), 1.0);
    run_forward(device, s, x);
    run_backward(device, s, x);
    expect_right(device, s, x, tolerance(DType::kBF16));
  }
}

// Tensors that start at any element, which a GPU refuses.
TEST_P(Attention, UnalignedTensors) {
  const Shape s = {1, 35, 2, 64};
  TestDevice device(backend());
  AttentionTensors x = make_tensors(device, s, dtype(), dtype(), dtype(), 1.0);
  for (Tensor* t : {&x.qkv, &x.dout, &x.out, &x.dqkv}) {
    const Values values = device.read(*t);
    const Tensor longer = device.poisoned(dtype(), {t->elements() + 1});
    t->data = static_cast<char*>(longer.data) + dtype_size(dtype());
    device.write(*t, values);
  }
  if (backend() != "cpu") {
    EXPECT_THROW(run_forward(device, s, x), std::logic_error);
    EXPECT_THROW(run_backward(device, s, x), std::logic_error);
    return;
  }
  run_forward(device, s, x);
  run_backward(device, s, x);
  expect_right(device, s, x, tolerance(dtype()));
}

// Scores of several hundred: exp would overflow without the maximum.
TEST_P(Attention, LargeScores) {
  for (const Shape& s : {Shape{1, 70, 1, 16}, Shape{1, 130, 1, 64}}) {
    SCOPED_TRACE(describe(s));
    TestDevice device(backend());
    const AttentionTensors x = make_tensors(device, s, dtype(), dtype(), dtype(), 12.0);
    run_forward(device, s, x);
    run_backward(device, s, x);
    const Values qkv = device.read(x.qkv);
    const double allowed = 10 * tolerance(dtype());  // scores carry 1e-7 of 1000
    EXPECT_LE(relative_error(device.read(x.out), reference_forward(s, qkv).out), allowed);
    EXPECT_LE(relative_error(device.read(x.dqkv), reference_backward(s, device.read(x.dout), qkv)), allowed);
  }
}

// Scores that grow along the sequence, slowly and in jumps, so that every tile of keys has a new maximum.
TEST_P(Attention, RisingScores) {
  const Shape s = {1, 210, 1, 64};
  TestDevice device(backend());
  const AttentionTensors x = make_tensors(device, s, dtype(), dtype(), dtype(), 0.3);
  Values qkv = device.read(x.qkv);
  for (int64_t t = 0; t < s.sequence; ++t) {
    for (int64_t j = 0; j < s.head_dim; ++j) {
      qkv[s.packed(0, 0, t, 0, j)] += 1.0;
      qkv[s.packed(1, 0, t, 0, j)] += 0.01 * static_cast<double>(t) + (t % 50 == 49 ? 2.0 : 0.0);
    }
  }
  device.write(x.qkv, qkv);
  run_forward(device, s, x);
  run_backward(device, s, x);
  const Attended expected = reference_forward(s, device.read(x.qkv));
  EXPECT_LE(relative_error(device.read(x.out), expected.out), tolerance(dtype()));
  EXPECT_LE(relative_error(device.read(x.lse), expected.lse), 1e-5);
  // What all keys have in common cancels in dQ, but for rounding: the gradient is compared as a whole.
  EXPECT_LE(relative_error(device.read(x.dqkv), reference_backward(s, device.read(x.dout), device.read(x.qkv))),
            tolerance(dtype()));
}

// The first token sees only itself; and what comes later changes not one bit of what came before.
TEST_P(Attention, Causal) {
  for (const Shape& s : {Shape{2, 75, 2, 24}, Shape{1, 140, 2, 64}}) {
    SCOPED_TRACE(describe(s));
    const int64_t same = s.sequence - 9;
    TestDevice device(backend());
    const AttentionTensors x = make_tensors(device, s, dtype(), dtype(), dtype(), 1.0);
    run_forward(device, s, x);
    const Values qkv = device.read(x.qkv), out = device.read(x.out);
    Values changed = qkv;
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t j = 0; j < s.channels(); ++j) {
        EXPECT_EQ(out[s.channel(b, 0, 0, j)], qkv[s.packed(2, b, 0, 0, j)]);
      }
      for (int64_t t = same; t < s.sequence; ++t) {
        for (int which = 0; which < 3; ++which) {
          for (int64_t j = 0; j < s.channels(); ++j) changed[s.packed(which, b, t, 0, j)] *= -7;
        }
      }
    }
    device.write(x.qkv, changed);
    run_forward(device, s, x);
    const Values out_changed = device.read(x.out);
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t t = 0; t < same; ++t) {
        for (int64_t j = 0; j < s.channels(); ++j) {
          ASSERT_EQ(out_changed[s.channel(b, t, 0, j)], out[s.channel(b, t, 0, j)]) << "token " << t;
        }
      }
    }
  }
}

// One query over the rows of all tokens: the last row of the whole.
TEST_P(Attention, DecodeIsTheLastRow) {
  std::vector<Shape> shapes(std::begin(kShapes), std::end(kShapes));
  shapes.push_back({1, 512, 4, 24});  // whole pieces of keys of the CUDA kernel
  shapes.push_back({1, 511, 70, 8});  // more heads than the CPU takes together
  shapes.push_back({1, 3, 66, 128});
  for (const Shape& any : shapes) {
    Shape s = taken_by(backend(), any);
    s.batch = 1;
    SCOPED_TRACE(describe(s));
    for (const DType output : {dtype(), dtype() == DType::kF32 ? DType::kBF16 : DType::kF32}) {
      TestDevice device(backend());
      const Tensor qkv = device.random(3, dtype(), {s.sequence, 3 * s.channels()}, 1.3);
      const Tensor out = device.poisoned(output, {s.channels()});
      device->attention_decode(out, qkv, static_cast<int>(s.heads));
      const Values whole = reference_forward(s, device.read(qkv), s.sequence - 1).out;
      EXPECT_LE(relative_error(device.read(out), Values(whole.end() - s.channels(), whole.end())), tolerance(output));
    }
  }
}

// Scores of several hundred, and scores that rise along the sequence: the largest so far changes with every piece.
TEST_P(Attention, DecodeOfLargeAndRisingScores) {
  const Shape s = {1, 600, 2, 16};
  TestDevice device(backend());
  const Tensor qkv = device.random(4, dtype(), {s.sequence, 3 * s.channels()}, 12.0);
  const Tensor out = device.poisoned(dtype(), {s.channels()});
  const auto expect_right = [&](double allowed) {
    device->attention_decode(out, qkv, static_cast<int>(s.heads));
    const Values whole = reference_forward(s, device.read(qkv)).out;
    EXPECT_LE(relative_error(device.read(out), Values(whole.end() - s.channels(), whole.end())), allowed);
  };
  expect_right(10 * tolerance(dtype()));  // scores carry 1e-7 of 1000
  Values values = device.read(qkv);
  for (double& value : values) value /= 40;
  for (int64_t t = 0; t < s.sequence; ++t) {
    for (int64_t j = 0; j < s.channels(); ++j) {
      values[s.packed(0, 0, t, 0, j)] += 1.0;
      values[s.packed(1, 0, t, 0, j)] += 0.01 * static_cast<double>(t) + (t % 50 == 49 ? 2.0 : 0.0);
    }
  }
  device.write(qkv, values);
  expect_right(tolerance(dtype()));
}

TEST_P(Attention, WrongShapes) {
  TestDevice device(backend());
  const Shape s = {1, 3, 2, 4};
  const AttentionTensors x = make_tensors(device, s, dtype(), dtype(), dtype(), 1.0);
  EXPECT_THROW(device->attention_forward(x.out, x.lse, x.qkv, 3), std::logic_error);
  EXPECT_THROW(device->attention_forward(x.out, x.lse, x.qkv, 0), std::logic_error);
  EXPECT_THROW(device->attention_forward(x.out, x.lse, x.out, 2), std::logic_error);
  EXPECT_THROW(device->attention_forward(x.out, x.qkv, x.qkv, 2), std::logic_error);
  const Tensor row = device.poisoned(dtype(), {s.channels()}), rows = x.qkv.view({s.sequence, 3 * s.channels()});
  EXPECT_THROW(device->attention_decode(row, rows, 3), std::logic_error);
  EXPECT_THROW(device->attention_decode(row, rows, 0), std::logic_error);
  EXPECT_THROW(device->attention_decode(row, x.out, 2), std::logic_error);
  EXPECT_THROW(device->attention_decode(x.out, rows, 2), std::logic_error);
  EXPECT_THROW(device->attention_backward(x.out, x.dbias, x.dout, x.out, x.lse, x.qkv, 2, false), std::logic_error);
  EXPECT_THROW(device->attention_backward(x.dqkv, x.dbias, x.dqkv, x.out, x.lse, x.qkv, 2, false), std::logic_error);
  EXPECT_THROW(device->attention_backward(x.dqkv, row, x.dout, x.out, x.lse, x.qkv, 2, false), std::logic_error);
}

// Every tile of every head has one block; longer ones come first within a group of heads.
TEST(AttentionTiles, OneBlockEach) {
  for (int together : {1, 3, 7, 8}) {
    for (bool last_is_longest : {false, true}) {
      const int tiles = 5;
      const AttentionSizes sizes = {
          .channels = 20, .sequence = 300, .heads = 4, .head_dim = 5, .total_heads = 8, .heads_together = together};
      std::vector<int> blocks(static_cast<size_t>(tiles * sizes.total_heads), 0);
      int last_work = tiles + 1, last_group = 0;
      for (int block = 0; block < tiles * sizes.total_heads; ++block) {
        const AttentionTile at = attention_tile(sizes, block, tiles, last_is_longest);
        ++blocks.at(static_cast<size_t>(at.head * tiles + at.tile));
        const int work = last_is_longest ? at.tile + 1 : tiles - at.tile, group = at.head / together;
        EXPECT_TRUE(group == last_group ? work <= last_work : group == last_group + 1);
        last_work = work, last_group = group;
        EXPECT_EQ(at.packed(sizes, 2), (at.head / 4 * 300 + 2) * 60 + at.head % 4 * 5);
        EXPECT_EQ(at.channel(sizes, 2), (at.head / 4 * 300 + 2) * 20 + at.head % 4 * 5);
        EXPECT_EQ(at.row(sizes, 2), at.head * 300 + 2);
        EXPECT_EQ(at.tile_sums(sizes, tiles), (at.head / 4 * tiles + at.tile) * 60 + at.head % 4 * 5);
      }
      for (int count : blocks) EXPECT_EQ(count, 1);
    }
  }
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

TEST_P(Attention, SameBitsTwice) {
  for (const Shape& s : {Shape{3, 77, 2, 24}, Shape{1, 140, 2, 64}}) {
    expect_repeatable(backend(), [&](TestDevice& device) {
      const AttentionTensors x = make_tensors(device, s, dtype(), dtype(), dtype(), 1.0);
      run_forward(device, s, x);
      run_backward(device, s, x);
      std::vector<uint8_t> all = device.bits(x.out);
      for (const Tensor& t : {x.lse, x.dqkv, x.dbias}) {
        const std::vector<uint8_t> bits = device.bits(t);
        all.insert(all.end(), bits.begin(), bits.end());
      }
      return all;
    });
  }
}

}  // namespace
