// multiple_choice_score.cpp: see multiple_choice_score.h. Sequences are sorted by length, so that little is padding.
#include "train/multiple_choice_score.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

namespace {

// One ending after its context: the model's inputs are all tokens but the last, `length` of them.
struct Row {
  size_t question, ending;
  int64_t length, cut;  // cut: tokens that the context loses at its front
};

Row row_of(const Question& question, size_t index, size_t ending, int64_t longest) {
  const auto context = static_cast<int64_t>(question.context.size());
  const auto tokens = static_cast<int64_t>(question.endings[ending].size());
  if (tokens > longest)
    throw std::runtime_error("question " + std::to_string(index) + " has an ending of " + std::to_string(tokens) +
                             " tokens, --seq-len is " + std::to_string(longest));
  const int64_t cut = std::max<int64_t>(context + tokens - 1 - longest, 0);
  return {index, ending, context + tokens - 1 - cut, cut};
}

// The sequences of a micro-batch, padded at their ends: what comes before attends to none of it.
class Batch {
 public:
  Batch(std::span<const Row> rows, std::span<const Question> questions) : length_(rows.front().length) {
    inputs_.assign(rows.size() * static_cast<size_t>(length_), 0);
    targets_.assign(inputs_.size(), -1);
    for (size_t r = 0; r < rows.size(); ++r) {
      const Question& question = questions[rows[r].question];
      const std::vector<int32_t>& ending = question.endings[rows[r].ending];
      int32_t* const inputs = &inputs_[r * static_cast<size_t>(length_)];
      int32_t* const rest = std::copy(question.context.begin() + rows[r].cut, question.context.end(), inputs);
      std::copy(ending.begin(), ending.end() - 1, rest);
      std::copy(ending.begin(), ending.end(), &targets_[static_cast<size_t>(rest - 1 - inputs_.data())]);
    }
  }

  HostBatch host() const {
    return {static_cast<int64_t>(inputs_.size()) / length_, length_, inputs_.data(), targets_.data()};
  }

 private:
  int64_t length_;  // of the first row, the longest
  std::vector<int32_t> inputs_, targets_;
};

// The lowest of the values, of equal ones the first.
int64_t lowest(const std::vector<double>& values) {
  return std::min_element(values.begin(), values.end()) - values.begin();
}

}  // namespace

MultipleChoiceScore score(Engine& engine, std::span<const Question> questions) {
  const ActivationShapes& shapes = engine.config().shapes;
  MultipleChoiceScore result;
  std::vector<Row> rows;
  std::vector<std::vector<double>> sums;  // of each question's endings
  for (const Question& question : questions) {
    bool cut = false;
    for (size_t e = 0; e < question.endings.size(); ++e) {
      rows.push_back(row_of(question, sums.size(), e, shapes.sequence));
      cut = cut || rows.back().cut > 0;
    }
    result.cut += cut ? 1 : 0;
    sums.emplace_back(question.endings.size(), 0.0);
  }
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.length > b.length; });

  for (size_t first = 0; first < rows.size(); first += static_cast<size_t>(shapes.batch)) {
    const std::span<const Row> here =
        std::span(rows).subspan(first, std::min(static_cast<size_t>(shapes.batch), rows.size() - first));
    const Batch batch(here, questions);
    const std::vector<float> losses = engine.token_losses(batch.host());
    for (size_t r = 0; r < here.size(); ++r) {
      const auto begin = losses.begin() + static_cast<int64_t>(r) * batch.host().sequence;
      double& sum = sums[here[r].question][here[r].ending];
      for (auto loss = begin; loss != begin + here[r].length; ++loss) sum += *loss;  // 0 where there is no target
      if (!std::isfinite(sum))
        throw std::runtime_error("the loss of question " + std::to_string(here[r].question) +
                                 " is not finite: the weights are not, or overflow in " + dtype_name(shapes.dtype));
    }
  }

  result.questions = static_cast<int64_t>(questions.size());
  for (size_t q = 0; q < questions.size(); ++q) {
    std::vector<double> means = sums[q];
    for (size_t e = 0; e < means.size(); ++e) means[e] /= static_cast<double>(questions[q].endings[e].size());
    result.right_by_sum += lowest(sums[q]) == questions[q].right ? 1 : 0;
    result.right_by_mean += lowest(means) == questions[q].right ? 1 : 0;
  }
  return result;
}
