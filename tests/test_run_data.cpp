// test_run_data.cpp: where the validation shards of training shards are looked for.
#include "train/run_data.h"

#include <gtest/gtest.h>

#include <vector>

#include "data/shard.h"
#include "tests/temporary_directory.h"

namespace {

TEST(RunData, TheLastTrainOfTheNameBecomesVal) {
  const auto first = [](const std::string& pattern) { return validation_patterns(pattern).front(); };
  EXPECT_EQ(first("d/x_train_*.bin"), "d/x_val_*.bin");
  EXPECT_EQ(first("train_train_*.bin"), "train_val_*.bin");
  EXPECT_EQ(first("train/TinyStories-train_train_000000.bin"), "train/TinyStories-train_val_*.bin");
  EXPECT_EQ(first("c4-train.00000-of-01024_train_000000.bin"), "c4-train.00000-of-01024_val_*.bin");
  EXPECT_EQ(first("edu_fineweb_train_000001.bin"), "edu_fineweb_val_*.bin");
  EXPECT_EQ(first("tiny_shakespeare_train.bin"), "tiny_shakespeare_val.bin");
  EXPECT_EQ(first("openwebtext/train.bin"), "openwebtext/val.bin");
  EXPECT_EQ(first("train_pretrained_*.bin"), "val_pretrained_*.bin");
  EXPECT_EQ(first("d/mytrain.bin"), "d/myval.bin");
  EXPECT_EQ(first("training_1.bin"), "val_*.bin");
  EXPECT_EQ(first("d/train/*.bin"), "d/val/*.bin");
  EXPECT_EQ(first("train/00001.bin"), "val/*.bin");
  EXPECT_TRUE(validation_patterns("d/shakespeare.bin").empty());
  EXPECT_TRUE(validation_patterns("d/training_data/x.bin").empty());
}

class ResolveData : public testing::Test {
 protected:
  std::string write(const std::string& name) const {
    directory_.write(name, "");  // makes the folder
    write_shard(directory_ / name, std::vector<uint16_t>{1, 2, 3}, 257);
    return directory_ / name;
  }
  // val_data, or why there is none.
  static std::string validation_of(const std::string& data) {
    Options options;
    options.data = data;
    const std::string why = resolve_data(options);
    EXPECT_NE(why.empty(), options.val_data.empty());
    return options.val_data + why;
  }
  TemporaryDirectory directory_;
};

TEST_F(ResolveData, FindsThePartnerOfEachPattern) {
  write("a/train_train_000000.bin"), write("a/train_val_000000.bin");
  write("b/train.bin"), write("b/val.bin");
  write("c/train/0.bin"), write("c/validation/0.bin");
  const std::string a = directory_ / "a/train_val_*.bin", b = directory_ / "b/val.bin";
  EXPECT_EQ(validation_of(directory_ / "a/train_train_*.bin"), a);
  EXPECT_EQ(validation_of(directory_ / "a/train_train_000000.bin"), a);
  EXPECT_EQ(validation_of(directory_ / "a/*_train_*.bin"), directory_ / "a/*_val_*.bin");
  EXPECT_EQ(validation_of(directory_ / "a/train_train_000000.bin," + directory_ / "b/train.bin"), a + "," + b);
  EXPECT_EQ(validation_of(directory_ / "b/train.bin," + directory_ / "b/train.bin"), b);
  EXPECT_EQ(validation_of(directory_ / "c/train/*.bin"), directory_ / "c/validation/*.bin");
}

TEST_F(ResolveData, SaysWhyThereIsNone) {
  write("x_train_000000.bin"), write("other.bin");
  EXPECT_EQ(validation_of(directory_ / "x_train_*.bin"), "no file matches " + directory_ / "x_val_*.bin");
  EXPECT_EQ(validation_of(directory_ / "other.bin"),
            directory_ / "other.bin has no 'train' in its name to look for 'val' instead");
  const std::string val = write("x_val_000000.bin");
  EXPECT_EQ(validation_of(directory_ / "x_train_*.bin," + val), val + " is among the training shards");
  // An error while they are listed is an error.
  std::filesystem::create_directory_symlink("loop", directory_ / "loop");
  EXPECT_NE(message_of([&] { validation_of(directory_ / "loop/x_train_*.bin"); }).find("cannot list"),
            std::string::npos);
}

}  // namespace
