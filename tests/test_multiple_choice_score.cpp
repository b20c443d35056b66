// test_multiple_choice_score.cpp: endings are scored as if each were alone, whatever shares its micro-batch. Accuracies
// of a reference: tests/test_run_eval.py.
#include "train/multiple_choice_score.h"

#include <gtest/gtest.h>

#include <limits>

#include "tests/temporary_directory.h"
#include "tests/training_run.h"

namespace {

constexpr int64_t kLongest = 19;

class Score : public ::testing::Test {
 protected:
  std::unique_ptr<Engine> engine(int64_t batch, int64_t sequence = kLongest) {
    EngineConfig config = small_config(DType::kF32);
    config.shapes.batch = batch, config.shapes.sequence = sequence, config.shapes.training = false;
    auto engine = std::make_unique<Engine>(config, *backend_);
    engine->allocate();
    engine->model().initialize(3);
    return engine;
  }

  std::vector<int32_t> tokens(int64_t most) {
    std::vector<int32_t> ids(std::uniform_int_distribution<size_t>(1, static_cast<size_t>(most))(random_));
    for (int32_t& id : ids) id = std::uniform_int_distribution<int32_t>(0, kVocabulary - 1)(random_);
    return ids;
  }

  // Two to five endings, as many as fit kLongest inputs.
  std::vector<Question> questions(size_t count) {
    std::vector<Question> made(count);
    for (Question& question : made) {
      question.context = tokens(11);
      question.endings.resize(std::uniform_int_distribution<size_t>(2, 5)(random_));
      for (auto& ending : question.endings) ending = tokens(9);
    }
    return made;
  }

  // The ending of the lowest loss when each is computed by itself, without padding.
  int64_t best(Engine& engine, const Question& question, bool mean) {
    double lowest = std::numeric_limits<double>::infinity(), second = lowest;
    int64_t chosen = -1;
    for (size_t e = 0; e < question.endings.size(); ++e) {
      std::vector<int32_t> all = question.context;
      all.insert(all.end(), question.endings[e].begin(), question.endings[e].end());
      const auto length = static_cast<int64_t>(all.size()) - 1;
      const std::vector<float> losses = engine.token_losses({1, length, all.data(), all.data() + 1});
      double sum = 0;
      for (size_t i = question.context.size() - 1; i < losses.size(); ++i) sum += losses[i];
      if (mean) sum /= static_cast<double>(question.endings[e].size());
      if (sum < lowest) {
        second = lowest, lowest = sum, chosen = static_cast<int64_t>(e);
      } else {
        second = std::min(second, sum);
      }
    }
    EXPECT_GT(second - lowest, 1e-4) << "rounding could decide: another seed is needed";
    return chosen;
  }

  std::unique_ptr<Backend> backend_ = make_test_backend();
  std::mt19937 random_{7};
};

TEST_F(Score, IsTheSameWhateverSharesAMicroBatch) {
  std::vector<Question> all = questions(12);
  int64_t same = 0;
  {
    const auto alone = engine(1);
    for (Question& question : all) {
      question.right = best(*alone, question, false);
      same += best(*alone, question, true) == question.right ? 1 : 0;
    }
  }
  EXPECT_LT(same, 12);
  for (const int64_t batch : {1, 3, 4, 7, 100}) {
    const MultipleChoiceScore result = score(*engine(batch), all);
    EXPECT_EQ(result.questions, 12);
    EXPECT_EQ(result.right_by_sum, 12) << batch;
    EXPECT_EQ(result.right_by_mean, same) << batch;
    EXPECT_EQ(result.cut, 0);
  }
}

TEST_F(Score, ALongContextLosesItsFront) {
  std::vector<Question> all = questions(8), cut = all;
  for (Question& question : all) {
    question.endings.assign(2, question.endings[0]);  // of one length, so that one cut context stands for both
    for (int32_t& id : question.endings[1]) id = (id + 41) % kVocabulary;
  }
  for (size_t i = 0; i < all.size(); ++i) {
    cut[i] = all[i];
    const size_t room = 9 + 1 - all[i].endings[0].size();
    if (cut[i].context.size() > room) cut[i].context.erase(cut[i].context.begin(), cut[i].context.end() - room);
  }
  const auto small = engine(4, 9);
  const MultipleChoiceScore of_all = score(*small, all), of_cut = score(*small, cut);
  EXPECT_GT(of_all.cut, 0);
  EXPECT_LT(of_all.cut, 8);
  EXPECT_EQ(of_cut.cut, 0);
  EXPECT_EQ(of_all.right_by_sum, of_cut.right_by_sum);
  for (size_t i = 0; i < all.size(); ++i) all[i].right = best(*small, cut[i], false);
  EXPECT_EQ(score(*small, all).right_by_sum, 8);
}

TEST_F(Score, AnEndingThatDoesNotFitIsRefused) {
  std::vector<Question> all = questions(2);
  all[1].endings[1].assign(kLongest, 5);
  EXPECT_EQ(score(*engine(2), all).questions, 2);  // it fits with one token of context
  all[1].endings[1].push_back(5);
  const auto call = [&] { score(*engine(2), all); };
  EXPECT_EQ(message_of(call), "question 1 has an ending of 20 tokens, --seq-len is 19");
}

}  // namespace
