// test_ptx_widths.cpp: the operations of a model, at the widths of real ones and with every mix of dtypes, against
// their formulas (kernels/checks.h): other kernels run there than at the sizes of the tests of operations. Few tokens,
// because each thread is interpreted; products are left out, because cuBLASLt is not the real one here.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <tuple>

#include "kernels/backend.h"
#include "kernels/checks.h"

namespace {

constexpr int64_t kTokens = 40;

CheckShapes shapes_of(int64_t channels, DType weights, DType activations, DType gradients) {
  CheckShapes shapes;
  shapes.batch = 1, shapes.sequence = kTokens, shapes.channels = channels;
  shapes.heads = channels / (channels % 128 ? 64 : 128);
  shapes.vocabulary = 1009, shapes.padded_vocabulary = 1024, shapes.head_chunk = 8;
  shapes.weights = weights, shapes.activations = activations, shapes.gradients = gradients;
  return shapes;
}

class PtxWidths : public ::testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    workspace_bytes_ = backend_->workspace_bytes({.batch = 1,
                                                  .sequence = GetParam(),
                                                  .channels = GetParam(),
                                                  .heads = GetParam() / 64,
                                                  .vocabulary = 1024,
                                                  .any_bf16 = true});
    workspace_ = backend_->allocate(workspace_bytes_);
    backend_->set_workspace(workspace_, workspace_bytes_);
  }
  void TearDown() override { backend_->release(workspace_); }

  void expect_agreement(const Check& check) {
    const Difference difference = check.run(*backend_);
    EXPECT_LE(difference.largest, difference.allowed) << check.operation << " " << check.shape;
  }

  std::unique_ptr<Backend> backend_ = make_cuda_backend({.autotune = false});
  size_t workspace_bytes_ = 0;
  void* workspace_ = nullptr;
};

INSTANTIATE_TEST_SUITE_P(All, PtxWidths, ::testing::Values(768, 1600, 4096, 5120, 12288),
                         [](const auto& info) { return std::to_string(info.param); });

TEST_P(PtxWidths, OperationsOfAModel) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const Check& check : model_checks(shapes_of(GetParam(), dtype, dtype, dtype)))
      if (check.operation != "matmul") expect_agreement(check);
  }
}

// Weights, activations and gradients of different dtypes meet in these.
TEST_P(PtxWidths, MixesOfDtypes) {
  for (const DType weights : {DType::kBF16, DType::kF32}) {
    for (const DType activations : {DType::kBF16, DType::kF32}) {
      for (const DType gradients : {DType::kBF16, DType::kF32}) {
        if (weights == activations && activations == gradients) continue;
        for (const Check& check : model_checks(shapes_of(GetParam(), weights, activations, gradients))) {
          if (check.operation.find("layernorm") != std::string::npos || check.operation.starts_with("embedding"))
            expect_agreement(check);
        }
      }
    }
  }
}

}  // namespace
