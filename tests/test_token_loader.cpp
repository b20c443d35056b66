// test_token_loader.cpp: every window once per epoch, in an order that depends on the seed alone; exact continuation
// from any position; and what happens to data that does not fit the model.
#include "data/token_loader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <vector>

#include "data/data_order.h"
#include "data/shard.h"
#include "tests/temporary_directory.h"

namespace {

constexpr int64_t kLength = 8;
constexpr int64_t kVocabulary = 5000;

#define EXPECT_HAS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

// Three shards of 10, 4 and 7 windows (and a remainder), all their tokens distinct, so that the first token of a
// sequence tells which window it is.
class TokenLoaderTest : public testing::Test {
 protected:
  TokenLoaderTest() {
    write("train_a.bin", 0, 10 * kLength + 1);
    write("train_b.bin", 1000, 4 * kLength + 8);
    write("train_c.bin", 2000, 7 * kLength + 3);
  }

  void write(const std::string& name, uint16_t first, int64_t count, int64_t vocabulary = kVocabulary) {
    std::vector<uint16_t> tokens(static_cast<size_t>(count));
    std::iota(tokens.begin(), tokens.end(), first);
    write_shard(directory_ / name, tokens, vocabulary);
  }

  TokenLoaderOptions options(int64_t micro_batch = 2) const {
    return {.pattern = directory_ / "train_*.bin",
            .micro_batch = micro_batch,
            .sequence_length = kLength,
            .vocabulary = kVocabulary,
            .seed = 42};
  }

  // The windows, by their first token, of the next `count` micro-batches.
  static std::vector<int32_t> windows(TokenLoader& loader, int64_t count) {
    std::vector<int32_t> result;
    for (int64_t i = 0; i < count; ++i) {
      const MicroBatch& batch = loader.next();
      for (size_t row = 0; row < batch.inputs.size(); row += kLength) result.push_back(batch.inputs[row]);
    }
    return result;
  }

  static std::vector<int32_t> all_windows() {
    std::vector<int32_t> result;
    for (int32_t i = 0; i < 10; ++i) result.push_back(i * kLength);
    for (int32_t i = 0; i < 4; ++i) result.push_back(1000 + i * kLength);
    for (int32_t i = 0; i < 7; ++i) result.push_back(2000 + i * kLength);
    return result;
  }

  TemporaryDirectory directory_;
};

std::vector<int32_t> sorted(std::vector<int32_t> values) {
  std::sort(values.begin(), values.end());
  return values;
}

TEST_F(TokenLoaderTest, CountsTokensAndWindows) {
  const TokenLoader loader(options());
  EXPECT_EQ(loader.shards(), 3);
  EXPECT_EQ(loader.tokens(), 81 + 40 + 59);
  EXPECT_EQ(loader.sequences_per_epoch(), 21);
  EXPECT_EQ(loader.tokens_per_epoch(), 21 * kLength);
  EXPECT_EQ(loader.vocabulary(), kVocabulary);
}

TEST_F(TokenLoaderTest, TargetsAreTheInputsShiftedByOne) {
  for (const bool shuffle : {false, true}) {
    TokenLoaderOptions opts = options(3);
    opts.shuffle = shuffle;
    TokenLoader loader(opts);
    for (int i = 0; i < 20; ++i) {
      const MicroBatch& batch = loader.next();
      ASSERT_EQ(batch.inputs.size(), 3u * kLength);
      ASSERT_EQ(batch.targets.size(), 3u * kLength);
      for (size_t j = 0; j < batch.inputs.size(); ++j) {
        ASSERT_EQ(batch.targets[j], batch.inputs[j] + 1);
        ASSERT_TRUE(j % kLength == 0 || batch.inputs[j] == batch.targets[j - 1]);
      }
    }
  }
}

TEST_F(TokenLoaderTest, EveryWindowOncePerEpochInADifferentOrder) {
  for (const bool prefetch : {false, true}) {
    TokenLoaderOptions opts = options(1);
    opts.prefetch = prefetch;
    TokenLoader loader(opts);
    std::set<std::vector<int32_t>> orders;
    for (int epoch = 0; epoch < 10; ++epoch) {
      const auto order = windows(loader, 21);
      EXPECT_EQ(sorted(order), all_windows());
      orders.insert(order);
    }
    EXPECT_EQ(orders.size(), 10u);
    EXPECT_FALSE(orders.contains(all_windows()));
  }
}

TEST_F(TokenLoaderTest, TheOrderIsThatOfSequencesWhateverTheMicroBatch) {
  TokenLoader ones(options(1)), fives(options(5));  // 5 does not divide 21: batches cross shards and epochs
  EXPECT_EQ(windows(ones, 105), windows(fives, 21));
}

TEST_F(TokenLoaderTest, SeedsDiffer) {
  TokenLoaderOptions other = options(1);
  other.seed = 43;
  TokenLoader a(options(1)), again(options(1)), b(other);
  const auto order = windows(a, 21);
  EXPECT_EQ(order, windows(again, 21));
  EXPECT_NE(order, windows(b, 21));
}

TEST_F(TokenLoaderTest, ContinuesExactlyFromEveryPosition) {
  for (const bool prefetch : {false, true}) {
    TokenLoaderOptions opts = options(4);
    opts.prefetch = prefetch;
    TokenLoader loader(opts);
    constexpr int kBatches = 25;  // almost five epochs
    std::vector<MicroBatch> batches;
    std::vector<DataPosition> positions;
    for (int i = 0; i < kBatches; ++i) {
      positions.push_back(loader.position());
      batches.push_back(loader.next());
    }
    for (int k = kBatches - 1; k >= 0; --k) {
      TokenLoader resumed(opts);
      for (TokenLoader* each : {&loader, &resumed}) {
        each->seek(positions[k]);
        EXPECT_EQ(each->position(), positions[k]);
        for (int i = k; i < std::min(k + 3, kBatches); ++i) {
          const MicroBatch& batch = each->next();
          ASSERT_EQ(batch.inputs, batches[i].inputs) << "from " << k << " at " << i;
          ASSERT_EQ(batch.targets, batches[i].targets);
          ASSERT_EQ(batch.group_positions, batches[i].group_positions);
        }
      }
    }
  }
}

TEST_F(TokenLoaderTest, RanksShareTheSequences) {
  TokenLoader whole(options(2));
  std::vector<std::unique_ptr<TokenLoader>> loaders;
  for (int64_t rank = 0; rank < 3; ++rank) {
    TokenLoaderOptions opts = options(2);
    opts.rank = rank;
    opts.ranks = 3;
    loaders.push_back(std::make_unique<TokenLoader>(opts));
  }
  for (int i = 0; i < 15; ++i)
    for (auto& loader : loaders) ASSERT_EQ(loader->next().inputs, whole.next().inputs);
  EXPECT_EQ(loaders[1]->position(), whole.position());
}

TEST_F(TokenLoaderTest, UnshuffledRunsFromTheStartAndRewinds) {
  TokenLoaderOptions opts = options(1);
  opts.shuffle = false;
  TokenLoader loader(opts);
  EXPECT_EQ(windows(loader, 21), all_windows());
  windows(loader, 5);
  loader.rewind();
  EXPECT_EQ(windows(loader, 21), all_windows());
}

TEST_F(TokenLoaderTest, SeekRefusesAnotherRunsPosition) {
  TokenLoader loader(options());
  const DataPosition here = loader.position();
  EXPECT_LT(here.fingerprint, int64_t{1} << 53);
  DataPosition other = here;
  other.sequence_length = 16;
  EXPECT_HAS(message_of([&] { loader.seek(other); }), "--seq-len 16");
  other = here;
  other.seed = 7;
  EXPECT_HAS(message_of([&] { loader.seek(other); }), "--seed 7");
  other = here;
  other.sequence = -1;
  EXPECT_HAS(message_of([&] { loader.seek(other); }), "-1");
  write("train_c.bin", 2001, 7 * kLength + 3);  // as long, other tokens
  TokenLoader changed(options());
  EXPECT_HAS(message_of([&] { changed.seek(here); }), "not those");
}

TEST_F(TokenLoaderTest, AnErrorOfThePrefetchThreadReachesNextEachTime) {
  TokenLoaderOptions opts = options(1);
  opts.shuffle = false;
  opts.vocabulary = 1020;  // shard b has 1000 .. 1039
  for (const bool prefetch : {false, true}) {
    opts.prefetch = prefetch;
    TokenLoader loader(opts);
    EXPECT_EQ(windows(loader, 12).size(), 12u);
    const DataPosition bad = loader.position();
    for (int attempt = 0; attempt < 2; ++attempt) {
      const std::string message = message_of([&] { loader.next(); });
      EXPECT_HAS(message, "train_b.bin: token 1020 at position 20");
      EXPECT_HAS(message, "vocabulary of 1020");
      EXPECT_EQ(loader.position(), bad);
    }
    loader.rewind();
    EXPECT_EQ(loader.next().inputs[0], 0);
  }
}

TEST_F(TokenLoaderTest, NanogptFiles) {
  std::string bytes;
  for (int token = 0; token < 100; ++token) bytes += {static_cast<char>(token), '\0'};
  TokenLoaderOptions opts = options(1);
  opts.pattern = directory_.write("train.bin", bytes);
  opts.format = DataFormat::kNanogpt;
  opts.shuffle = false;
  TokenLoader loader(opts);
  EXPECT_EQ(loader.next().inputs[5], 5);
}

TEST_F(TokenLoaderTest, RefusesDataThatCannotBeUsed) {
  TokenLoaderOptions opts = options();
  const auto error = [&](const std::string& pattern) {
    opts.pattern = pattern;
    return message_of([&] { TokenLoader loader(opts); });
  };
  EXPECT_HAS(error(directory_ / "x*.bin"), "no shards match " + directory_ / "x*.bin");
  EXPECT_HAS(error(directory_ / "train_a.bin," + directory_ / "x*.bin"), "no shards match " + directory_ / "x*.bin");
  EXPECT_HAS(error(""), "no shards match ''");
  EXPECT_HAS(error(directory_.path()), "is a directory");
  write("short.bin", 0, kLength, 4000);
  const std::string message = error(directory_ / "*.bin");
  EXPECT_HAS(message, "disagree on the vocabulary");
  EXPECT_HAS(message, "5000");
  EXPECT_HAS(message, "4000");
  directory_.write("train_b.bin", "damaged");
  EXPECT_HAS(error(directory_ / "train*.bin"), "train_b.bin");
  opts.sequence_length = 0;
  EXPECT_THROW(TokenLoader{opts}, std::logic_error);
}

// A shard without a window takes no part, whatever its place: order and position are those of the others alone.
TEST_F(TokenLoaderTest, ShardsWithoutAWindowAreLeftOutWithAWord) {
  TokenLoader whole(options());
  EXPECT_EQ(whole.left_out(), "");
  const auto order = windows(whole, 30);
  write("train_aa.bin", 4000, kLength);
  write("train_d.bin", 4100, 3);
  TokenLoader loader(options());
  EXPECT_HAS(loader.left_out(), "train_aa.bin: holds 8 tokens, 1 too few for one window of --seq-len 8 + 1");
  EXPECT_HAS(loader.left_out(), "left out, with 1 more like it");
  EXPECT_EQ(loader.shards(), 3);
  EXPECT_EQ(windows(loader, 30), order);
  EXPECT_EQ(loader.position(), whole.position());

  TokenLoaderOptions opts = options();
  opts.pattern = directory_ / "train_aa.bin," + directory_ / "train_d.bin";
  EXPECT_THROW(TokenLoader{opts}, TooShort);
  EXPECT_HAS(message_of([&] { TokenLoader loader(opts); }), "train_aa.bin: holds 8 tokens, 1 too few");
}

TEST_F(TokenLoaderTest, AFolderThatCannotBeListedIsNoEmptyFolder) {
  EXPECT_EQ(matching_files(directory_ / "nowhere/*.bin"), std::vector<std::string>{});
  EXPECT_EQ(matching_files(directory_ / "train_a.bin/*.bin"), std::vector<std::string>{});
  std::filesystem::create_directory_symlink("loop", directory_ / "loop");
  const std::string message = message_of([&] { matching_files(directory_ / "loop/*_val_*.bin"); });
  EXPECT_HAS(message, "cannot list the files matching " + directory_ / "loop/*_val_*.bin");
  EXPECT_HAS(message, "symbolic links");
}

TEST_F(TokenLoaderTest, ExpandGlobsSortsAndDropsDuplicates) {
  const std::string a = directory_ / "train_a.bin", b = directory_ / "train_b.bin";
  EXPECT_EQ(expand_globs(b + "," + a + "," + directory_ / "*_[ab].bin"), (std::vector<std::string>{a, b}));
}

TEST_F(TokenLoaderTest, ANameThatExistsMeansItselfWhateverItHolds) {
  const std::string odd = directory_ / "a,b [1]*";
  std::filesystem::create_directory(odd);
  const std::string one = odd + "/x[2],y_train_1.bin", two = odd + "/x[2],y_train_2.bin",
                    a = directory_ / "train_a.bin";
  for (const std::string& path : {one, two}) std::filesystem::copy(a, path);
  std::filesystem::create_directory(directory_ / "a");  // is no shard
  using Paths = std::vector<std::string>;
  EXPECT_EQ(expand_globs(one), Paths{one});
  EXPECT_EQ(expand_globs(odd + "/*_train_*.bin"), (Paths{one, two}));
  EXPECT_EQ(expand_globs(odd + "/x[2],y_train_*.bin"), (Paths{one, two}));
  EXPECT_EQ(expand_globs(two + "," + one + "," + a), (Paths{one, two, a}));
  EXPECT_EQ(split_globs(a + "," + odd + "/*_train_*.bin"), (Paths{a, odd + "/*_train_*.bin"}));
  EXPECT_EQ(split_globs("nowhere/a.bin,,nowhere/b.bin"), (Paths{"nowhere/a.bin", "nowhere/b.bin"}));
  EXPECT_HAS(message_of([&] { expand_globs(directory_ / "a," + a); }), directory_ / "a: is a directory");
}

TEST(GroupTokens, ListsThePositionsOfEachToken) {
  MicroBatch batch;
  batch.inputs = {7, 3, 7, 0, 3, 7};
  group_tokens(batch, 10);
  EXPECT_EQ(batch.group_ids, (std::vector<int32_t>{0, 3, 7, -1, -1, -1}));
  EXPECT_EQ(batch.group_starts, (std::vector<int32_t>{0, 1, 3, 6, 6, 6, 6}));
  EXPECT_EQ(batch.group_positions, (std::vector<int32_t>{3, 1, 4, 0, 2, 5}));

  batch.inputs = {9};
  group_tokens(batch, 10);
  EXPECT_EQ(batch.group_ids, (std::vector<int32_t>{9}));
  EXPECT_EQ(batch.group_starts, (std::vector<int32_t>{0, 1}));

  batch.inputs = {4, 2, 0};  // no padding
  group_tokens(batch, 5);
  EXPECT_EQ(batch.group_ids, (std::vector<int32_t>{0, 2, 4}));
  EXPECT_EQ(batch.group_starts, (std::vector<int32_t>{0, 1, 2, 3}));
}

TEST(Permutation, IsABijectionOfEverySize) {
  for (uint64_t size = 1; size < 300; ++size) {
    const Permutation permutation(size, 1, "shards", 0);
    std::set<uint64_t> values;
    for (uint64_t i = 0; i < size; ++i) values.insert(permutation(i));
    ASSERT_EQ(values.size(), size);
    ASSERT_EQ(*values.rbegin(), size - 1);
  }
  EXPECT_THROW(Permutation(5, 1, "shards", 0)(5), std::out_of_range);
  const Permutation huge(uint64_t{1} << 40, 1, "shards", 0);
  EXPECT_LT(huge(12345), uint64_t{1} << 40);
}

TEST(Permutation, AllOrdersOfFourAreAboutAsFrequent) {
  std::map<std::vector<uint64_t>, int> counts;
  constexpr int kEpochs = 2400;
  for (uint32_t epoch = 0; epoch < kEpochs; ++epoch) {
    const Permutation permutation(4, 7, "shards", epoch);
    ++counts[{permutation(0), permutation(1), permutation(2), permutation(3)}];
  }
  EXPECT_EQ(counts.size(), 24u);
  for (const auto& [order, count] : counts) EXPECT_NEAR(count, kEpochs / 24, 50);  // five standard deviations
}

// Computed by an independent implementation of the formulas in docs/data.md and docs/numerics.md.
TEST(Permutation, MatchesTheSpecification) {
  const Permutation permutation(1000003, 5, "shards", 3);
  const std::vector<uint64_t> expected = {353622, 59714, 273827, 818775};
  for (uint64_t i = 0; i < expected.size(); ++i) EXPECT_EQ(permutation(i), expected[i]);
}

}  // namespace
