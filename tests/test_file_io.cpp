// test_file_io.cpp: a safetensors file that is cut after it was opened ends the program with a line that names it.
#include "train/file_io.h"

#include <gtest/gtest.h>

#include <csignal>
#include <numeric>

#include "tests/temporary_directory.h"
#include "train/safetensors.h"

namespace {

// The sum of a tensor's bytes as the exit code, after the file was cut.
[[noreturn]] void read_cut_file(const std::string& path) {
  explain_mapping_faults();
  const SafetensorsReader reader(path);
  std::filesystem::resize_file(path, 100);
  const TensorEntry* entry = reader.find("w");
  const auto* bytes = static_cast<const volatile unsigned char*>(entry->data);
  exit(std::accumulate(bytes, bytes + entry->bytes(), 0) == 0 ? 0 : 2);
}

TEST(MappingFault, NamesTheFile) {
  TemporaryDirectory directory;
  const std::string path = directory / "model.safetensors";
  {
    SafetensorsWriter writer(path, {{"w", "F32", {100000}, nullptr}});
    const std::vector<float> values(100000, 1.0f);
    writer.write(values.data(), values.size() * sizeof(float));
    writer.finish();
  }
  EXPECT_EXIT(read_cut_file(path), testing::ExitedWithCode(1), "train_gpt2: .*model.safetensors: was cut while");
}

TEST(MappingFault, OtherBusErrorsAreLeftAlone) {
  EXPECT_EXIT(
      {
        explain_mapping_faults();
        raise(SIGBUS);
        raise(SIGBUS);
      },
      testing::KilledBySignal(SIGBUS), "");
}

}  // namespace
