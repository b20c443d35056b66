// run_folder.h: a run's directory: which process may write into it, its checkpoints by their names, and what is removed
// from it. Only names that this program gives are touched. Format: docs/formats.md.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// A directory held by this process until it ends, in whatever way: a lock on the file `.lock` in it, which goes with
// the last run. Directories that were made for a run that left nothing in them go, too.
class RunFolder {
 public:
  // Makes the directory where it is not there; for an empty path a new one, runs/<date and time>. Throws
  // std::runtime_error when another process holds it, naming that one, or when it cannot be written. Where the file
  // system has no locks, warns and goes on.
  explicit RunFolder(const std::string& path);
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  bool make_directories();  // true when the last of them was made here
  bool lock();

  std::string path_;
  int descriptor_ = -1;
  std::vector<std::string> made_;  // directories, outermost first
};

std::string checkpoint_name(uint32_t step);                           // "step_00000500"
std::optional<uint32_t> step_of_checkpoint(const std::string& name);  // nothing for any other name

// The steps of a run's finished checkpoints, ascending; empty where there is no such directory.
std::vector<uint32_t> finished_steps(const std::string& run);
uint32_t newest_step(const std::string& run);  // 0 when there is none

// A checkpoint and the run it is of, which is its directory's.
struct ResumePoint {
  std::string run, checkpoint;
};

// What a --resume argument means: the checkpoint itself, or the newest finished one of a run, whatever `latest` says (a
// kill may have come before it moved). Throws std::runtime_error.
ResumePoint find_checkpoint(const std::string& path);

// Lets `latest` name the newest finished checkpoint where it does not.
void mend_latest(const std::string& run);

// Renames a finished checkpoint's `temporary` directory to that of `step` and moves `latest`. A kill at any instant
// leaves the checkpoints before it as they were.
std::string publish_checkpoint(const std::string& run, const std::string& temporary, uint32_t step);

// Removes all but the `keep` newest checkpoints (0: keeps all). Symbolic links are neither counted nor removed.
void remove_old_checkpoints(const std::string& run, int64_t keep);

// Where a checkpoint is written before it is published.
std::string temporary_checkpoint(const std::string& run, uint32_t step);

// Removes what an interrupted save left behind.
void clean_run(const std::string& run);
