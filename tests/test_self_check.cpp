// test_self_check.cpp: the checks of a device. A device that works passes all of them; on the CUDA backend that runs on
// this CPU a fault is planted in every family of kernels, and is found, and gone around where there is another way.
#include "train/self_check.h"

#include <fstream>

#include "tests/backends.h"
#include "tests/temporary_directory.h"
#include "tests/training_run.h"

namespace {

const bool kProducts = with_products();

EngineConfig config_of(DType dtype) {
  EngineConfig config = small_config(dtype);
  config.model.heads = 2, config.model.channels = 128;
  config.shapes.sequence = 70;
  return config;
}

// An environment variable of tests/cuda_on_cpu while this lives.
class Fault {
 public:
  Fault(const char* variable, const char* value) : variable_(variable) { setenv(variable, value, 1); }
  ~Fault() { unsetenv(variable_); }
  Fault(const Fault&) = delete;
  Fault& operator=(const Fault&) = delete;

 private:
  const char* variable_;
};
constexpr char kLoseBlock[] = "CUDA_ON_CPU_LOSE_BLOCK", kWrong[] = "FAKE_CUBLASLT_WRONG_ALGORITHMS";

constexpr double kNoLimit = 1e9;  // seconds

class SelfCheck : public OperationTest {};
INSTANTIATE_OPERATION_TESTS(SelfCheck);

TEST_P(SelfCheck, ADeviceThatWorksPasses) {
  TestDevice device(backend());
  EngineConfig config = config_of(dtype());
  std::vector<EngineConfig> configs = {config};
  config.weight_dtype = DType::kF32, config.gradients.gradient_dtype = DType::kF32;
  config.optimizer.projection = ProjectionKind::kGaussian;
  configs.push_back(config);
  config.weight_dtype = config.optimizer.state_dtype = DType::kI8,
  config.optimizer.projection = ProjectionKind::kRademacher;
  configs.push_back(config);
  config.optimizer.projection = ProjectionKind::kCosine, config.optimizer.rank = 32;  // by transforms
  configs.push_back(config);
  for (const EngineConfig& each : configs) {
    for (const Check& check : checks_of(each, false, device.backend())) {
      const Difference difference = check.run(device.backend());
      EXPECT_TRUE(difference.agrees()) << check.operation << " " << check.shape << ": " << difference.largest
                                       << ", allowed " << difference.allowed;
      EXPECT_GT(difference.allowed, -1);
    }
  }
}

TEST_P(SelfCheck, WhatWasPassedIsNotCheckedAgain) {
  const TemporaryDirectory directory;
  const std::string file = directory.path() + "/below/checked";
  const std::unique_ptr<Backend> device = make_test_backend(backend());
  const EngineConfig config = config_of(dtype());
  PassedChecks nothing(file);
  const CheckedDevice late = check_device(config, false, *device, nothing, -1);
  EXPECT_EQ(late.checked, 0);
  EXPECT_EQ(late.left, static_cast<int>(checks_of(config, false, *device).size()));
  const CheckedDevice first = check_device(config, false, *device, nothing, kNoLimit);
  EXPECT_EQ(first.checked, late.left);
  EXPECT_EQ(first.left, 0);
  EXPECT_TRUE(first.switched_off.empty());
  EXPECT_EQ(device->allocated_bytes(), 0u);
  PassedChecks passed(file);
  EXPECT_EQ(check_device(config, false, *device, passed, kNoLimit).checked, 0);
  EngineConfig other = config;
  other.shapes.sequence = 34;
  EXPECT_GT(check_device(other, false, *device, passed, kNoLimit).checked, 10) << "other shapes are new";
  PassedChecks elsewhere("/proc/nothing/checked");  // where nobody can write
  EXPECT_GT(check_device(config, false, *device, elsewhere, kNoLimit).checked, 0);
}

// ---- planted faults

class PlantedFault : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    device_ = make_test_backend(GetParam());
    if (device_->description().find("CUDA on CPU") == std::string::npos) GTEST_SKIP() << "needs tests/cuda_on_cpu";
  }
  CheckedDevice checked(DType dtype, bool codes = false) {
    PassedChecks passed("");
    EngineConfig config = config_of(dtype);
    if (codes) config.weight_dtype = config.optimizer.state_dtype = DType::kI8;
    return check_device(config, false, *device_, passed, kNoLimit);
  }
  std::unique_ptr<Backend> device_;
};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(PlantedFault);
INSTANTIATE_TEST_SUITE_P(All, PlantedFault, ::testing::ValuesIn(gpu_backend_names()));

// A kernel, and an operation that has no other.
constexpr std::pair<const char*, const char*> kKernels[] = {{"normals_kernel", "fill_normal"},
                                                            {"sum_kernel<", "sum_squares"},
                                                            {"attention_delta_kernel", "attention_backward"},
                                                            {"classifier_kernel", "classifier"},
                                                            {"layernorm_forward_kernel", "layernorm_forward"},
                                                            {"layernorm_backward_kernel", "layernorm_backward"},
                                                            {"<Gelu,", "gelu_forward"},
                                                            {"GeluGradient", "gelu_backward"},
                                                            {"StoredRows", "bias_backward"},
                                                            {"add_partials_kernel", "attention_backward"},
                                                            {"embedding_forward_kernel", "embedding_forward"},
                                                            {"token_gradient_kernel", "embedding_backward"},
                                                            {"position_gradient_kernel", "embedding_backward"},
                                                            {"squares_kernel", "factored_second_moment"},
                                                            {"scale_rows_cols_kernel", "scale_rows_cols"},
                                                            {"apply_update_kernel", "apply_update"},
                                                            {"adamw_update_kernel", "adamw_update"},
                                                            {"projection_kernel", "generate_projection"},
                                                            {"scales_kernel", "factored_second_moment"},
                                                            {"states_kernel", "factored_scales"},
                                                            {"scaled_momentum_kernel", "scaled_momentum_update"},
                                                            {"ema_kernel", "ema"},
                                                            {"unfactored_update_kernel", "unfactored_update"},
                                                            {"sgd_update_kernel", "sgd_update"},
                                                            {"accumulate_kernel", "accumulate"},
                                                            {"attention_decode_kernel", "attention_decode"},
                                                            {"classifier_gradient_kernel", "classifier_gradient"},
                                                            {"copy_blocks_kernel", "quantize"},
                                                            {"quantize_weight_kernel", "quantize_weight"},
                                                            {"dequantize_weight_kernel", "dequantize_weight"}};

TEST_P(PlantedFault, IsNamedWhereThereIsNoOtherWay) {
  for (const auto& [kernel, operation] : kKernels) {
    SCOPED_TRACE(kernel);
    const Fault fault(kLoseBlock, kernel);
    device_ = make_test_backend(GetParam());
    try {
      checked(DType::kBF16, true);
      ADD_FAILURE() << "not found";
    } catch (const std::runtime_error& error) {
      const std::string what = error.what();
      EXPECT_EQ(what.find('\n'), std::string::npos);
      EXPECT_EQ(what.find(operation), 0u) << what;
      EXPECT_NE(what.find("largest difference"), std::string::npos) << what;
    }
    EXPECT_EQ(device_->allocated_bytes(), 0u);
  }
}

TEST_P(PlantedFault, IsGoneAroundByThePlainKernels) {
  for (const auto& [kernel, operation] : {std::pair("attention_forward_mma", "attention_forward"),
                                          {"queries_mma", "attention_backward"},
                                          {"keys_mma", "attention_backward"}}) {
    SCOPED_TRACE(kernel);
    const Fault fault(kLoseBlock, kernel);
    device_ = make_test_backend(GetParam());
    const CheckedDevice device = checked(DType::kBF16);
    ASSERT_EQ(device.switched_off.size(), 1u);
    const std::string& line = device.switched_off[0];
    EXPECT_EQ(line.find(operation), 0u) << line;
    EXPECT_NE(line.find("[2,70,128] bf16 2 heads"), std::string::npos) << line;
    EXPECT_NE(line.find("computed by the plain kernels"), std::string::npos) << line;
    EXPECT_TRUE(checked(DType::kBF16).switched_off.empty()) << "it stays so";
  }
}

TEST_P(PlantedFault, OfAProductGetsAnotherAlgorithmOrThePlainKernel) {
  for (const auto& [algorithms, other] :
       {std::pair("1", "another algorithm of cuBLASLt"), {"99", "the plain kernel"}}) {
    const Fault fault(kWrong, algorithms);
    device_ = make_test_backend(GetParam());
    const CheckedDevice device = checked(DType::kBF16);
    EXPECT_GT(device.switched_off.size(), 10u);
    for (const std::string& line : device.switched_off) {
      EXPECT_EQ(line.find("matmul ["), 0u) << line;
      EXPECT_NE(line.find("computed by " + std::string(other)), std::string::npos) << line;
    }
    EXPECT_EQ(device_->slow_products().empty(), std::string(algorithms) == "1");
    EXPECT_TRUE(checked(DType::kBF16).switched_off.empty()) << "it stays so";
  }
}

}  // namespace
