// self_check.cpp: see self_check.h.
#include "train/self_check.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "train/agreement.h"
#include "train/run_setup.h"

namespace fs = std::filesystem;

namespace {

std::string size_text(const Difference& difference) {
  char text[64];
  snprintf(text, sizeof text, "largest difference %.2g, rounding makes %.2g", difference.largest, difference.allowed);
  return text;
}

// The workspace that checks of these shapes may need.
class Workspace {
 public:
  Workspace(const EngineConfig& config, Backend& backend) : backend_(backend) {
    const size_t bytes = backend.workspace_bytes({.batch = config.shapes.batch,
                                                  .sequence = std::max(config.shapes.sequence, config.model.channels),
                                                  .channels = config.model.channels,
                                                  .heads = config.model.heads,
                                                  .vocabulary = config.model.padded_vocabulary(),
                                                  .any_bf16 = true});
    memory_ = backend.allocate(bytes);
    backend.set_workspace(memory_, bytes);
  }
  ~Workspace() {
    backend_.set_workspace(nullptr, 0);
    backend_.release(memory_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

 private:
  Backend& backend_;
  void* memory_;
};

// 64 bits of everything that a result depends on.
std::string key_of(const Backend& backend, const Check& check) {
  uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a
  for (const char byte : backend.description() + "|" + build_id() + "|" + check.operation + "|" + check.shape)
    hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3ull;
  char text[17];
  snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

EngineConfig config_of(int64_t channels, int64_t heads, int64_t batch, int64_t sequence, DType dtype) {
  EngineConfig config;
  config.model.channels = channels, config.model.heads = heads, config.model.layers = 1;
  config.model.vocabulary = 1009, config.model.positions = sequence;
  config.shapes = {.batch = batch, .sequence = sequence, .head_chunk = batch * sequence / 2 + 1, .dtype = dtype};
  config.weight_dtype = config.gradients.gradient_dtype = config.optimizer.state_dtype = dtype;
  config.optimizer.rank = 24;
  return config;
}

// Heads with tiles of their own and without, lengths that end inside of a tile, rows that are no multiple of anything
// but 8.
std::vector<EngineConfig> odd_configs() {
  std::vector<EngineConfig> configs;
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    configs.push_back(config_of(128, 2, 2, 65, dtype));
    configs.push_back(config_of(160, 2, 3, 131, dtype));
    configs.push_back(config_of(96, 1, 1, 77, dtype));
    configs.push_back(config_of(384, 3, 1, 200, dtype));
    configs.push_back(config_of(72, 3, 3, 17, dtype));
  }
  EngineConfig mixed = config_of(64, 1, 2, 33, DType::kBF16);
  mixed.weight_dtype = DType::kF32;
  configs.push_back(mixed);
  mixed.weight_dtype = DType::kBF16, mixed.gradients.gradient_dtype = DType::kF32;
  configs.push_back(mixed);
  mixed.weight_dtype = mixed.optimizer.state_dtype = DType::kI8;
  configs.push_back(mixed);
  return configs;
}

// Of --model, or of the sizes that docs/performance.md speaks of: 124M, on a GPU 1558M and 6.7B, too.
std::vector<EngineConfig> real_configs(const Options& options, const Backend& backend) {
  std::vector<std::string> models = {options.model};
  if (options.model.empty()) models = {"d12"};
  if (options.model.empty() && backend.name() != "cpu") models = {"d12", "d48", "gpt3:c4096"};
  std::vector<EngineConfig> configs;
  for (const std::string& model : models) {
    RunRequest request{options, backend.name(), 0, true, ""};
    request.options.model = model;
    configs.push_back(resolve(request).engine);
  }
  return configs;
}

// Runs a check and says so in a line of the table. Where it fails the other ways are tried, too.
bool print_check(const Check& check, Backend& backend) {
  const Difference first = check.run(backend);
  std::printf("%-27s %-58s %9.2g %9.2g  %s\n", check.operation.c_str(), check.shape.c_str(), first.largest,
              first.allowed, first.agrees() ? "ok" : "WRONG");
  for (Difference next = first; !next.agrees();) {
    const std::string other = backend.distrust(check.operation);
    if (other.empty()) break;
    next = check.run(backend);
    std::printf("%-27s %-58s %9.2g %9.2g  %s\n", "", ("by " + other).c_str(), next.largest, next.allowed,
                next.agrees() ? "ok" : "WRONG");
  }
  std::fflush(stdout);
  return first.agrees();
}

}  // namespace

std::vector<Check> checks_of(const EngineConfig& config, bool tf32, const Backend& backend) {
  const ActivationShapes& shapes = config.shapes;
  const CheckShapes s = {.batch = shapes.batch,
                         .sequence = shapes.sequence,
                         .channels = config.model.channels,
                         .heads = config.model.heads,
                         .vocabulary = config.model.vocabulary,
                         .padded_vocabulary = config.model.padded_vocabulary(),
                         .head_chunk = shapes.head_chunk,
                         .weights = config.weight_dtype == DType::kI8 ? shapes.dtype : config.weight_dtype,
                         .activations = shapes.dtype,
                         .gradients = config.gradients.gradient_dtype,
                         .states = config.optimizer.state_dtype,
                         .weight_codes = config.weight_dtype == DType::kI8,
                         .rank = config.optimizer.rank,
                         .projection = config.optimizer.projection,
                         .transforms = config.optimizer.projection == ProjectionKind::kCosine &&
                                       backend.transforms_cosines(config.optimizer.rank, config.model.channels),
                         .tf32 = tf32};
  std::vector<Check> checks = model_checks(s);
  for (const Check& check : rounding_checks(s)) checks.push_back(check);
  for (const Check& check : update_checks(s)) checks.push_back(check);
  return checks;
}

// ---- what was passed before

std::string PassedChecks::default_path() {
  if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache && *cache)
    return std::string(cache) + "/train_gpt2/checked";
  if (const char* home = std::getenv("HOME"); home && *home) return std::string(home) + "/.cache/train_gpt2/checked";
  return "";
}

PassedChecks::PassedChecks(const std::string& path) : path_(path) {
  std::ifstream file(path_);
  for (std::string key; file >> key;) keys_.insert(key);
}

bool PassedChecks::contains(const Backend& backend, const Check& check) const {
  return keys_.contains(key_of(backend, check));
}

void PassedChecks::add(const Backend& backend, const Check& check) {
  const std::string key = key_of(backend, check);
  if (!keys_.insert(key).second || path_.empty()) return;
  std::error_code ignored;
  fs::create_directories(fs::path(path_).parent_path(), ignored);
  std::ofstream(path_, std::ios::app) << key + "\n";
}

// ---- before a run

CheckedDevice check_device(const EngineConfig& config, bool tf32, Backend& backend, PassedChecks& passed,
                           double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  std::vector<Check> checks = checks_of(config, tf32, backend);
  std::erase_if(checks, [&](const Check& check) { return passed.contains(backend, check); });
  CheckedDevice device;
  if (checks.empty()) return device;
  const Workspace workspace(config, backend);
  for (const Check& check : checks) {
    if (elapsed() > seconds) {
      ++device.left;
      continue;
    }
    ++device.checked;
    const Difference first = check.run(backend);
    std::string other;
    for (Difference last = first; !last.agrees();) {
      other = backend.distrust(check.operation);
      if (other.empty()) {
        throw std::runtime_error(check.operation + " " + check.shape + " is computed wrongly on " +
                                 backend.description() + " (" + size_text(first) +
                                 "), and there is no other way to compute it; ./train_gpt2 selftest shows all, "
                                 "--no-self-check trains nevertheless");
      }
      last = check.run(backend);
    }
    if (other.empty()) {
      passed.add(backend, check);
    } else {
      device.switched_off.push_back(check.operation + " " + check.shape + " was wrong on this device (" +
                                    size_text(first) + "): computed by " + other + " in this run");
    }
  }
  device.seconds = elapsed();
  return device;
}

std::string checked_text(const CheckedDevice& device) {
  if (device.checked == 0) return "";
  char text[160];
  snprintf(text, sizeof text, "%d operation%s of this device against their formulas (%.1f s)", device.checked,
           device.checked == 1 ? "" : "s", device.seconds);
  std::string line = text;
  if (device.left > 0) line += "; " + std::to_string(device.left) + " at the next start, or by ./train_gpt2 selftest";
  return line;
}

// ---- selftest

bool selftest(Options options) {
  check_options(options);
  std::string why;
  const std::unique_ptr<Backend> backend = make_backend(options, why);
  std::vector<EngineConfig> configs = odd_configs();
  for (const EngineConfig& config : real_configs(options, *backend)) configs.push_back(config);
  std::printf("device      %s (%s)\n", backend->description().c_str(), why.c_str());
  std::printf("%-27s %-58s %9s %9s\n", "operation", "shape", "largest", "allowed");
  std::set<std::string> done;
  int wrong = 0;
  for (const EngineConfig& config : configs) {
    const Workspace workspace(config, *backend);
    for (const Check& check : checks_of(config, options.tf32, *backend)) {
      if (!done.insert(check.operation + check.shape).second) continue;
      wrong += print_check(check, *backend) ? 0 : 1;
    }
  }
  std::printf("%zu checks, %d wrong; differences are parts of the size of what was added up\n", done.size(), wrong);
  return wrong == 0;
}
