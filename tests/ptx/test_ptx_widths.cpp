// test_ptx_widths.cpp: the operations of a model, at the widths of real ones, against their formulas
// (kernels/checks.h): other kernels run there than at the sizes of the tests of operations. Few tokens, because each
// thread is interpreted; products are left out, because cuBLASLt is not the real one here.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <tuple>

#include "kernels/backend.h"
#include "kernels/checks.h"

namespace {

constexpr int64_t kTokens = 40;

CheckShapes shapes_of(int64_t channels, DType dtype) {
  CheckShapes shapes;
  shapes.batch = 1, shapes.sequence = kTokens, shapes.channels = channels;
  shapes.heads = channels / (channels % 128 ? 64 : 128);
  shapes.vocabulary = 1009, shapes.padded_vocabulary = 1024, shapes.head_chunk = 8;
  shapes.weights = shapes.activations = shapes.gradients = dtype;
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

  std::unique_ptr<Backend> backend_ = make_cuda_backend({.autotune = false});
  size_t workspace_bytes_ = 0;
  void* workspace_ = nullptr;
};

INSTANTIATE_TEST_SUITE_P(All, PtxWidths, ::testing::Values(768, 1600, 5120),
                         [](const auto& info) { return std::to_string(info.param); });

TEST_P(PtxWidths, OperationsOfAModel) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const Check& check : model_checks(shapes_of(GetParam(), dtype))) {
      if (check.operation == "matmul") continue;
      const Difference difference = check.run(*backend_);
      EXPECT_LE(difference.largest, difference.allowed) << check.operation << " " << check.shape;
    }
  }
}

}  // namespace
