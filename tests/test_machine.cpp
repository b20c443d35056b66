// test_machine.cpp: the limits on memory and processors that control groups and the process itself set, the former in
// made-up trees of /proc and /sys/fs/cgroup.
#include "kernels/cpu/machine.h"

#include <gtest/gtest.h>
#include <omp.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <string>

#include "kernels/backend.h"
#include "tests/temporary_directory.h"

namespace {

constexpr size_t kMiB = size_t{1} << 20;

// A machine with 8 GiB available.
class MachineTest : public testing::Test {
 protected:
  MachineTest() { write("proc/meminfo", "MemTotal: 9000000 kB\nMemAvailable: 8388608 kB\n"); }
  void write(const std::string& name, const std::string& text) { tree_.write(name, text); }
  void write(const std::string& name, size_t number) { tree_.write(name, std::to_string(number) + "\n"); }
  size_t available() const { return available_memory(tree_.path()); }
  int cores() const { return usable_cores(tree_.path()); }

  TemporaryDirectory tree_;
};

TEST_F(MachineTest, WithoutControlGroupsTheMachineIsTheLimit) {
  EXPECT_EQ(available(), 8192 * kMiB);
  EXPECT_EQ(cores(), omp_get_num_procs());
}

TEST_F(MachineTest, LimitsOfVersion1BelowTheRoot) {
  write("proc/self/cgroup",
        "9:name=systemd:/\n4:hugetlb,memory:/slurm/job_1/step_0\n1:cpu,cpuacct:/slurm/job_1\n0::/\n");
  const std::string memory = "sys/fs/cgroup/memory/";
  write(memory + "memory.limit_in_bytes", size_t{0x7FFFFFFFFFFFF000});
  write(memory + "slurm/job_1/memory.limit_in_bytes", 1000 * kMiB);
  write(memory + "slurm/job_1/memory.usage_in_bytes", 300 * kMiB);
  write(memory + "slurm/job_1/memory.stat", "cache 5\ntotal_inactive_file " + std::to_string(50 * kMiB) + "\n");
  EXPECT_EQ(available(), 750 * kMiB);
  write(memory + "slurm/job_1/step_0/memory.limit_in_bytes", 100 * kMiB);
  EXPECT_EQ(available(), 100 * kMiB);
  write(memory + "slurm/memory.limit_in_bytes", 40 * kMiB);
  EXPECT_EQ(available(), 40 * kMiB);
  write("sys/fs/cgroup/cpu/slurm/job_1/cpu.cfs_quota_us", 100000);
  write("sys/fs/cgroup/cpu/slurm/job_1/cpu.cfs_period_us", 100000);
  EXPECT_EQ(cores(), 1);
}

TEST_F(MachineTest, LimitsOfVersion2) {
  write("proc/self/cgroup", "0::/user.slice/a.scope\n");
  const std::string groups = "sys/fs/cgroup/user.slice/";
  write(groups + "a.scope/memory.max", "max\n");
  EXPECT_EQ(available(), 8192 * kMiB);
  write(groups + "memory.max", 500 * kMiB);
  write(groups + "memory.current", 600 * kMiB);
  EXPECT_EQ(available(), 0u);
  write(groups + "memory.stat", "anon 1\ninactive_file " + std::to_string(200 * kMiB) + "\n");
  EXPECT_EQ(available(), 100 * kMiB);
  write(groups + "a.scope/memory.high", 30 * kMiB);
  EXPECT_EQ(available(), 30 * kMiB);
  write(groups + "a.scope/cpu.max", "100000 100000\n");
  EXPECT_EQ(cores(), 1);
}

// A container may see its own group at the root of the file system and its path as the host names it.
TEST_F(MachineTest, InAContainerTheGroupIsAtTheRoot) {
  write("proc/self/cgroup", "4:memory:/docker/0123\n");
  write("sys/fs/cgroup/memory/memory.limit_in_bytes", 64 * kMiB);
  EXPECT_EQ(available(), 64 * kMiB);
}

TEST(ProcessLimits, AddressSpaceIsCountedAndPartSetAside) {
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_AS, &before), 0);
  std::ifstream statm("/proc/self/statm");
  rlim_t pages = 0;
  statm >> pages;
  const rlimit limit{pages * static_cast<rlim_t>(sysconf(_SC_PAGESIZE)) + 1024 * kMiB, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_AS, &limit), 0);
  const size_t mappable = mappable_memory();
  const auto few = make_cpu_backend({.threads = 2}), many = make_cpu_backend({.threads = 64});
  const size_t left = few->memory_available();
  const std::string refused = message_of([&] { many->memory_available(); });
  const std::string not_allocated = message_of([&] { many->allocate(100); });
  ASSERT_EQ(setrlimit(RLIMIT_AS, &before), 0);
  EXPECT_NEAR(static_cast<double>(mappable), 1024.0 * kMiB, 64.0 * kMiB);
  EXPECT_LT(left, mappable - 2 * 128 * kMiB);
  EXPECT_NE(refused.find("ulimit -v"), std::string::npos) << refused;
  EXPECT_NE(not_allocated.find("64 threads and their buffers alone"), std::string::npos) << not_allocated;
}

// OpenMP would end the program. Here a thread's stack is larger than any address space.
TEST(Threads, ThatCannotBeStartedAreAnError) {
  pthread_attr_t before, huge;
  ASSERT_EQ(pthread_getattr_default_np(&before), 0);
  ASSERT_EQ(pthread_attr_init(&huge), 0);
  ASSERT_EQ(pthread_attr_setstacksize(&huge, size_t{1} << 47), 0);
  ASSERT_EQ(pthread_setattr_default_np(&huge), 0);
  const std::string message = message_of([] { make_cpu_backend({.threads = 4})->allocate(100); });
  ASSERT_EQ(pthread_setattr_default_np(&before), 0);
  EXPECT_EQ(
      message,
      "only 0 of 3 more threads can be started: Resource temporarily unavailable; use fewer --threads, or raise the "
      "limit (ulimit -u)");
  for (pthread_attr_t* attributes : {&before, &huge}) pthread_attr_destroy(attributes);
}

}  // namespace
