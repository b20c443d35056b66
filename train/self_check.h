// self_check.h: whether the device computes what it should (kernels/checks.h): before a GPU trains for the first time,
// and `selftest`.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/checks.h"
#include "train/engine.h"
#include "train/options.h"

// Every operation of the checks that a run of this configuration makes, at its shapes.
std::vector<Check> checks_of(const EngineConfig& config, bool tf32, const Backend& backend);

// Checks that devices have passed, by device, driver, build, operation and shape, as lines of a file: this machine's
// cache folder ($XDG_CACHE_HOME or ~/.cache), unless another is given. A file that cannot be read or written is empty:
// checks are then made each time.
class PassedChecks {
 public:
  explicit PassedChecks(const std::string& path = default_path());
  bool contains(const Backend& backend, const Check& check) const;
  void add(const Backend& backend, const Check& check);
  static std::string default_path();  // "" where there is no such folder

 private:
  std::string path_;
  std::set<std::string> keys_;
};

struct CheckedDevice {
  int checked = 0, left = 0;  // operations, and those that there was no time for
  double seconds = 0;
  std::vector<std::string> switched_off;  // one line each: operation, shape, largest difference, what computes it now
};

// Makes the checks that the device has not passed before, until `seconds` are over. What disagrees is computed in
// another way from then on (Backend::distrust). Needs memory for one operation at a time and the workspace of the
// configuration, which is unset afterwards. Throws std::runtime_error when there is no way that agrees.
CheckedDevice check_device(const EngineConfig& config, bool tf32, Backend& backend, PassedChecks& passed,
                           double seconds);

// "23 operations agree with their formulas (0.4 s)", for the banner; empty when nothing was checked.
std::string checked_text(const CheckedDevice& device);

// Checks the device of the options at odd shapes and at those of --model, or of three models; prints a table. Returns
// false when something disagrees, also where another way agrees. Throws UsageError.
bool selftest(Options options);
