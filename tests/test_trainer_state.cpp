// test_trainer_state.cpp: trainer_state.json comes back as it was written, and nothing of it, nor of the files that it
// lists, can change unseen.
#include "train/trainer_state.h"

#include <gtest/gtest.h>

#include "tests/temporary_directory.h"

namespace {

#define EXPECT_HAS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

TrainerState some_state() {
  return {4, 1, {40, 32, (uint64_t{1} << 63) + 1, 12345}, {{"lr", 5e-4}, {"rank", 16}, {"data", "t_*.bin"}}, "tuned"};
}

// A directory with the files of a checkpoint, all of them listed.
struct Checkpoint {
  TemporaryDirectory directory;
  std::map<std::string, FileSummary> files;

  Checkpoint() {
    for (const char* name : {"config.json", "model.safetensors", "optimizer.safetensors"}) {
      files[name] = summarize_file(directory.write(name, std::string("contents of ") + name));
    }
    write_trainer_state(directory.path(), some_state(), files);
  }

  std::string state_text() const { return read_file(directory / kStateFile); }
  std::string problem(CheckpointPart part = CheckpointPart::kEverything) const {
    return message_of([&] { verify_files(directory.path(), read_trainer_state(directory.path()), part); });
  }
};

}  // namespace

TEST(TrainerState, ComesBack) {
  const Checkpoint checkpoint;
  const TrainerState expected = some_state(), state = read_trainer_state(checkpoint.directory.path());
  EXPECT_EQ(state.step, expected.step);
  EXPECT_EQ(state.skipped, expected.skipped);
  EXPECT_EQ(state.position, expected.position);
  EXPECT_EQ(state.options, expected.options);
  EXPECT_EQ(state.tuning, expected.tuning);
  EXPECT_TRUE(state.sealed);
  EXPECT_EQ(state.files.at("config.json").crc32, checkpoint.files.at("config.json").crc32);
  EXPECT_EQ(checkpoint.problem(), "");
}

TEST(TrainerState, EveryFlippedBitIsFound) {
  const Checkpoint checkpoint;
  const std::string text = checkpoint.state_text();
  std::fstream file(checkpoint.directory / kStateFile, std::ios::in | std::ios::out | std::ios::binary);
  const auto put = [&](size_t at, int byte) {
    file.seekp(static_cast<std::streamoff>(at));
    file.put(static_cast<char>(byte));
    file.flush();
  };
  for (size_t at = 0; at < text.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      put(at, text[at] ^ 1 << bit);
      EXPECT_HAS(message_of([&] { read_trainer_state(checkpoint.directory.path()); }), kStateFile) << at << " " << bit;
    }
    put(at, text[at]);
  }
  EXPECT_EQ(checkpoint.problem(), "");
}

TEST(TrainerState, EveryCutAndEveryEditIsFound) {
  const Checkpoint checkpoint;
  const std::string text = checkpoint.state_text();
  for (size_t bytes = text.size(); bytes-- > 0;) {
    std::filesystem::resize_file(checkpoint.directory / kStateFile, bytes);
    EXPECT_NE(checkpoint.problem(), "") << bytes;
  }
  checkpoint.directory.write(kStateFile, text + " ");
  EXPECT_HAS(checkpoint.problem(), "checksum");
  std::string other = text;
  other.replace(other.find("0.0005"), 6, "0.4005");
  checkpoint.directory.write(kStateFile, other);
  EXPECT_HAS(checkpoint.problem(), "checksum");
  other = text;
  other.replace(other.find("\"format\": 2"), 11, "\"format\": 1");  // which has no checksum
  checkpoint.directory.write(kStateFile, other);
  EXPECT_HAS(checkpoint.problem(), "checksum");
}

TEST(TrainerState, TheFirstFormatHasNoChecksumButAllItsFields) {
  const Checkpoint checkpoint;
  const auto first_format = [&] {
    nlohmann::json json = nlohmann::json::parse(checkpoint.state_text());
    json["format"] = 1;
    json.erase("crc32");
    json.erase("tuning");  // which came later
    return json;
  };
  const nlohmann::json whole = first_format();
  checkpoint.directory.write(kStateFile, whole.dump());
  EXPECT_FALSE(read_trainer_state(checkpoint.directory.path()).sealed);
  EXPECT_EQ(checkpoint.problem(), "");
  for (const char* key : {"step", "skipped", "data_position", "options", "files"}) {
    nlohmann::json json = whole;
    json.erase(key);
    checkpoint.directory.write(kStateFile, json.dump());
    EXPECT_HAS(checkpoint.problem(), key);
  }
  const std::vector<std::pair<const char*, nlohmann::json>> wrong = {
      {"step", -1}, {"step", 4.5}, {"step", uint64_t{1} << 32}, {"skipped", "1"}, {"options", {1, 2}}, {"files", {1}}};
  for (const auto& [key, value] : wrong) {
    nlohmann::json json = whole;
    json[key] = value;
    checkpoint.directory.write(kStateFile, json.dump());
    EXPECT_HAS(checkpoint.problem(), kStateFile) << json;
  }
  nlohmann::json json = whole;
  json["files"]["../other"] = {{"bytes", 1}, {"crc32", 1}};
  checkpoint.directory.write(kStateFile, json.dump());
  EXPECT_HAS(checkpoint.problem(), "../other");
}

TEST(TrainerState, WhatIsReadMustBeListed) {
  Checkpoint checkpoint;
  for (const char* name : {"config.json", "model.safetensors", "optimizer.safetensors"}) {
    std::map<std::string, FileSummary> files = checkpoint.files;
    files.erase(name);
    write_trainer_state(checkpoint.directory.path(), some_state(), files);
    EXPECT_HAS(checkpoint.problem(), name);
    const bool of_model = std::string(name) != kOptimizerFile;
    EXPECT_EQ(checkpoint.problem(CheckpointPart::kModel).find(name) != std::string::npos, of_model) << name;
  }
  write_trainer_state(checkpoint.directory.path(), some_state(), {});
  EXPECT_HAS(checkpoint.problem(), "lists");
  write_trainer_state(checkpoint.directory.path(), some_state(), checkpoint.files);
  checkpoint.directory.write("tokenizer.bin", "another");
  EXPECT_HAS(checkpoint.problem(), "tokenizer.bin");
}

TEST(TrainerState, ShardsMustBeListed) {
  Checkpoint checkpoint;
  std::filesystem::remove(checkpoint.directory / "model.safetensors");
  checkpoint.files.erase("model.safetensors");
  const std::string shard = "model-00001-of-00002.safetensors", index = "model.safetensors.index.json";
  checkpoint.files[shard] = summarize_file(checkpoint.directory.write(shard, "weights"));
  checkpoint.files[index] =
      summarize_file(checkpoint.directory.write(index, R"({"weight_map": {"a": "model-00001-of-00002.safetensors"}})"));
  write_trainer_state(checkpoint.directory.path(), some_state(), checkpoint.files);
  EXPECT_EQ(checkpoint.problem(), "");
  checkpoint.files.erase(shard);
  write_trainer_state(checkpoint.directory.path(), some_state(), checkpoint.files);
  EXPECT_HAS(checkpoint.problem(CheckpointPart::kModel), shard);
}

TEST(TrainerState, AFileThatChangedIsNamed) {
  const Checkpoint checkpoint;
  checkpoint.directory.write("optimizer.safetensors", "Contents of optimizer.safetensors");
  EXPECT_HAS(checkpoint.problem(), "optimizer.safetensors: its checksum");
  EXPECT_EQ(checkpoint.problem(CheckpointPart::kModel), "");
  checkpoint.directory.write("model.safetensors", "short");
  EXPECT_HAS(checkpoint.problem(CheckpointPart::kModel), "model.safetensors: has 5 bytes instead of 29");
  EXPECT_EQ(checkpoint.problem(CheckpointPart::kConfig), "");
  std::filesystem::remove(checkpoint.directory / "config.json");
  EXPECT_HAS(checkpoint.problem(CheckpointPart::kConfig), "config.json: is missing");
}

TEST(TrainerState, VerifiesAModelOnlyWhereThereIsAState) {
  const Checkpoint checkpoint;
  checkpoint.directory.write("config.json", "another");
  EXPECT_THROW(verify_model(checkpoint.directory.path(), CheckpointPart::kModel), std::runtime_error);
  std::filesystem::remove(checkpoint.directory / kStateFile);
  EXPECT_NO_THROW(verify_model(checkpoint.directory.path(), CheckpointPart::kModel));
}
