// test_run_folder.cpp: one run at a time writes into a directory, and only what a run has written is taken for its
// checkpoint, or removed.
#include "train/run_folder.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <set>

#include "tests/temporary_directory.h"
#include "train/trainer_state.h"

namespace fs = std::filesystem;

namespace {

#define EXPECT_HAS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

// A run with what a finished checkpoint is told by, under each of these names.
void write_checkpoints(const TemporaryDirectory& directory, const std::vector<std::string>& names) {
  for (const std::string& name : names) directory.write("run/" + name + "/" + kStateFile, name);
}

std::set<std::string> names_in(const std::string& directory) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory)) names.insert(entry.path().filename());
  return names;
}

// Makes a directory the working directory for a while.
class WorkingIn {
 public:
  explicit WorkingIn(const std::string& directory) { fs::current_path(directory); }
  ~WorkingIn() { fs::current_path(before_); }

 private:
  fs::path before_ = fs::current_path();
};

}  // namespace

TEST(RunFolder, IsHeldByOneAndThenByTheNext) {
  const TemporaryDirectory directory;
  const std::string path = directory / "a/run";
  {
    const RunFolder folder(path);
    const std::string message = message_of([&] { RunFolder another(path); });
    EXPECT_HAS(message, path);
    EXPECT_HAS(message, "process " + std::to_string(getpid()));
    EXPECT_HAS(message_of([&] { RunFolder still(path); }), "another run");
    directory.write("a/run/metrics.jsonl", "{}\n");
  }
  EXPECT_EQ(names_in(path), std::set<std::string>{"metrics.jsonl"});
  EXPECT_EQ(message_of([&] { RunFolder next(path); }), "");
}

TEST(RunFolder, IsFreeWhenItsProcessWasKilled) {
  const TemporaryDirectory directory;
  const std::string path = directory / "run";
  const pid_t child = fork();
  if (child == 0) {
    const RunFolder folder(path);
    _exit(0);  // nothing is tidied up
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(fs::exists(path + "/.lock"));
  { const RunFolder folder(path); }
  EXPECT_EQ(names_in(path), std::set<std::string>{});
}

TEST(RunFolder, LeavesNoDirectoryForNothing) {
  const TemporaryDirectory directory;
  { const RunFolder folder(directory / "a/b/run"); }
  EXPECT_EQ(names_in(directory.path()), std::set<std::string>{});
  directory.write("a/kept", "");
  { const RunFolder folder(directory / "a/b/run"); }
  EXPECT_EQ(names_in(directory / "a"), std::set<std::string>{"kept"});
  EXPECT_HAS(message_of([&] { RunFolder folder(directory / "a/kept/run"); }), "a/kept is not a directory");
}

TEST(RunFolder, WithoutANameIsItsOwn) {
  const TemporaryDirectory directory;
  const WorkingIn working(directory.path());
  const RunFolder a(""), b(""), c("");
  EXPECT_EQ((std::set<std::string>{a.path(), b.path(), c.path()}.size()), 3u);
  EXPECT_EQ(names_in("runs").size(), 3u);
}

TEST(RunFolder, NamesOfCheckpoints) {
  EXPECT_EQ(checkpoint_name(500), "step_00000500");
  EXPECT_EQ(checkpoint_name(2147483647), "step_2147483647");
  for (const uint32_t step : {1u, 99999999u, 100000000u, 4294967295u}) {
    EXPECT_EQ(step_of_checkpoint(checkpoint_name(step)), step);
  }
  for (const char* name : {"step_best", "step_00000002_best", "step_2", "step_000000002", "step_00000000", "step_",
                           "step_4294967296", "step_99999999999", "step_-0000001", "step_ 0000001", "step_+0000001",
                           "step_0000000a", "Step_00000001", ".tmp-step_00000001", "step_00000001 ", ""}) {
    EXPECT_EQ(step_of_checkpoint(name), std::nullopt) << name;
  }
}

TEST(RunFolder, TheNewestIsThatOfTheLargestNumber) {
  const TemporaryDirectory directory;
  write_checkpoints(directory, {"step_99999999", "step_100000000", "step_00000002", "step_99999999_best", "step_best"});
  fs::create_directories(directory / "run/step_200000000");  // no trainer_state.json: not finished
  EXPECT_EQ(finished_steps(directory / "run"), (std::vector<uint32_t>{2, 99999999, 100000000}));
  EXPECT_EQ(find_checkpoint(directory / "run/").checkpoint, directory / "run/step_100000000");
  EXPECT_EQ(find_checkpoint(directory / "run").run, directory / "run");
  EXPECT_EQ(newest_step(directory / "absent"), 0u);
  EXPECT_HAS(message_of([&] { find_checkpoint(directory / "absent"); }), "no checkpoint");
}

TEST(RunFolder, RotationRemovesWhatARunWrote) {
  const TemporaryDirectory directory;
  const std::string run = directory / "run";
  write_checkpoints(directory, {"step_00000002", "step_00000002_best", "step_00000004", "step_00000006", "step_best"});
  directory.write("elsewhere/" + std::string(kStateFile), "");
  directory.write("elsewhere/model.safetensors", "weights");
  fs::create_directory_symlink(directory / "elsewhere", run + "/step_00000001");
  remove_old_checkpoints(run, 0);
  EXPECT_EQ(names_in(run).size(), 6u);
  remove_old_checkpoints(run, 2);
  EXPECT_EQ(names_in(run), (std::set<std::string>{"step_00000001", "step_00000002_best", "step_00000004",
                                                  "step_00000006", "step_best"}));
  // A checkpoint of the same step takes the place of a link, not of what it points to.
  fs::create_directories(temporary_checkpoint(run, 1));
  publish_checkpoint(run, temporary_checkpoint(run, 1), 1);
  EXPECT_FALSE(fs::is_symlink(run + "/step_00000001"));
  EXPECT_EQ(read_file(directory / "elsewhere/model.safetensors"), "weights");
}

TEST(RunFolder, OnlyItsOwnLeftoversAreRemoved) {
  const TemporaryDirectory directory;
  write_checkpoints(directory, {".tmp-step_00000004", ".tmp-removed-step_00000002", ".tmp-mine", ".tmp-step_best"});
  directory.write("run/.tmp-metrics.jsonl", "");
  fs::create_symlink("step_00000002", directory / "run/.tmp-latest");
  clean_run(directory / "run");
  EXPECT_EQ(names_in(directory / "run"), (std::set<std::string>{".tmp-mine", ".tmp-step_best"}));
}

TEST(RunFolder, ACheckpointIsOfTheRunItLiesIn) {
  const TemporaryDirectory directory;
  const std::string run = directory / "run", big = directory / "big";
  write_checkpoints(directory, {"step_00000002"});
  directory.write("big/step_00000004/" + std::string(kStateFile), "");
  fs::create_directory_symlink(big + "/step_00000004", run + "/step_00000004");
  mend_latest(run);
  EXPECT_EQ(fs::read_symlink(run + "/latest"), "step_00000004");
  for (const std::string& path : {run, run + "/step_00000004", run + "/step_00000004/", run + "/latest"}) {
    EXPECT_EQ(find_checkpoint(path).run, run) << path;
    EXPECT_EQ(find_checkpoint(path).checkpoint, run + "/step_00000004") << path;
  }
  // Any other name is only a way to a checkpoint.
  fs::create_directory_symlink(run + "/step_00000002", directory / "best");
  EXPECT_EQ(find_checkpoint(directory / "best").run, fs::canonical(run));
  const WorkingIn working(run + "/step_00000002");
  EXPECT_EQ(find_checkpoint(".").run, fs::canonical(run));
}
