// test_thread_ranks.cpp: the stand-in for a communicator that other tests stand on.
#include "tests/thread_ranks.h"

#include <gtest/gtest.h>

#include "tests/backends.h"

namespace {

TEST(ThreadRanks, SumInTheOrderOfTheRanks) {
  constexpr int kRanks = 3;
  // In fp32 (1e8 + 3) - 1e8 is 0, not 3; in bf16 256 + 1 rounds to 256, twice.
  const Values fp32[kRanks] = {{1e8, 1}, {3, 2}, {-1e8, 3}}, bf16[kRanks] = {{256}, {1}, {1}};
  ThreadRanks ranks(kRanks);
  ranks.run([&](int rank) {
    TestDevice device(test_backend_name());
    const std::unique_ptr<Communicator> communicator = ranks.communicator(rank, device.backend());
    const Tensor a = device.upload(fp32[rank], DType::kF32, {2}), b = device.upload(bf16[rank], DType::kBF16, {1});
    const Tensor both[] = {a, b};
    const Communicator::Ticket ticket = communicator->all_reduce(both);
    EXPECT_TRUE(std::isnan(device.read(a)[0])) << "there before wait()";
    communicator->wait(ticket);
    EXPECT_EQ(device.read(a), (Values{0, 6}));
    EXPECT_EQ(device.read(b), Values{256});
    EXPECT_EQ(communicator->bytes_sent(), 2 * (kRanks - 1) * 10 / kRanks);
  });
}

TEST(ThreadRanks, GatherEveryPart) {
  constexpr int kRanks = 2;
  ThreadRanks ranks(kRanks);
  ranks.run([&](int rank) {
    TestDevice device(test_backend_name());
    const std::unique_ptr<Communicator> communicator = ranks.communicator(rank, device.backend());
    const Tensor first = device.poisoned(DType::kF32, {4}), second = device.poisoned(DType::kF32, {2});
    device.write(first.slice(2 * rank, 2), {10.0 * rank, 10.0 * rank + 1});
    device.write(second.slice(rank, 1), {5.0 + rank});
    communicator->all_gather(first.data, 8);
    communicator->wait(communicator->all_gather(second.data, 4));  // they finish in order
    EXPECT_EQ(device.read(first), (Values{0, 1, 10, 11}));
    EXPECT_EQ(device.read(second), (Values{5, 6}));
    EXPECT_EQ(communicator->bytes_sent(), 12);
  });
}

TEST(ThreadRanks, RefuseOperationsThatDiffer) {
  ThreadRanks ranks(2);
  EXPECT_THROW(ranks.run([&](int rank) {
    TestDevice device(test_backend_name());
    const std::unique_ptr<Communicator> communicator = ranks.communicator(rank, device.backend());
    communicator->wait(communicator->all_reduce(device.upload(Values(rank + 1, 1.0), DType::kF32, {rank + 1})));
  }),
               std::logic_error);
}

TEST(ThreadRanks, NobodyWaitsForARankThatFailed) {
  ThreadRanks ranks(2);
  EXPECT_THROW(ranks.run([&](int rank) {
    if (rank == 1) throw std::out_of_range("rank 1");
    TestDevice device(test_backend_name());
    const std::unique_ptr<Communicator> communicator = ranks.communicator(rank, device.backend());
    communicator->wait(communicator->all_reduce(device.upload({1}, DType::kF32, {1})));
  }),
               std::out_of_range);
}

}  // namespace
