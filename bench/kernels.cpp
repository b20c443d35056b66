// kernels.cpp: the time of every operation of kernels/backend.h at the shapes of a GPT-2, beside the time that this
// device needs at the least: for the bytes that must move at the rate of a large copy, or for the FLOPs at the rate of
// a large matmul, both measured in the same run. One JSON object a line; a table for people beside it.
//
// An operation runs on several sets of random inputs in turn, so that none finds its inputs in the L2 cache; as a graph
// of many calls where the device has graphs, so that launches cost what they cost in training. The host's clock runs
// around whole graphs of 20 milliseconds; the median counts. Usage: build/bench/kernels --help
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench/kernel_cases.h"
#include "kernels/backend.h"
#include "kernels/cpu/library_settings.h"
#include "kernels/graph_cache.h"

namespace {

using Clock = std::chrono::steady_clock;
using nlohmann::ordered_json;

constexpr double kMeasurementSeconds = 20e-3;
constexpr int64_t kMostSets = 128, kMostCallsInGraph = 256;
constexpr int64_t kRefreshedBytes = int64_t{6} << 30;  // milliseconds of work: launching a graph is less than 1% of it
constexpr int kFewestMeasurements = 3, kMostMeasurements = 100;

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct BenchOptions {
  std::string device = "auto", models, filter, json;
  double seconds_per_operation = 0.2, time_limit = 0;
  int64_t working_set_mb = 256, threads = 0;
  bool table = false;
};

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

// Bytes read and written per second by a copy within the device that is far larger than its caches.
double measure_copy_rate(Backend& backend, size_t bytes) {
  bytes = std::min(bytes, backend.memory_available() / 8) / 256 * 256;
  Inputs inputs(backend, 1);
  const int64_t elements = static_cast<int64_t>(bytes / sizeof(float));
  const Tensor from = inputs.normal(DType::kF32, {elements}), to = inputs.normal(DType::kF32, {elements});
  std::vector<double> times;
  constexpr int kCopies = 4;
  for (int i = 0; i < 7; ++i) {
    backend.synchronize();
    const Clock::time_point start = Clock::now();
    for (int copy = 0; copy < kCopies; ++copy) backend.copy(to.data, from.data, from.bytes());
    backend.synchronize();
    if (i > 0) times.push_back(seconds_since(start) / kCopies);
  }
  return 2 * static_cast<double>(from.bytes()) / median(times);
}

struct Measurement {
  double seconds = 0, bytes = 0, flops = 0;
};

// Calls of one operation, on its sets of inputs in turn: recorded once and replayed, or issued one by one.
class Batch {
 public:
  Batch(Backend& backend, const std::vector<Call>& calls, int64_t count)
      : backend_(backend), calls_(calls), recorded_(std::min(count, rounded(kMostCallsInGraph))) {
    repeats_ = (count + recorded_ - 1) / recorded_;
    if (backend_.can_capture()) graph_ = record_graph(backend_, [this] { issue(); });
  }

  int64_t calls() const { return recorded_ * repeats_; }

  void run() {
    for (int64_t i = 0; i < repeats_; ++i) {
      if (graph_ >= 0) {
        backend_.replay(graph_);
      } else {
        issue();
      }
    }
  }

 private:
  int64_t rounded(int64_t count) const {
    const int64_t sets = static_cast<int64_t>(calls_.size());
    return (count + sets - 1) / sets * sets;
  }
  void issue() {
    for (int64_t i = 0; i < recorded_; ++i) calls_[static_cast<size_t>(i) % calls_.size()].run();
  }

  Backend& backend_;
  const std::vector<Call>& calls_;
  int64_t recorded_, repeats_;
  int graph_ = -1;
};

class Bench {
 public:
  Bench(Backend& backend, const BenchOptions& options) : backend_(backend), options_(options) {}

  Measurement measure(const KernelCase& kernel) {
    std::vector<std::unique_ptr<Inputs>> inputs;
    std::vector<Call> calls;
    const auto add_set = [&] {
      inputs.push_back(std::make_unique<Inputs>(backend_, static_cast<uint32_t>(inputs.size())));
      calls.push_back(kernel.prepare(*inputs.back()));
    };
    const int64_t memory = static_cast<int64_t>(backend_.memory_available() / 4);
    add_set();
    const bool refreshed = static_cast<bool>(calls[0].refresh);
    const int64_t sets = set_count(static_cast<int64_t>(inputs[0]->bytes()), memory, refreshed);
    while (static_cast<int64_t>(inputs.size()) < sets) add_set();

    for (const Call& call : calls) call.run();  // matmuls choose their algorithms here
    Measurement result = count(kernel, calls[0]);
    const double estimate = seconds([&] {
      for (const Call& call : calls) call.run();
    });
    // After a refresh each set is good for one call.
    int64_t wanted = sets;
    if (!refreshed) {
      const double passes = std::min(kMeasurementSeconds, options_.seconds_per_operation) / std::max(estimate, 1e-7);
      wanted *= std::max<int64_t>(1, static_cast<int64_t>(std::min(passes, 1e4)));
    }
    Batch batch(backend_, calls, wanted);
    batch.run();

    std::vector<double> times;
    double total = 0;
    while (static_cast<int>(times.size()) < kFewestMeasurements ||
           (total < options_.seconds_per_operation && static_cast<int>(times.size()) < kMostMeasurements)) {
      if (refreshed) {
        for (const Call& call : calls) call.refresh();
      }
      times.push_back(seconds([&] { batch.run(); }));
      total += times.back();
    }
    for (const auto& set : inputs) {
      if (!set->gate_is_open()) throw std::runtime_error("the gate is closed: updates did nothing");
    }
    result.seconds = median(times) / static_cast<double>(batch.calls());
    return result;
  }

 private:
  template <typename F>
  double seconds(F&& work) {
    backend_.synchronize();
    const Clock::time_point start = Clock::now();
    work();
    backend_.synchronize();
    return seconds_since(start);
  }

  // Enough sets to exceed the caches; of refreshed ones, which run once in a measurement, enough for a long one.
  int64_t set_count(int64_t bytes, int64_t memory, bool refreshed) const {
    int64_t target = options_.working_set_mb << 20;
    if (refreshed && target > 0) target = std::max(target, kRefreshedBytes);
    const int64_t fitting = std::max<int64_t>(1, memory / bytes);
    return std::min(std::clamp<int64_t>((target + bytes - 1) / bytes, 2, kMostSets), fitting);
  }

  // Bytes and FLOPs are those of the backend's own profile, so that they are stated once.
  Measurement count(const KernelCase& kernel, const Call& call) {
    Profiler profiler;
    backend_.profiler = &profiler;
    try {
      call.run();
    } catch (...) {
      backend_.profiler = nullptr;
      throw;
    }
    backend_.profiler = nullptr;
    Measurement result;
    const auto entry = profiler.entries().find(kernel.method());
    if (entry != profiler.entries().end()) {
      result.bytes = entry->second.bytes;
      result.flops = entry->second.flops;
    }
    if (call.bytes >= 0) result.bytes = call.bytes;
    return result;
  }

  Backend& backend_;
  const BenchOptions& options_;
};

// Where the results go: JSON lines to a file or to stdout, the table to stderr, with --table to stdout.
class Report {
 public:
  explicit Report(const BenchOptions& options) : table_(options.table ? stdout : stderr) {
    if (!options.json.empty()) {
      file_ = std::fopen(options.json.c_str(), "w");
      if (!file_) throw UsageError("cannot write " + options.json + ": " + std::strerror(errno));
    } else if (!options.table) {
      file_ = stdout;
    }
  }
  ~Report() {
    if (file_ && file_ != stdout) std::fclose(file_);
  }
  Report(const Report&) = delete;
  Report& operator=(const Report&) = delete;

  void header(const std::string& device, double copy_rate, double matmul_rate) {
    copy_rate_ = copy_rate;
    matmul_rate_ = matmul_rate;
    write({{"device", device}, {"copy_gb_per_second", copy_rate / 1e9}, {"matmul_tflops", matmul_rate / 1e12}});
    std::fprintf(table_, "%s: copies %.4g GB/s (read + write), matmul %.4g TFLOP/s\n", device.c_str(), copy_rate / 1e9,
                 matmul_rate / 1e12);
    std::fprintf(table_, "%-6s %-40s %-32s %10s %9s %9s %7s\n", "model", "operation", "shape", "ms", "GB/s", "TFLOP/s",
                 "bound");
  }

  void row(const KernelCase& kernel, const Measurement& m) {
    const double memory_seconds = m.bytes / copy_rate_, compute_seconds = m.flops / matmul_rate_;
    const double least = std::max(memory_seconds, compute_seconds);
    const char* const bound = least == 0 ? "launch" : memory_seconds >= compute_seconds ? "memory" : "compute";
    ordered_json line = name(kernel);
    line["milliseconds"] = m.seconds * 1e3;
    line["gigabytes"] = m.bytes / 1e9;
    line["tflop"] = m.flops / 1e12;
    line["percent"] = least == 0 ? ordered_json() : ordered_json(100 * least / m.seconds);
    line["bound"] = bound;
    write(line);
    std::fprintf(table_, "%-6s %-40s %-32s %10.4f %9.1f %9.2f ", kernel.model.c_str(), kernel.operation.c_str(),
                 kernel.shape.c_str(), m.seconds * 1e3, m.bytes / m.seconds / 1e9, m.flops / m.seconds / 1e12);
    if (least == 0) {
      std::fprintf(table_, "%7s %s\n", "-", bound);
    } else {
      std::fprintf(table_, "%6.1f%% %s\n", 100 * least / m.seconds, bound);
    }
  }

  // What was not measured, as the last line where there is any.
  void missing(const std::vector<const KernelCase*>& skipped, const ordered_json& failed) {
    if (skipped.empty() && failed.empty()) return;
    ordered_json line = {{"skipped", ordered_json::array()}, {"failed", failed}};
    for (const KernelCase* kernel : skipped) line["skipped"].push_back(name(*kernel));
    write(line);
  }

  static ordered_json name(const KernelCase& kernel) {
    return {{"operation", kernel.operation}, {"model", kernel.model}, {"shape", kernel.shape}};
  }

 private:
  void write(const ordered_json& line) {
    if (!file_) return;
    std::fprintf(file_, "%s\n", line.dump().c_str());
    std::fflush(file_);
  }

  std::FILE* file_ = nullptr;
  std::FILE* const table_;
  double copy_rate_ = 0, matmul_rate_ = 0;
};

std::unique_ptr<Backend> make_backend(const BenchOptions& options) {
  const std::string problem = options.device == "cpu" ? "" : cuda_unavailable();
  if (options.device == "cuda" && !problem.empty()) throw UsageError("--device cuda: " + problem);
  if (options.device == "cpu" || !problem.empty()) return make_cpu_backend({static_cast<int>(options.threads)});
  return make_cuda_backend();
}

std::vector<const BenchModel*> chosen_models(const std::string& names) {
  std::vector<const BenchModel*> models;
  for (const std::string& name : CLI::detail::split(names, ',')) {
    models.push_back(find_bench_model(name));
    if (!models.back()) throw UsageError("--models: no model \"" + name + "\"; there are 124M, 1558M and toy");
  }
  return models;
}

std::string full_name(const KernelCase& kernel) { return kernel.model + " " + kernel.operation + " " + kernel.shape; }

int bench(const BenchOptions& options, Clock::time_point began) {
  const std::vector<const BenchModel*> models = chosen_models(options.models);
  const bool toy = std::all_of(models.begin(), models.end(), [](const BenchModel* m) { return m->name == "toy"; });
  std::vector<std::vector<KernelCase>> cases;
  size_t chosen = 0;
  for (const BenchModel* model : models) {
    cases.push_back(kernel_cases(*model));
    std::erase_if(cases.back(),
                  [&](const KernelCase& c) { return full_name(c).find(options.filter) == std::string::npos; });
    chosen += cases.back().size();
  }
  if (chosen == 0) throw UsageError("--filter: no operation has \"" + options.filter + "\" in its name");

  const std::unique_ptr<Backend> backend = make_backend(options);
  Report report(options);
  const size_t copy_bytes = toy ? size_t{32} << 20 : size_t{2} << 30;
  const double copy_rate = measure_copy_rate(*backend, copy_bytes);
  report.header(backend->description(), copy_rate, backend->measure_peak_flops());

  Bench bench(*backend, options);
  std::vector<const KernelCase*> skipped;
  ordered_json failed = ordered_json::array();
  for (size_t i = 0; i < models.size(); ++i) {
    const size_t bytes = bench_workspace_bytes(*backend, *models[i]);
    void* const workspace = backend->allocate(bytes);
    backend->set_workspace(workspace, bytes);
    for (const KernelCase& kernel : cases[i]) {
      if (options.time_limit > 0 && seconds_since(began) > options.time_limit) {
        skipped.push_back(&kernel);
        continue;
      }
      try {
        report.row(kernel, bench.measure(kernel));
      } catch (const std::exception& error) {
        failed.push_back(Report::name(kernel));
        failed.back()["error"] = error.what();
        std::fprintf(stderr, "bench_kernels: %s: %s\n", full_name(kernel).c_str(), error.what());
      }
    }
    backend->set_workspace(nullptr, 0);
    backend->release(workspace);
  }
  for (const KernelCase* kernel : skipped)
    std::fprintf(stderr, "bench_kernels: skipped by the time limit: %s\n", full_name(*kernel).c_str());
  report.missing(skipped, failed);
  return failed.empty() ? 0 : 1;
}

// False when there is nothing to do but to end.
bool parse(int argc, char** argv, BenchOptions& options) {
  CLI::App app{"Times every operation of the trainer at the shapes of GPT-2, beside what this device can do."};
  app.name("bench_kernels");
  options.models = "124M,1558M";
  app.add_option("--device", options.device, "auto, cuda or cpu")
      ->check(CLI::IsMember({"auto", "cuda", "cpu"}).description(""))
      ->capture_default_str();
  app.add_option("--models", options.models, "of 124M, 1558M and toy, separated by commas")->capture_default_str();
  app.add_option("--filter", options.filter, "only operations with this text in \"MODEL OPERATION SHAPE\"");
  app.add_option("--seconds-per-operation", options.seconds_per_operation, "of measurements, besides the preparation")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--time-limit", options.time_limit, "seconds after which no operation is started; 0: none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  CLI::Option* const working_set =
      app.add_option("--working-set-mb", options.working_set_mb,
                     "size of all sets of inputs together, to exceed the caches; at least two sets; toy: 0")
          ->check(CLI::Range(int64_t{0}, int64_t{1} << 20).description(""))
          ->capture_default_str();
  app.add_option("--threads", options.threads, "of the CPU backend; 0: all")->check(CLI::Range(0, 4096));
  app.add_option("--json", options.json, "write the JSON lines to this file instead of stdout");
  app.add_flag("--table", options.table, "print the table to stdout instead of stderr, JSON lines only to --json");
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::fputs(app.help().c_str(), stdout);
    return false;
  } catch (const CLI::ParseError& error) {
    throw UsageError(std::string(error.what()) + " (--help lists the flags)");
  }
  if (options.models == "toy" && working_set->count() == 0) options.working_set_mb = 0;
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const Clock::time_point began = Clock::now();
  choose_library_settings(argv);
  try {
    BenchOptions options;
    return parse(argc, argv, options) ? bench(options, began) : 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "bench_kernels: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_kernels: %s\n", error.what());
    return 1;
  }
}
