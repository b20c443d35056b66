// test_nvidia_libraries.cpp: NVIDIA's libraries are found where the toolkit, conda and pip put them.
#include "kernels/nvidia_libraries.h"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "tests/temporary_directory.h"

namespace {

constexpr const char* kName = "libnot_of_nvidia.so.7";

// A library of this name in a folder: a copy of one that is here.
void install(const std::string& folder) {
  Dl_info info = {};
  ASSERT_NE(dladdr(reinterpret_cast<const void*>(&zlibVersion), &info), 0);
  std::filesystem::create_directories(folder);
  std::filesystem::copy_file(info.dli_fname, folder + "/" + kName);
}

struct Place {
  const char *variable, *folder;
};

class NvidiaLibraries : public ::testing::TestWithParam<Place> {
 protected:
  void SetUp() override { setenv(GetParam().variable, root_.path().c_str(), 1); }
  void TearDown() override { unsetenv(GetParam().variable); }

  TemporaryDirectory root_;
};

INSTANTIATE_TEST_SUITE_P(All, NvidiaLibraries,
                         ::testing::Values(Place{"CUDA_HOME", "/lib64"}, Place{"CUDA_PATH", "/lib64"},
                                           Place{"CONDA_PREFIX", "/lib"},
                                           Place{"CONDA_PREFIX", "/lib/python3.11/site-packages/nvidia/nccl/lib"},
                                           Place{"VIRTUAL_ENV", "/lib/python3.12/site-packages/nvidia/cublas/lib"},
                                           Place{"VIRTUAL_ENV", "/lib/python3.12/site-packages/nvidia/cu13/lib"}));

TEST_P(NvidiaLibraries, AreFound) {
  std::string reason;
  EXPECT_EQ(open_nvidia_library({kName}, reason), nullptr);
  EXPECT_NE(reason.find(kName), std::string::npos) << reason;
  install(root_.path() + GetParam().folder);
  void* const library = open_nvidia_library({"libnot_there.so.8", kName}, reason);
  ASSERT_NE(library, nullptr) << reason;
  dlclose(library);
}

TEST(NvidiaLibraryFolders, EndWithASlash) {
  for (const std::string& folder : nvidia_library_folders()) EXPECT_EQ(folder.back(), '/') << folder;
}

}  // namespace
