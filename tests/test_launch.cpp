// test_launch.cpp: which process of its job a process is, by the variables of each launcher.
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "parallel/launch.h"

namespace {

using Variables = std::map<std::string, std::string>;

Launch launch(const Variables& variables, int port = 0) {
  return find_launch(
      [&](const char* name) {
        const auto found = variables.find(name);
        return found == variables.end() ? nullptr : found->second.c_str();
      },
      port);
}

std::string error_of(const Variables& variables) {
  try {
    launch(variables);
  } catch (const LaunchError& error) {
    return error.what();
  }
  return "";
}

Variables with(Variables variables, const Variables& more) {
  for (const auto& [name, value] : more) variables[name] = value;
  return variables;
}

Variables without(Variables variables, const std::string& name) {
  variables.erase(name);
  return variables;
}

const Variables kTorchrun = {{"RANK", "3"},
                             {"WORLD_SIZE", "8"},
                             {"LOCAL_RANK", "1"},
                             {"LOCAL_WORLD_SIZE", "2"},
                             {"MASTER_ADDR", "node7"},
                             {"MASTER_PORT", "29500"},
                             {"TORCHELASTIC_RUN_ID", "a"},
                             {"TORCHELASTIC_RESTART_COUNT", "0"}};

TEST(Launch, NoVariablesAreOneProcess) {
  for (const Variables& none :
       {Variables{}, {{"MASTER_ADDR", "a"}, {"SLURM_NTASKS", "8"}, {"SLURM_PROCID", "0"}, {"LOCAL_RANK", "4"}}}) {
    const Launch found = launch(none);
    EXPECT_EQ(found.size, 1);
    EXPECT_EQ(found.rank, 0);
    EXPECT_EQ(found.by, "");
  }
  EXPECT_EQ(launch({{"RANK", "0"}, {"WORLD_SIZE", "1"}}).size, 1);
}

TEST(Launch, Torchrun) {
  const Launch found = launch(kTorchrun);
  EXPECT_EQ(found.rank, 3);
  EXPECT_EQ(found.size, 8);
  EXPECT_EQ(found.local_rank, 1);
  EXPECT_EQ(found.local_size, 2);
  EXPECT_EQ(found.address, "node7");
  EXPECT_EQ(found.port, 29501);  // torchrun listens at MASTER_PORT
  EXPECT_EQ(found.by, "torchrun");
  EXPECT_EQ(launch(kTorchrun, 777).port, 777);
}

TEST(Launch, TheNonceIsTheJobsAndNotTheRanks) {
  const std::string nonce = launch(kTorchrun).nonce;
  EXPECT_EQ(launch(with(kTorchrun, {{"RANK", "0"}, {"LOCAL_RANK", "0"}})).nonce, nonce);
  EXPECT_NE(launch(with(kTorchrun, {{"TORCHELASTIC_RUN_ID", "b"}})).nonce, nonce);
  EXPECT_NE(launch(with(kTorchrun, {{"TORCHELASTIC_RESTART_COUNT", "1"}})).nonce, nonce);
}

TEST(Launch, OpenMpi) {
  const Variables variables = {{"OMPI_COMM_WORLD_RANK", "1"},
                               {"OMPI_COMM_WORLD_SIZE", "4"},
                               {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                               {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                               {"PMIX_NAMESPACE", "prterun-a-77@1"},
                               {"SLURM_STEP_NODELIST", "n[1-2]"},
                               {"SLURM_NTASKS", "2"},
                               {"SLURM_PROCID", "0"}};
  const Launch found = launch(variables);
  EXPECT_EQ(found.rank, 1);
  EXPECT_EQ(found.size, 4);
  EXPECT_EQ(found.local_rank, 1);
  EXPECT_EQ(found.address, "127.0.0.1");  // all are on this machine
  EXPECT_GE(found.port, 20000);
  EXPECT_LT(found.port, 30000);
  EXPECT_EQ(launch(with(variables, {{"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "0"}})).port,
            found.port);
  EXPECT_NE(launch(with(variables, {{"PMIX_NAMESPACE", "prterun-a-78@1"}})).nonce, found.nonce);
  const Variables several = with(variables, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}});
  EXPECT_NE(error_of(several).find("mpirun -x MASTER_ADDR"), std::string::npos);
  EXPECT_EQ(launch(with(several, {{"MASTER_ADDR", "node1"}})).address, "node1");
}

TEST(Launch, Mpich) {
  const Variables variables = {
      {"PMI_RANK", "2"}, {"PMI_SIZE", "3"}, {"MPI_LOCALRANKID", "2"}, {"MPI_LOCALNRANKS", "3"}};
  const Launch found = launch(variables);
  EXPECT_EQ(found.rank, 2);
  EXPECT_EQ(found.size, 3);
  EXPECT_EQ(found.local_rank, 2);
  EXPECT_EQ(found.local_size, 3);
  EXPECT_EQ(found.address, "127.0.0.1");
  // mpirun that starts one process of its own on each node by srun.
  const Variables by_srun = {
      {"SLURM_STEP_NODELIST", "n[1-2]"}, {"SLURM_NTASKS", "2"}, {"SLURM_PROCID", "1"}, {"MASTER_ADDR", "n1"}};
  EXPECT_EQ(launch(with(variables, by_srun)).rank, 2);
}

TEST(Launch, Slurm) {
  const Variables variables = {{"SLURM_PROCID", "5"},  {"SLURM_NTASKS", "16"},
                               {"SLURM_LOCALID", "1"}, {"SLURM_JOB_ID", "4711"},
                               {"SLURM_STEP_ID", "0"}, {"SLURM_STEP_NODELIST", "gpu[03-05,9]"}};
  const Launch found = launch(variables);
  EXPECT_EQ(found.rank, 5);
  EXPECT_EQ(found.size, 16);
  EXPECT_EQ(found.local_rank, 1);
  EXPECT_EQ(found.local_size, -1);  // the ranks find out
  EXPECT_EQ(found.address, "gpu03");
  EXPECT_NE(launch(with(variables, {{"SLURM_STEP_ID", "1"}})).nonce, found.nonce);
  // srun --mpi=pmi2 has MPICH's variables, too.
  EXPECT_EQ(launch(with(variables, {{"PMI_RANK", "5"}, {"PMI_SIZE", "16"}})).by, "srun");
  // A shell of salloc is a step of one task in a job of many.
  EXPECT_EQ(launch(with(variables, {{"SLURM_STEP_NUM_TASKS", "1"}})).size, 1);
  EXPECT_EQ(launch(without(variables, "SLURM_STEP_NODELIST")).size, 1);
  EXPECT_EQ(error_of(without(variables, "SLURM_PROCID")).substr(0, 44), "SLURM_NTASKS is set and SLURM_PROCID is not:");
}

TEST(Launch, OfDevices) {
  const Variables variables = {{"TRAIN_GPT2_NONCE", "cafe"}, {"TRAIN_GPT2_PORT", "4000"},
                               {"TRAIN_GPT2_LISTENER", "5"}, {"RANK", "0"},
                               {"WORLD_SIZE", "2"},          {"LOCAL_RANK", "0"},
                               {"LOCAL_WORLD_SIZE", "2"},    {"OMPI_COMM_WORLD_SIZE", "9"}};
  const Launch found = launch(variables, 777);
  EXPECT_EQ(found.by, kByDevices);
  EXPECT_EQ(found.size, 2);
  EXPECT_EQ(found.port, 4000);
  EXPECT_EQ(found.listener, 5);
  EXPECT_EQ(found.nonce, "cafe");
}

TEST(Launch, WhatIsHalfThereOrContradictsItselfIsOneLine) {
  EXPECT_EQ(error_of({{"RANK", "1"}}),
            "RANK is set and WORLD_SIZE is not: torchrun sets both; for one process alone unset it");
  EXPECT_EQ(error_of({{"WORLD_SIZE", "2"}}),
            "WORLD_SIZE is set and RANK is not: torchrun sets both; for one process alone unset it");
  EXPECT_EQ(error_of(with(kTorchrun, {{"RANK", "8"}})), "RANK 8 is not below WORLD_SIZE 8");
  EXPECT_EQ(error_of(with(kTorchrun, {{"LOCAL_RANK", "2"}})), "LOCAL_RANK 2 is not below LOCAL_WORLD_SIZE 2");
  EXPECT_EQ(error_of(with(kTorchrun, {{"LOCAL_WORLD_SIZE", "9"}})), "LOCAL_WORLD_SIZE 9 is above WORLD_SIZE 8");
  for (const char* bad : {"x", "-1", "1.5", "99999999999", "3 "}) {
    EXPECT_EQ(error_of(with(kTorchrun, {{"RANK", bad}})),
              std::string("RANK is '") + bad + "', no number from 0 to 65536");
  }
  EXPECT_EQ(error_of(with(kTorchrun, {{"MASTER_PORT", "65535"}})), "MASTER_PORT is '65535', no number from 0 to 65534");
  EXPECT_EQ(error_of(without(kTorchrun, "MASTER_ADDR")),
            "RANK and WORLD_SIZE are set and MASTER_ADDR is not: torchrun sets all three");
}

TEST(Launch, HostLists) {
  using Hosts = std::vector<std::string>;
  EXPECT_EQ(hosts_of("a", 9), Hosts({"a"}));
  EXPECT_EQ(hosts_of("node[01-03,7],login", 9), Hosts({"node01", "node02", "node03", "node7", "login"}));
  EXPECT_EQ(hosts_of("n[9-11]-ib,b.c", 9), Hosts({"n9-ib", "n10-ib", "n11-ib", "b.c"}));
  EXPECT_EQ(hosts_of("n[098-101]", 9), Hosts({"n098", "n099", "n100", "n101"}));
  EXPECT_EQ(hosts_of("n[0-4294967295]", 2), Hosts({"n0", "n1"}));
  for (const char* bad : {"", ",", "a[", "a]", "a[1", "a[x]", "a[1-]", "a[]", "a[[1]]", "a[1-2-3]", "[1]]"}) {
    EXPECT_THROW(hosts_of(bad, 9), LaunchError) << bad;
  }
}

}  // namespace
