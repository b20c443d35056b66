// test_cosine_transform.cpp: cosine_down() and cosine_up() against products with the projection in float64, for every
// way to lay out the vectors, and that their bits depend on nothing else.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numbers>

#include "kernels/cosine_projection.h"
#include "kernels/cpu/cosine_transform.h"
#include "tests/backends.h"
#include "tests/device_value.h"

namespace {

constexpr RandomKey kKey{.seed = 5, .purpose = RandomPurpose::kProjection, .tensor = 9};

// P [r, d], number `index` of kKey, in float64 (docs/design.md, "Flora, exactly").
Values projection(int64_t r, int64_t d, uint32_t index) {
  const CosineBasis basis = cosine_basis(d);
  const PhiloxWords words = philox_block(kKey, index, kPermutationBlock);
  Values p;
  for (int64_t k = 0; k < r; ++k) {
    const uint32_t f = cosine_frequency(basis, words, static_cast<uint32_t>(k));
    for (int64_t j = 0; j < d; ++j) {
      const PhiloxWords signs = philox_block(kKey, index, static_cast<uint64_t>(j / 128));
      const bool plus = signs.w[j % 128 / 32] >> (j % 32) & 1u;
      const double amplitude = std::sqrt((f == 0 ? 1.0 : 2.0) / static_cast<double>(d));
      p.push_back((plus ? 1 : -1) * amplitude *
                  std::cos(std::numbers::pi * f * (2.0 * static_cast<double>(j) + 1) / (2.0 * static_cast<double>(d))));
    }
  }
  return p;
}

struct Case {
  int64_t d, vectors, rank;
};

// All radices, lengths and numbers of vectors that no register divides, one vector, all frequencies.
constexpr Case kCases[] = {{4, 3, 2},     {6, 1, 6},     {10, 33, 3},  {14, 16, 5},   {90, 35, 40},  {98, 40, 98},
                           {250, 19, 33}, {4, 20000, 4}, {256, 31, 1}, {320, 21, 64}, {768, 17, 64}, {1024, 9, 30}};

// The layouts: vectors are the columns or the rows of a matrix, which may be part of a larger one.
template <typename F>
void for_each_layout(F&& f) {
  for (const Case& c : kCases)
    for (const bool of_rows : {false, true})
      for (const DType dtype : {DType::kF32, DType::kBF16})
        for (const int64_t more : {0, 5}) f(c, of_rows, dtype, more);
}

Tensor random_matrix(TestDevice& device, int seed, DType dtype, int64_t rows, int64_t cols, int64_t more) {
  const Tensor random = device.random(seed, dtype, {rows, cols});
  return device.upload(device.read(random), dtype, {rows, cols}, cols + more);
}

TEST(CosineTransform, DownIsTheProductWithTheProjection) {
  for_each_layout([](const Case& c, bool of_rows, DType dtype, int64_t more) {
    TestDevice device("cpu");
    const DeviceValue<uint32_t> index(device, 3);
    const CosineProjection p = {.rank = c.rank, .of_rows = of_rows, .key = kKey, .index = index.data()};
    const auto make = [&](int seed, DType type, int64_t length) {
      return random_matrix(device, seed, type, of_rows ? length : c.vectors, of_rows ? c.vectors : length, more);
    };
    const Tensor in = make(1, dtype, c.d), scale = device.random(2, DType::kF32, {c.d});
    const Values G = device.read(in), P = projection(c.rank, c.d, 3), scales = device.read(scale);
    for (const bool scaled : {false, true}) {
      const Tensor out = make(3, DType::kF32, c.rank);
      const Values before = device.read(out);
      device->cosine_down(out, in, scaled ? scale : Tensor{}, p, scaled);
      Values expected(before.size(), 0);
      for (int64_t v = 0; v < c.vectors; ++v)
        for (int64_t k = 0; k < c.rank; ++k) {
          double sum = 0;
          for (int64_t j = 0; j < c.d; ++j)
            sum += P[k * c.d + j] * (scaled ? scales[j] : 1) * G[of_rows ? j * c.vectors + v : v * c.d + j];
          const int64_t at = of_rows ? k * c.vectors + v : v * c.rank + k;
          expected[at] = sum + (scaled ? before[at] : 0);
        }
      EXPECT_LE(relative_error(device.read(out), expected), 1e-6) << c.d << " " << c.vectors << " " << c.rank;
    }
  });
}

TEST(CosineTransform, UpIsTheProductBesideAScaledSum) {
  for_each_layout([](const Case& c, bool of_rows, DType dtype, int64_t more) {
    TestDevice device("cpu");
    const DeviceValue<uint32_t> index(device, 4);
    const CosineProjection p = {.rank = c.rank, .of_rows = of_rows, .key = kKey, .index = index.data()};
    const int64_t rows = of_rows ? c.d : c.vectors, cols = of_rows ? c.vectors : c.d;
    const Tensor in = random_matrix(device, 1, dtype, of_rows ? c.rank : rows, of_rows ? cols : c.rank, more);
    const Tensor row_scale = device.random(2, DType::kF32, {rows}), col_scale = device.random(3, DType::kF32, {cols});
    const Values M = device.read(in), P = projection(c.rank, c.d, 4);
    for (const int scales : {0, 1, 2, 3}) {  // bit 0: rows, bit 1: columns
      const Tensor out = random_matrix(device, 4, dtype, rows, cols, more);
      const Values before = device.read(out);
      const bool keeps = scales != 0;
      const Tensor squares = device.upload({7.0}, DType::kF32, {1});
      device->cosine_up({.out = out,
                         .in = keeps ? out : Tensor{},
                         .row_scale = scales & 1 ? row_scale : Tensor{},
                         .col_scale = scales & 2 ? col_scale : Tensor{},
                         .factor = 0.25f},
                        in, p, -1.5f, {squares.as<float>(), keeps});
      const Values R = device.read(row_scale), C = device.read(col_scale);
      Values expected;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
          double sum = 0;
          for (int64_t k = 0; k < c.rank; ++k)
            sum += of_rows ? P[k * c.d + i] * M[k * cols + j] : M[i * c.rank + k] * P[k * c.d + j];
          const double scale = (scales & 1 ? R[i] : 1) * (scales & 2 ? C[j] : 1);
          expected.push_back((keeps ? 0.25 * scale * before[i * cols + j] : 0) - 1.5 * sum);
        }
      const Values found = device.read(out);
      EXPECT_LE(relative_error(found, expected), dtype == DType::kF32 ? 1e-6 : 4e-3) << c.d << " " << c.vectors;
      double total = keeps ? 7 : 0;
      for (const double x : found) total += x * x;
      EXPECT_NEAR(device.read(squares)[0] / total, 1, 1e-6);
    }
  });
}

// One vector's numbers do not depend on those beside it, and so not on blocks or threads either.
TEST(CosineTransform, AVectorHasTheSameBitsAlone) {
  for (const bool of_rows : {false, true}) {
    const int64_t d = 96, vectors = 150, rank = 28;
    Values first;
    for (const int threads : {1, 3}) {
      TestDevice device("cpu", threads);
      const DeviceValue<uint32_t> index(device, 1);
      const CosineProjection p = {.rank = rank, .of_rows = of_rows, .key = kKey, .index = index.data()};
      const Tensor in = device.random(1, DType::kF32, {of_rows ? d : vectors, of_rows ? vectors : d});
      const Tensor down = device.poisoned(DType::kF32, {of_rows ? rank : vectors, of_rows ? vectors : rank});
      device->cosine_down(down, in, {}, p);
      const Tensor squares = device.poisoned(DType::kF32, {1});
      device->cosine_up({.out = in, .in = in}, down, p, 0.5f, {squares.as<float>()});
      Values all = device.read(down), up = device.read(in);
      all.insert(all.end(), up.begin(), up.end());
      all.push_back(device.read(squares)[0]);
      if (first.empty()) first = all;
      EXPECT_EQ(all, first);
      if (of_rows) continue;
      const Tensor again = device.random(1, DType::kF32, {vectors, d}), part = device.poisoned(DType::kF32, {7, rank});
      device->cosine_down(part, again.slice(77, 7), {}, p);
      EXPECT_EQ(std::memcmp(part.data, down.slice(77, 7).data, part.bytes()), 0);
    }
  }
}

// To nearest even, NaN to NaN, whether a register is full or not.
TEST(CosineTransform, Bf16IsRoundedAsEverywhere) {
  TestDevice device("cpu");
  const int64_t d = 32, vectors = 41, rank = 20;
  const DeviceValue<uint32_t> index(device, 1);
  const CosineProjection p = {.rank = rank, .key = kKey, .index = index.data()};
  Values values = device.read(device.random(1, DType::kF32, {vectors, d}));
  values[3] = std::nan("");
  values[40 * d + 1] = INFINITY;
  const Tensor in = device.upload(values, DType::kF32, {vectors, d});
  const Tensor exact = device.poisoned(DType::kF32, {vectors, rank}),
               rounded = device.poisoned(DType::kBF16, {vectors, rank});
  device->cosine_down(exact, in, {}, p);
  device->cosine_down(rounded, in, {}, p);
  for (int64_t i = 0; i < exact.elements(); ++i)
    EXPECT_EQ(rounded.as<bf16>()[i].bits, from_float<bf16>(exact.as<float>()[i]).bits) << i;
  EXPECT_TRUE(std::isnan(exact.as<float>()[0]));
  EXPECT_FALSE(std::isfinite(exact.as<float>()[40 * rank]));
  EXPECT_TRUE(std::isfinite(exact.as<float>()[rank]));
}

// Where a product is as fast, or a length has a factor that no butterfly is written for.
TEST(CosineTransform, IsForHighRanksAndLengthsOfSmallFactors) {
  TestDevice device("cpu");
  EXPECT_TRUE(device->transforms_cosines(256, 768));
  EXPECT_TRUE(device->transforms_cosines(64, 1600));
  EXPECT_FALSE(device->transforms_cosines(8, 768));
  EXPECT_FALSE(device->transforms_cosines(256, 128));
  for (const int64_t length : {0, 1, 2, 3, 63, 765, 2 * 11 * 32, 2 * 13 * 2})
    EXPECT_FALSE(device->transforms_cosines(40, length)) << length;
  for (const int64_t length : {0, 2, 3, 26, 767}) EXPECT_FALSE(CosineTransform::has_length(length)) << length;
  EXPECT_TRUE(CosineTransform::has_length(4));
}

TEST(CosineTransform, RefusesWhatDoesNotFit) {
  TestDevice device("cpu");
  const DeviceValue<uint32_t> index(device, 1);
  const CosineProjection p = {.rank = 4, .of_rows = false, .key = kKey, .index = index.data()};
  const Tensor in = device.random(1, DType::kF32, {5, 8}), out = device.random(1, DType::kF32, {5, 4});
  const Tensor scale = device.random(1, DType::kF32, {5}), codes = device.poisoned(DType::kI8, {5, 4});
  device->cosine_down(out, in, {}, p);
  EXPECT_THROW(device->cosine_down(out, in.slice(0, 4), {}, p), std::logic_error);
  EXPECT_THROW(device->cosine_down(codes, in, {}, p), std::logic_error);
  EXPECT_THROW(device->cosine_down(out, in, scale, p), std::logic_error);
  EXPECT_THROW(device->cosine_down(in, out, {}, {.rank = 8, .key = kKey, .index = index.data()}), std::logic_error);
  EXPECT_THROW(device->cosine_up({.out = in, .in = in, .col_scale = scale}, out, p, 1.0f), std::logic_error);
  EXPECT_THROW(device->cosine_up({.out = in, .in = out}, out, p, 1.0f), std::logic_error);
}

}  // namespace
