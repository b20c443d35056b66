// test_classifier.cpp: softmax and cross-entropy against float64, the gradient by finite differences of the loss.
#include "tests/backends.h"

namespace {

double reference_lse(const double* logits, int64_t vocabulary) {
  double maximum = -INFINITY, sum = 0;
  for (int64_t j = 0; j < vocabulary; ++j) maximum = std::max(maximum, logits[j]);
  for (int64_t j = 0; j < vocabulary; ++j) sum += std::exp(logits[j] - maximum);
  return maximum + std::log(sum);
}

double reference_loss(const double* logits, int64_t vocabulary, int target) {
  return reference_lse(logits, vocabulary) - logits[target];
}

class Classifier : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(Classifier);

TEST_P(Classifier, LossWithoutGradientLeavesTheLogitsAlone) {
  for (const int64_t vocabulary : {1, 7, 257, 5003}) {
    TestDevice device(backend());
    const int64_t rows = 9, padded = row_length(backend(), vocabulary + 21);
    const Tensor logits = device.random(1, dtype(), {rows, padded}, 4);
    Values targets, expected;
    const Values values = device.read(logits);
    for (int64_t i = 0; i < rows; ++i) {
      const int target = i == 4 ? -1 : static_cast<int>(i * 37 % vocabulary);
      targets.push_back(target);
      expected.push_back(target < 0 ? 0 : reference_loss(&values[static_cast<size_t>(i * padded)], vocabulary, target));
    }
    const Tensor losses = device.poisoned(DType::kF32, {rows});
    device->classifier(losses, logits, device.upload(targets, DType::kI32, {rows}), vocabulary, 1.0f, false);
    EXPECT_LE(relative_error(device.read(losses), expected), 1e-5) << "V " << vocabulary;
    EXPECT_EQ(device.read(logits), values);
  }
}

TEST_P(Classifier, GradientMatchesFiniteDifferences) {
  for (const int64_t vocabulary : {2, 131, 1003}) {
    TestDevice device(backend());
    const int64_t rows = 3, padded = row_length(backend(), vocabulary + 5);
    const double scale = 0.125;
    const Tensor logits = device.random(1, dtype(), {rows, padded}, 2, row_length(backend(), padded + 3));
    const Values values = device.read(logits), targets = {static_cast<double>(vocabulary - 1), 0, -1};
    Values expected;
    for (int64_t i = 0; i < rows; ++i) {
      const int target = static_cast<int>(targets[static_cast<size_t>(i)]);
      const double* row = &values[static_cast<size_t>(i * padded)];
      Values gradient(static_cast<size_t>(vocabulary));
      if (target >= 0) {
        auto loss = [&](const Values& x) { return Values{reference_loss(x.data(), vocabulary, target)}; };
        gradient = numeric_gradient(loss, Values(row, row + vocabulary), {scale});
      }
      gradient.resize(static_cast<size_t>(padded));
      expected.insert(expected.end(), gradient.begin(), gradient.end());
    }
    const Tensor losses = device.poisoned(DType::kF32, {rows});
    device->classifier(losses, logits, device.upload(targets, DType::kI32, {rows}), vocabulary,
                       static_cast<float>(scale), true);
    const Values gradient = device.read(logits);
    EXPECT_LE(relative_error(gradient, expected), tolerance(dtype())) << "V " << vocabulary;
    for (size_t i = 0; i < gradient.size(); ++i) {
      const bool ignored = static_cast<int64_t>(i) % padded >= vocabulary || static_cast<int64_t>(i) / padded == 2;
      if (ignored) {
        EXPECT_EQ(gradient[i], 0.0);
      }
    }
  }
}

// GPT-2's vocabulary, padded as in memory and not, and a longer one; also one that ends in the middle of a vector.
TEST_P(Classifier, LargeVocabularies) {
  for (const auto& [vocabulary, any] :
       {std::pair<int64_t, int64_t>{50257, 50304}, {50257, 50257}, {50263, 50264}, {64000, 64000}}) {
    TestDevice device(backend());
    const int64_t rows = 2, padded = row_length(backend(), any);
    const float scale = 1024;
    const Tensor logits = device.random(1, dtype(), {rows, padded}, 3), losses = device.poisoned(DType::kF32, {rows});
    const Values values = device.read(logits), targets = {static_cast<double>(vocabulary - 1), 4321};
    Values expected(values.size()), expected_losses;
    for (int64_t i = 0; i < rows; ++i) {
      const int target = static_cast<int>(targets[static_cast<size_t>(i)]);
      const double* row = &values[static_cast<size_t>(i * padded)];
      expected_losses.push_back(reference_loss(row, vocabulary, target));
      for (int64_t j = 0; j < vocabulary; ++j) {
        const double probability = std::exp(row[j] - row[target] - expected_losses.back());
        expected[static_cast<size_t>(i * padded + j)] = scale * (probability - (j == target));
      }
    }
    device->classifier(losses, logits, device.upload(targets, DType::kI32, {rows}), vocabulary, scale, true);
    const Values gradient = device.read(logits);
    EXPECT_LE(relative_error(device.read(losses), expected_losses), 1e-5);
    EXPECT_LE(relative_error(gradient, expected), tolerance(dtype())) << vocabulary << " of " << padded;
    // The norm is that of two numbers: without them, the small ones count.
    Values small = gradient, expected_small = expected;
    for (int64_t i = 0; i < rows; ++i) {
      const size_t at = static_cast<size_t>(i * padded) + static_cast<size_t>(targets[static_cast<size_t>(i)]);
      small[at] = expected_small[at] = 0;
    }
    EXPECT_LE(relative_error(small, expected_small), tolerance(dtype())) << vocabulary << " of " << padded;
    for (int64_t j = vocabulary; j < padded; ++j) EXPECT_EQ(gradient[static_cast<size_t>(j)], 0.0);
  }
}

// Masked logits: one thread may see nothing but -infinity.
TEST_P(Classifier, LogitsOfMinusInfinityHaveNoProbability) {
  for (const int64_t vocabulary : row_lengths(backend(), {9, 4000})) {
    TestDevice device(backend());
    Values values(static_cast<size_t>(vocabulary), -INFINITY);
    values[3] = 1;
    values[8] = 2;
    const Tensor logits = device.upload(values, dtype(), {1, vocabulary}), losses = device.poisoned(DType::kF32, {1});
    device->classifier(losses, logits, device.upload({8}, DType::kI32, {1}), vocabulary, 1.0f, true);
    const double probability = 1 / (1 + std::exp(-1.0));
    Values expected(values.size());
    expected[3] = 1 - probability;
    expected[8] = probability - 1;
    EXPECT_LE(relative_error(device.read(losses), {-std::log(probability)}), 1e-5);
    EXPECT_LE(relative_error(device.read(logits), expected), tolerance(dtype()));
  }
}

// Differences of logits from 0 to -200: exponentials that vanish, and a loss that is large but finite.
TEST_P(Classifier, ExtremeLogits) {
  TestDevice device(backend());
  Values values(304);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(i % 101) * 2;
  const Tensor logits = device.upload(values, dtype(), {1, 304}), losses = device.poisoned(DType::kF32, {1});
  device->classifier(losses, logits, device.upload({0}, DType::kI32, {1}), 304, 1.0f, true);
  EXPECT_LE(relative_error(device.read(losses), {reference_loss(values.data(), 304, 0)}), 1e-5);
  for (double gradient : device.read(logits)) EXPECT_TRUE(std::isfinite(gradient));
}

TEST_P(Classifier, NonFiniteLogitsGiveNonFiniteLosses) {
  for (const double bad : Values{NAN, INFINITY}) {
    for (const size_t where : {0, 50, 99}) {
      TestDevice device(backend());
      Values values(104, 1.0);
      values[where] = bad;
      const Tensor logits = device.upload(values, dtype(), {1, 104}), losses = device.poisoned(DType::kF32, {1});
      device->classifier(losses, logits, device.upload({7}, DType::kI32, {1}), 104, 1.0f, false);
      EXPECT_FALSE(std::isfinite(device.read(losses)[0]));
    }
  }
}

TEST_P(Classifier, LogSumExpOfTheRows) {
  for (const int64_t vocabulary : {1, 300, 5003}) {
    for (const bool write_gradient : {false, true}) {
      TestDevice device(backend());
      const int64_t rows = 5, padded = row_length(backend(), vocabulary + 13);
      const Tensor logits = device.random(1, dtype(), {rows, padded}, 4),
                   targets = device.poisoned(DType::kI32, {rows});
      const Tensor losses = device.poisoned(DType::kF32, {rows}), lse = device.poisoned(DType::kF32, {rows});
      device.write(targets, {0, 0, -1, static_cast<double>(vocabulary - 1), 0});
      const Values values = device.read(logits);
      device->classifier(losses, logits, targets, vocabulary, 1.0f, write_gradient, lse);
      Values expected;
      for (int64_t i = 0; i < rows; ++i)
        expected.push_back(i == 2 ? 0 : reference_lse(&values[static_cast<size_t>(i * padded)], vocabulary));
      EXPECT_LE(relative_error(device.read(lse), expected), 1e-6);
      EXPECT_EQ(device.read(lse)[2], 0.0);
    }
  }
}

// ---- the gradient of some columns

// All columns, a piece of `width` at a time, with `gap` elements between the rows of a piece.
Values gradient_in_pieces(TestDevice& device, DType dtype, const Values& logits, const Values& targets,
                          const Values& lse, int64_t padded, int64_t vocabulary, int64_t width, int64_t gap,
                          float scale) {
  const int64_t rows = static_cast<int64_t>(targets.size());
  Values gradient(logits.size());
  for (int64_t first = 0; first < padded; first += width) {
    const int64_t cols = std::min(width, padded - first);
    Values piece;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) piece.push_back(logits[static_cast<size_t>(i * padded + first + j)]);
    const Tensor t = device.upload(piece, dtype, {rows, cols}, gap > 0 ? cols + gap : 0);
    device->classifier_gradient(t, device.upload(targets, DType::kI32, {rows}), device.upload(lse, DType::kF32, {rows}),
                                first, vocabulary, scale);
    const Values result = device.read(t);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        gradient[static_cast<size_t>(i * padded + first + j)] = result[static_cast<size_t>(i * cols + j)];
  }
  return gradient;
}

TEST_P(Classifier, GradientOfSomeColumns) {
  struct Case {
    int64_t vocabulary, padded, width, gap;
  };
  for (const Case& c : {Case{1, 1, 1, 0},
                        {131, 140, 140, 0},
                        {131, 140, 17, 0},
                        {131, 140, 16, 8},
                        {131, 140, 40, 3},
                        {1000, 1024, 256, 0},
                        {1003, 1024, 64, 0},
                        {5003, 5120, 1024, 16}}) {
    TestDevice device(backend());
    const int64_t rows = 7;
    const float scale = 0.25f;
    const Values values = device.read(device.random(1, dtype(), {rows, c.padded}, 3));
    Values targets, lse, expected(values.size());
    for (int64_t i = 0; i < rows; ++i) {
      const double* const row = &values[static_cast<size_t>(i * c.padded)];
      targets.push_back(i == 3 ? -1 : static_cast<double>(i == 0 ? c.vocabulary - 1 : i * 37 % c.vocabulary));
      lse.push_back(i == 3 ? NAN : static_cast<float>(reference_lse(row, c.vocabulary)));
      for (int64_t j = 0; j < c.vocabulary && i != 3; ++j)
        expected[static_cast<size_t>(i * c.padded + j)] =
            static_cast<double>(scale) * (std::exp(row[j] - lse.back()) - (static_cast<double>(j) == targets.back()));
    }
    Values gradient =
        gradient_in_pieces(device, dtype(), values, targets, lse, c.padded, c.vocabulary, c.width, c.gap, scale);
    EXPECT_LE(relative_error(gradient, expected), tolerance(dtype())) << c.vocabulary << " by " << c.width;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < c.padded; ++j) {
        const size_t at = static_cast<size_t>(i * c.padded + j);
        if (i == 3 || j >= c.vocabulary) {
          EXPECT_EQ(gradient[at], 0.0);
        }
        // The norm is that of the targets: without them, the small ones count.
        if (static_cast<double>(j) == targets[static_cast<size_t>(i)]) gradient[at] = expected[at] = 0;
      }
    }
    EXPECT_LE(relative_error(gradient, expected), tolerance(dtype())) << c.vocabulary << " by " << c.width;
  }
}

TEST_P(Classifier, GradientOfColumnsIsThatOfTheWhole) {
  TestDevice device(backend());
  const int64_t rows = 6, vocabulary = 1003, padded = 1024;
  const Tensor logits = device.random(1, dtype(), {rows, padded}, 3), targets = device.poisoned(DType::kI32, {rows});
  const Tensor losses = device.poisoned(DType::kF32, {rows}), lse = device.poisoned(DType::kF32, {rows});
  const Values values = device.read(logits), ids = {5, 1002, -1, 77, 512, 0};
  device.write(targets, ids);
  device->classifier(losses, logits, targets, vocabulary, 0.5f, true, lse);
  const Values pieces =
      gradient_in_pieces(device, dtype(), values, ids, device.read(lse), padded, vocabulary, 384, 0, 0.5f);
  EXPECT_LE(relative_error(pieces, device.read(logits)), dtype() == DType::kF32 ? 1e-6 : 4e-3);
}

TEST_P(Classifier, IndependentOfThreads) {
  expect_independent_of_threads(backend(), [&](TestDevice& device) {
    const Tensor logits = device.random(1, dtype(), {11, row_length(backend(), 5003)}, 2),
                 losses = device.poisoned(DType::kF32, {11});
    const Tensor targets = device.upload({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, DType::kI32, {11});
    device->classifier(losses, logits, targets, 5000, 1.0f, true);
    return device.bits(logits);
  });
}

}  // namespace
