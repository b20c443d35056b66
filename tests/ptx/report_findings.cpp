// report_findings.cpp: linked into tests, so that one fails in which the interpreter finds something.
#include <gtest/gtest.h>

#include "tests/ptx/runtime.h"

namespace {

class FindingsFail : public ::testing::EmptyTestEventListener {
  void OnTestEnd(const ::testing::TestInfo&) override {
    cudaDeviceSynchronize();
    for (const std::string& finding : ptxsim_take_findings()) ADD_FAILURE() << finding;
  }
};

const bool installed = [] {
  ::testing::UnitTest::GetInstance()->listeners().Append(new FindingsFail);
  return true;
}();

}  // namespace
