// run_folder.cpp: see run_folder.h.
#include "train/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <stdexcept>

#include "train/file_io.h"
#include "train/standard_streams.h"
#include "train/trainer_state.h"

namespace fs = std::filesystem;

namespace {

constexpr char kStepPrefix[] = "step_";
constexpr char kTemporaryPrefix[] = ".tmp-";
constexpr char kRemovedPrefix[] = ".tmp-removed-";
constexpr char kLatest[] = "latest";
constexpr char kLockFile[] = "/.lock";

// Whether the open file is the one that has this path.
bool is_at(int descriptor, const std::string& path) {
  struct stat opened {
  }, there{};
  return fstat(descriptor, &opened) == 0 && stat(path.c_str(), &there) == 0 && opened.st_dev == there.st_dev &&
         opened.st_ino == there.st_ino;
}

// "process 123 on host", which the holder of a lock wrote into its file.
std::string holder(int descriptor) {
  char text[256];
  const ssize_t bytes = pread(descriptor, text, sizeof text, 0);
  const std::string line(text, static_cast<size_t>(std::max<ssize_t>(bytes, 0)));
  return line.empty() ? "" : " (" + line.substr(0, line.find('\n')) + ")";
}

void write_holder(int descriptor) {
  char host[128] = "";
  gethostname(host, sizeof host - 1);
  const std::string line = "process " + std::to_string(getpid()) + " on " + host + "\n";
  // Only for the message above: a full disk may refuse it.
  [[maybe_unused]] const bool written =
      ftruncate(descriptor, 0) == 0 && pwrite(descriptor, line.data(), line.size(), 0) > 0;
}

std::string new_directory_name() {
  const std::time_t now = std::time(nullptr);
  char name[64];
  std::strftime(name, sizeof name, "runs/%Y-%m-%d_%H-%M-%S", std::localtime(&now));
  return name;
}

bool begins_with(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }

bool is_leftover(const std::string& name) {
  if (name == std::string(kTemporaryPrefix) + kLatest || name == std::string(kTemporaryPrefix) + "metrics.jsonl") {
    return true;
  }
  for (const std::string prefix : {kRemovedPrefix, kTemporaryPrefix}) {
    if (begins_with(name, prefix) && step_of_checkpoint(name.substr(prefix.size()))) return true;
  }
  return false;
}

// The names in a directory; none where it does not exist. One that cannot be listed must not look empty.
std::vector<std::string> names_in(const std::string& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error)) {
    names.push_back(entry->path().filename());
  }
  if (error && error != std::errc::no_such_file_or_directory && error != std::errc::not_a_directory) {
    throw std::runtime_error(directory + ": cannot be listed: " + error.message());
  }
  return names;
}

// Under its temporary name a half-removed checkpoint is not taken for a whole one.
void remove_checkpoint(const std::string& run, uint32_t step) {
  const std::string doomed = run + "/" + kRemovedPrefix + checkpoint_name(step);
  fs::rename(run + "/" + checkpoint_name(step), doomed);
  fs::remove_all(doomed);
}

}  // namespace

RunFolder::RunFolder(const std::string& path) : path_(path) {
  const bool unnamed = path.empty();
  if (unnamed) path_ = new_directory_name();
  constexpr int kTries = 100;  // while another run ends, its lock and directories may go under our hands
  for (int i = 1; i <= kTries; ++i) {
    // Two runs may start in one second: only the one that made a directory takes it.
    const bool mine = make_directories();
    if (unnamed && !mine) {
      path_ = new_directory_name() + "-" + std::to_string(i + 1);
    } else if (lock()) {
      return;
    }
  }
  throw std::runtime_error(path_ + ": cannot be made: " + std::strerror(ENOENT));
}

bool RunFolder::make_directories() {
  fs::path below;
  for (const fs::path& part : fs::path(path_)) {
    below /= part;
    std::error_code error;
    const fs::file_status status = fs::status(below);
    if (fs::is_directory(status)) continue;
    if (fs::exists(status)) throw std::runtime_error(path_ + ": " + below.string() + " is not a directory");
    if (fs::create_directory(below, error)) made_.push_back(below);
    if (error == std::errc::no_such_file_or_directory) return false;  // the one above it has just gone
    if (error) throw std::runtime_error(path_ + ": cannot be made: " + error.message());
  }
  return !made_.empty() && made_.back() == path_;
}

bool RunFolder::lock() {
  const std::string file = path_ + kLockFile;
  descriptor_ = open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
  if (descriptor_ < 0 && errno == ENOENT) return false;
  if (descriptor_ < 0) throw std::runtime_error(file + ": cannot be written: " + std::strerror(errno));
  if (flock(descriptor_, LOCK_EX | LOCK_NB) == 0) {
    if (is_at(descriptor_, file)) {
      write_holder(descriptor_);
      return true;
    }
    close(descriptor_);
    return false;
  }
  if (errno != EWOULDBLOCK) {
    warn(path_ + " cannot be locked (" + std::strerror(errno) + "): see that no other run writes there");
    return true;
  }
  const std::string other = holder(descriptor_);
  close(descriptor_);
  throw std::runtime_error(path_ + ": another run" + other +
                           " is writing there; wait until it ends, or name another --out");
}

RunFolder::~RunFolder() {
  const std::string file = path_ + kLockFile;
  // Only who holds the lock removes its file, and who takes a lock looks whether its file is still there.
  if (is_at(descriptor_, file)) unlink(file.c_str());
  close(descriptor_);
  for (auto directory = made_.rbegin(); directory != made_.rend(); ++directory) rmdir(directory->c_str());
}

std::string checkpoint_name(uint32_t step) {
  char name[32];
  snprintf(name, sizeof name, "%s%08u", kStepPrefix, step);
  return name;
}

std::optional<uint32_t> step_of_checkpoint(const std::string& name) {
  unsigned long step = 0;
  char after;
  if (std::sscanf(name.c_str(), "step_%10lu%c", &step, &after) != 1 || step == 0 || step > UINT32_MAX) return {};
  // What else could be read as the number was not written by this program: step_5, step_+0000005.
  if (checkpoint_name(static_cast<uint32_t>(step)) != name) return {};
  return static_cast<uint32_t>(step);
}

std::vector<uint32_t> finished_steps(const std::string& run) {
  std::vector<uint32_t> steps;
  for (const std::string& name : names_in(run)) {
    const std::optional<uint32_t> step = step_of_checkpoint(name);
    if (step && fs::exists(run + "/" + name + "/" + kStateFile)) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

uint32_t newest_step(const std::string& run) {
  const std::vector<uint32_t> steps = finished_steps(run);
  return steps.empty() ? 0 : steps.back();
}

ResumePoint find_checkpoint(const std::string& path) {
  if (fs::exists(path + "/" + kStateFile)) {
    // A checkpoint that lies in its run under its name, were it a link to another disk, goes on in that run; any other
    // name is only a way to get there.
    fs::path checkpoint = fs::absolute(path);
    if (!checkpoint.has_filename()) checkpoint = checkpoint.parent_path();
    if (!step_of_checkpoint(checkpoint.filename())) {
      std::error_code no_link;
      const fs::path target = fs::read_symlink(checkpoint, no_link);
      const bool beside = checkpoint.filename() == kLatest && step_of_checkpoint(target);
      checkpoint = beside ? checkpoint.parent_path() / target : fs::canonical(checkpoint);
    }
    return {checkpoint.parent_path(), checkpoint};
  }
  if (const uint32_t newest = newest_step(path); newest > 0) {
    std::string run = path;
    while (run.size() > 1 && run.back() == '/') run.pop_back();
    return {run, run + "/" + checkpoint_name(newest)};
  }
  throw std::runtime_error(path + ": holds no checkpoint (neither " + kStateFile + " nor step_*/" + kStateFile + ")");
}

void mend_latest(const std::string& run) {
  const uint32_t newest = newest_step(run);
  const std::string link = run + "/" + kLatest;
  std::error_code unread;
  if (newest == 0 || fs::read_symlink(link, unread) == checkpoint_name(newest)) return;
  replace_symlink(link, checkpoint_name(newest));
  sync_directory(run);
}

std::string temporary_checkpoint(const std::string& run, uint32_t step) {
  return run + "/" + kTemporaryPrefix + checkpoint_name(step);
}

std::string publish_checkpoint(const std::string& run, const std::string& temporary, uint32_t step) {
  const std::string path = run + "/" + checkpoint_name(step);
  if (fs::exists(fs::symlink_status(path))) remove_checkpoint(run, step);
  fs::rename(temporary, path);
  sync_directory(run);
  replace_symlink(run + "/" + kLatest, checkpoint_name(step));
  sync_directory(run);
  return path;
}

void remove_old_checkpoints(const std::string& run, int64_t keep) {
  std::vector<uint32_t> steps = finished_steps(run);
  std::erase_if(steps, [&](uint32_t step) { return fs::is_symlink(run + "/" + checkpoint_name(step)); });
  for (size_t i = 0; keep > 0 && i + static_cast<size_t>(keep) < steps.size(); ++i) remove_checkpoint(run, steps[i]);
}

void clean_run(const std::string& run) {
  std::error_code ignored;
  for (const std::string& name : names_in(run)) {
    if (is_leftover(name)) fs::remove_all(run + "/" + name, ignored);
  }
}
