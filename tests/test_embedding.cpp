// test_embedding.cpp: token and position embeddings, forward and backward, against float64 loops.
#include <map>

#include "tests/backends.h"

namespace {

constexpr int64_t kBatch = 3, kSequence = 13, kVocabulary = 57, kPositions = 17;

Values tokens_with_repeats() {
  std::mt19937 generator(5);
  Values tokens(static_cast<size_t>(kBatch * kSequence));
  for (double& token : tokens)
    token = static_cast<double>(generator() % 9 * 7);  // 0, 7, ..., 56: the first and last row
  return tokens;
}

TokenGroups group(TestDevice& device, const Values& tokens) {
  std::map<int, Values> positions_of;
  for (size_t i = 0; i < tokens.size(); ++i) {
    positions_of[static_cast<int>(tokens[i])].push_back(static_cast<double>(i));
  }
  Values ids, starts = {0}, positions;
  for (const auto& [id, list] : positions_of) {
    ids.push_back(id);
    positions.insert(positions.end(), list.begin(), list.end());
    starts.push_back(static_cast<double>(positions.size()));
  }
  ids.resize(tokens.size(), -1);
  starts.resize(tokens.size() + 1, static_cast<double>(tokens.size()));
  const int64_t count = static_cast<int64_t>(tokens.size());
  return {device.upload(ids, DType::kI32, {count}), device.upload(starts, DType::kI32, {count + 1}),
          device.upload(positions, DType::kI32, {count})};
}

class Embedding : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(Embedding);

TEST_P(Embedding, Forward) {
  for (const DType weights : {DType::kF32, DType::kBF16}) {
    for (const int64_t channels : row_lengths(backend(), {1, 80, 387})) {
      TestDevice device(backend());
      const Values tokens = tokens_with_repeats();
      const Tensor wte = device.random(1, weights, {kVocabulary, channels});
      const Tensor wpe = device.random(2, weights, {kPositions, channels});
      const Tensor out = device.poisoned(dtype(), {kBatch, kSequence, channels});
      device->embedding_forward(out, device.upload(tokens, DType::kI32, {kBatch, kSequence}), wte, wpe);
      const Values token_rows = device.read(wte), position_rows = device.read(wpe);
      Values expected;
      for (size_t i = 0; i < tokens.size(); ++i) {
        for (size_t j = 0; j < static_cast<size_t>(channels); ++j) {
          expected.push_back(token_rows[static_cast<size_t>(tokens[i]) * static_cast<size_t>(channels) + j] +
                             position_rows[i % kSequence * static_cast<size_t>(channels) + j]);
        }
      }
      EXPECT_LE(relative_error(device.read(out), expected), tolerance(dtype()));
    }
  }
}

TEST_P(Embedding, Backward) {
  for (const int64_t channels : row_lengths(backend(), {1, 80, 387})) {
    for (int flags = 0; flags < 4; ++flags) {
      const bool accumulate_wte = flags & 1, accumulate_wpe = flags & 2;
      TestDevice device(backend());
      const Values tokens = tokens_with_repeats();
      const Tensor dout = device.random(1, dtype(), {kBatch, kSequence, channels});
      const Tensor dwte = accumulate_wte ? device.random(2, dtype(), {kVocabulary, channels})
                                         : device.poisoned(dtype(), {kVocabulary, channels});
      const Tensor dwpe = accumulate_wpe ? device.random(3, dtype(), {kPositions, channels})
                                         : device.poisoned(dtype(), {kPositions, channels});
      Values expected_wte = accumulate_wte ? device.read(dwte) : Values(static_cast<size_t>(kVocabulary * channels));
      Values expected_wpe = accumulate_wpe ? device.read(dwpe) : Values(static_cast<size_t>(kPositions * channels));
      const Values gradient = device.read(dout);
      const size_t row = static_cast<size_t>(channels);
      for (size_t i = 0; i < tokens.size(); ++i) {
        for (size_t j = 0; j < row; ++j) {
          expected_wte[static_cast<size_t>(tokens[i]) * row + j] += gradient[i * row + j];
          expected_wpe[i % kSequence * row + j] += gradient[i * row + j];
        }
      }
      device->embedding_backward(dwte, accumulate_wte, dwpe, accumulate_wpe, dout, group(device, tokens));
      EXPECT_LE(relative_error(device.read(dwte), expected_wte), tolerance(dtype())) << "C " << channels;
      EXPECT_LE(relative_error(device.read(dwpe), expected_wpe), tolerance(dtype())) << "C " << channels;
    }
  }
}

// Tokens that are nearly everywhere, beside rare ones; gradients of the weights in fp32 whatever the activations are.
TEST_P(Embedding, BackwardOfFrequentTokens) {
  for (const int64_t channels : row_lengths(backend(), {40, 264, 267})) {
    for (const int64_t pitch : {int64_t{0}, channels + 8}) {
      TestDevice device(backend());
      const int64_t batch = 4, sequence = 100, count = batch * sequence;
      std::mt19937 generator(7);
      Values tokens(static_cast<size_t>(count));
      for (double& token : tokens) {
        const uint32_t draw = generator() % 8;  // half of them token 3, a quarter token 56, the others rare
        token = draw < 4 ? 3 : draw < 6 ? kVocabulary - 1 : static_cast<double>(generator() % kVocabulary);
      }
      const Tensor dout = device.random(1, dtype(), {batch, sequence, channels}, 1, pitch);
      const Tensor dwte = device.random(2, DType::kF32, {kVocabulary, channels});
      const Tensor dwpe = device.poisoned(DType::kF32, {sequence + 2, channels});
      const size_t row = static_cast<size_t>(channels);
      Values expected_wte = device.read(dwte), expected_wpe(static_cast<size_t>(sequence + 2) * row);
      const Values gradient = device.read(dout);
      for (size_t i = 0; i < tokens.size(); ++i) {
        for (size_t j = 0; j < row; ++j) {
          expected_wte[static_cast<size_t>(tokens[i]) * row + j] += gradient[i * row + j];
          expected_wpe[i % static_cast<size_t>(sequence) * row + j] += gradient[i * row + j];
        }
      }
      device->embedding_backward(dwte, true, dwpe, false, dout, group(device, tokens));
      EXPECT_LE(relative_error(device.read(dwte), expected_wte), 1e-5) << "C " << channels;
      EXPECT_LE(relative_error(device.read(dwpe), expected_wpe), 1e-5) << "C " << channels;
    }
  }
}

// The table's gradient in blocks of rows is its gradient, row by row; so is each half alone.
TEST_P(Embedding, BackwardOfSomeRows) {
  for (const int64_t channels : row_lengths(backend(), {1, 80, 387})) {
    for (const bool accumulate : {false, true}) {
      TestDevice device(backend());
      Values tokens = tokens_with_repeats();
      tokens.resize(static_cast<size_t>(kBatch * kSequence));
      for (size_t i = 0; i < tokens.size(); i += 4) tokens[i] = 21;  // a long group, past the first block
      const TokenGroups groups = group(device, tokens);
      const Tensor dout = device.random(1, dtype(), {kBatch, kSequence, channels}, 1, channels + 8);
      const auto gradient = [&](uint32_t seed, int64_t rows) {
        return accumulate ? device.random(seed, DType::kF32, {rows, channels})
                          : device.poisoned(DType::kF32, {rows, channels});
      };
      const Tensor dwte = gradient(2, kVocabulary), blocks = gradient(2, kVocabulary);
      const Tensor dwpe = gradient(3, kPositions), alone = gradient(3, kPositions);
      device->embedding_backward(dwte, accumulate, dwpe, accumulate, dout, groups);
      for (int64_t first : {40, 0, 20}) {
        const int64_t rows = std::min<int64_t>(20, kVocabulary - first);
        device->embedding_backward(blocks.slice(first, rows), accumulate, {}, accumulate, dout, groups, first);
      }
      device->embedding_backward({}, false, alone, accumulate, dout, groups);
      EXPECT_EQ(device.bits(blocks), device.bits(dwte)) << "C " << channels;
      EXPECT_EQ(device.bits(alone), device.bits(dwpe)) << "C " << channels;
      // Rows that no token has.
      const Tensor beyond = device.poisoned(dtype(), {5, channels});
      device->embedding_backward(beyond, false, {}, false, dout, groups, kVocabulary);
      EXPECT_EQ(device.read(beyond), Values(static_cast<size_t>(5 * channels)));
      EXPECT_THROW(device->embedding_backward({}, false, {}, false, dout, groups), std::logic_error);
    }
  }
}

TEST_P(Embedding, BackwardOfLongGroupsInSomeRows) {
  TestDevice device(backend());
  const int64_t channels = 72, sequence = 300;
  Values tokens(static_cast<size_t>(sequence));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<double>(i % 3 * 20 + i % 2);
  const TokenGroups groups = group(device, tokens);
  const Tensor dout = device.random(1, dtype(), {1, sequence, channels});
  const Tensor dwte = device.poisoned(DType::kF32, {kVocabulary, channels});
  const Tensor blocks = device.poisoned(DType::kF32, {kVocabulary, channels});
  device->embedding_backward(dwte, false, {}, false, dout, groups);
  for (int64_t first = 0; first < kVocabulary; first += 19)
    device->embedding_backward(blocks.slice(first, 19), false, {}, false, dout, groups, first);
  EXPECT_EQ(device.bits(blocks), device.bits(dwte));
}

TEST_P(Embedding, IndependentOfThreads) {
  expect_independent_of_threads(backend(), [&](TestDevice& device) {
    const int64_t channels = row_length(backend(), 83);
    const Tensor dwte = device.poisoned(dtype(), {kVocabulary, channels});
    const Tensor dwpe = device.poisoned(dtype(), {kPositions, channels});
    const TokenGroups groups = group(device, tokens_with_repeats());
    device->embedding_backward(dwte, false, dwpe, false, device.random(1, dtype(), {kBatch, kSequence, channels}),
                               groups);
    std::vector<uint8_t> all = device.bits(dwte);
    const std::vector<uint8_t> positions = device.bits(dwpe);
    all.insert(all.end(), positions.begin(), positions.end());
    return all;
  });
}

}  // namespace
