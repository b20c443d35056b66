// test_communicator.cpp: what ranks tell each other on their devices, on every backend, each rank a process: sums
// against float64, the same bits everywhere, the order with what is computed, and what a lost peer looks like.
#include "parallel/communicator.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "parallel/connection.h"
#include "parallel/ring_communicator.h"
#include "tests/backends.h"
#include "tests/device_value.h"
#include "tests/ranks.h"

namespace {

constexpr std::chrono::seconds kTimeout{60};

class CommunicatorTest : public OperationTest {
 protected:
  // NCCL does not say which rank it lost.
  std::string name_of(int rank) const { return backend() == "cpu" ? "rank " + std::to_string(rank) : "another rank"; }

  // body(device, communicator) on each rank.
  std::vector<std::string> on_devices(int ranks,
                                      const std::function<std::string(TestDevice&, Communicator&)>& body) const {
    return on_ranks(ranks, [&](Job& job) {
      TestDevice device(backend(), 1);
      const auto communicator = make_communicator(job, device.backend(), kTimeout);
      EXPECT_EQ(communicator->rank(), job.rank());
      EXPECT_EQ(communicator->size(), job.size());
      return body(device, *communicator);
    });
  }
};

std::string text_of(const std::vector<uint8_t>& bits) { return {bits.begin(), bits.end()}; }

void expect_all_equal(const std::vector<std::string>& results) {
  for (const std::string& result : results) EXPECT_TRUE(result == results[0]);
}

// Odd sizes, with parts that are empty, and one that takes many messages.
const std::vector<int64_t> kSizes = {1, 7, 100003, 2, 150000};

TEST_P(CommunicatorTest, AllReduceIsTheSumOnEveryRank) {
  for (const int ranks : {2, 3, 4}) {
    const auto run = [&](TestDevice& device, Communicator& communicator) {
      std::vector<Tensor> tensors;
      std::vector<Values> references;
      for (const int64_t size : kSizes) {
        Values sum(static_cast<size_t>(size));
        for (int rank = 0; rank < ranks; ++rank) {
          const auto seed = static_cast<uint32_t>(size + 1000003 * rank);
          const Tensor t = device.random(seed, dtype(), {size});
          const Values values = device.read(t);
          std::transform(sum.begin(), sum.end(), values.begin(), sum.begin(), std::plus<>());
          if (rank == communicator.rank()) tensors.push_back(t);
        }
        references.push_back(sum);
      }
      communicator.wait(communicator.all_reduce(tensors));
      std::vector<uint8_t> bits;
      for (size_t i = 0; i < tensors.size(); ++i) {
        EXPECT_LT(relative_error(device.read(tensors[i]), references[i]), tolerance(dtype())) << kSizes[i];
        append_bits(device, bits, tensors[i]);
      }
      device.check_guards();
      return text_of(bits);
    };
    const auto results = on_devices(ranks, run);
    expect_all_equal(results);
    EXPECT_EQ(on_devices(ranks, run), results) << "two runs";
  }
}

TEST_P(CommunicatorTest, AllGatherBringsTheOthersParts) {
  for (const int ranks : {2, 3, 4}) {
    const auto results = on_devices(ranks, [&](TestDevice& device, Communicator& communicator) {
      std::vector<uint8_t> bits;
      for (const int64_t size : {1, 7, 100003, 200000}) {
        const Tensor whole = device.poisoned(dtype(), {ranks * size});
        Values reference;
        for (int rank = 0; rank < ranks; ++rank) {
          Values part(static_cast<size_t>(size));
          for (size_t i = 0; i < part.size(); ++i)
            part[i] = static_cast<double>((i * 7 + static_cast<size_t>(rank)) % 251);
          reference.insert(reference.end(), part.begin(), part.end());
          if (rank == communicator.rank()) device.write(whole.slice(rank * size, size), part);
        }
        communicator.wait(communicator.all_gather(whole.data, whole.bytes() / static_cast<size_t>(ranks)));
        EXPECT_EQ(device.read(whole), reference) << size;
        append_bits(device, bits, whole);
      }
      return text_of(bits);
    });
    expect_all_equal(results);
  }
}

// What is computed before it is in the sum, what is computed after wait() sees the sum, and what is computed meanwhile
// neither waits nor disturbs.
TEST_P(CommunicatorTest, RunsBetweenWhatIsComputedBeforeAndAfter) {
  const auto results = on_devices(3, [&](TestDevice& device, Communicator& communicator) {
    constexpr int64_t kCount = 50000, kTensors = 4, kRounds = 5;
    const DeviceValue<uint32_t> counter(device);
    std::vector<Tensor> x, y;
    for (int i = 0; i < kTensors; ++i) {
      x.push_back(device.poisoned(dtype(), {kCount}));
      y.push_back(device.poisoned(dtype(), {kCount}));
    }
    for (int round = 0; round < kRounds; ++round) {
      Communicator::Ticket tickets[kTensors];
      for (int i = 0; i < kTensors; ++i) {
        device->fill_constant(x[i], 100.0f);
        device->fill_constant(x[i], static_cast<float>(communicator.rank() + i + round));
        tickets[i] = communicator.all_reduce(x[i]);
        device->fill_constant(y[i], static_cast<float>(i));
        device->accumulate(y[i], y[i], {}, counter.data());
      }
      for (const int i : {1, 0, 2, 3}) {
        communicator.wait(tickets[i]);
        device->accumulate(y[i], x[i], {}, counter.data());
        device->fill_constant(x[i], 0.0f);
      }
      for (int i = 0; i < kTensors; ++i)
        EXPECT_EQ(device.read(y[i]), Values(kCount, 2 * i + 3 * (i + round) + 3)) << "tensor " << i;
    }
    return std::string();
  });
}

TEST_P(CommunicatorTest, CountsWhatARingSends) {
  on_devices(3, [&](TestDevice& device, Communicator& communicator) {
    const int64_t size = static_cast<int64_t>(dtype_size(dtype()));
    const Tensor a = device.random(1, dtype(), {999}), b = device.random(2, dtype(), {3}),
                 parts = device.random(3, dtype(), {300});
    EXPECT_EQ(communicator.bytes_sent(), 0);
    const Tensor both[] = {a, b};
    communicator.all_reduce(both);
    EXPECT_EQ(communicator.bytes_sent(), 4 * 1002 * size / 3);
    communicator.wait(communicator.all_gather(parts.data, static_cast<size_t>(100 * size)));
    EXPECT_EQ(communicator.bytes_sent(), 4 * 1002 * size / 3 + 200 * size);
    return std::string();
  });
}

// On every rank at once, and not after the timeout.
TEST_P(CommunicatorTest, APeerThatEndsIsNoticed) {
  for (const int ranks : {2, 3}) {
    const auto results = on_ranks(
        ranks,
        [&](Job& job) {
          TestDevice device(backend(), 1);
          const auto communicator = make_communicator(job, device.backend(), kTimeout);
          const Tensor x = device.random(1, dtype(), {100003});
          communicator->wait(communicator->all_reduce(x));
          device->synchronize();
          if (job.rank() == 1) raise(SIGKILL);
          const std::string message = message_of([&] {
            communicator->wait(communicator->all_reduce(x));
            device->synchronize();
            communicator->wait(communicator->all_gather(x.data, 16));
          });
          return message;
        },
        1);
    // Who looks the other way first, sees another one end because of it.
    std::string all;
    for (int rank = 0; rank < ranks; ++rank) {
      if (rank == 1) continue;
      EXPECT_TRUE(results[static_cast<size_t>(rank)].starts_with(
          backend() == "cpu" ? "the connection to rank " : "the connection to another rank was closed (NCCL)"));
      all += results[static_cast<size_t>(rank)] + "\n";
    }
    EXPECT_NE(all.find(name_of(1) + " was closed"), std::string::npos) << all;
  }
}

TEST_P(CommunicatorTest, APeerThatDoesNothingIsNamedAfterTheTimeout) {
  const auto results = on_ranks(2, [&](Job& job) {
    TestDevice device(backend(), 1);
    const auto communicator = make_communicator(job, device.backend(), std::chrono::seconds(1));
    if (job.rank() == 1) {
      job.get("rank 0 gave up");
      return std::string();
    }
    const Tensor x = device.random(1, dtype(), {100003});
    const std::string message = message_of([&] {
      communicator->wait(communicator->all_reduce(x));
      device->synchronize();
      communicator->wait(communicator->all_gather(x.data, 16));
    });
    job.set("rank 0 gave up", "");
    return message;
  });
  EXPECT_EQ(results[0], name_of(1) + " does not answer (for 1 s, --comm-timeout)");
}

INSTANTIATE_OPERATION_TESTS(CommunicatorTest);

// Rank 0 waits for a sum while both are stopped for longer than the timeout.
TEST(RingCommunicator, AJobThatIsStoppedAsAWholeGoesOn_Slow) {
  const auto results = on_ranks(2, [](Job& job) {
    const auto communicator = make_ring_communicator(job, "127.0.0.1", std::chrono::seconds(3));
    if (job.rank() == 1) {
      job.set("rank 1", std::to_string(getpid()));
      job.get("stopped");
      std::this_thread::sleep_for(std::chrono::milliseconds(300));  // rank 0 looks at the clock meanwhile
    } else {
      const pid_t both[] = {getpid(), std::stoi(job.get("rank 1"))};
      if (fork() == 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        for (const pid_t rank : both) kill(rank, SIGSTOP);
        std::this_thread::sleep_for(std::chrono::seconds(4));
        job.set("stopped", "");
        for (const pid_t rank : both) kill(rank, SIGCONT);
        _exit(0);
      }
    }
    float x = static_cast<float>(job.rank() + 1);
    const auto begun = std::chrono::steady_clock::now();
    communicator->wait(communicator->all_reduce(Tensor::of(&x, DType::kF32, {1})));
    if (job.rank() == 0) {
      EXPECT_GT(std::chrono::steady_clock::now() - begun, std::chrono::seconds(4));
      wait(nullptr);
    }
    return std::to_string(x);
  });
  EXPECT_EQ(results, (std::vector<std::string>{"3.000000", "3.000000"}));
}

TEST(RingCommunicator, WhoCannotBeReachedIsNamed) {
  const TemporaryDirectory folder;
  FileJob job(folder.path(), 0, 2);
  const auto problem = [&](int port) {
    job.set("ring/1", MessageWriter().text("127.0.0.1").number(static_cast<uint32_t>(port)).text("token").take());
    return message_of([&] { make_ring_communicator(job, "127.0.0.1", std::chrono::milliseconds(100)); });
  };
  Descriptor other = listen_at("127.0.0.1", 0);
  const int port = port_of(other);
  EXPECT_TRUE(problem(port).starts_with("rank 1 has not connected to this one at 127.0.0.1 port "));
  other.reset();
  EXPECT_EQ(problem(port),
            "rank 1 cannot be reached at 127.0.0.1 port " + std::to_string(port) + ": Connection refused");
}

TEST(Accepting, StrangersAreClosedOrLeftWaiting) {
  const Descriptor listener = listen_at("127.0.0.1", 0);
  const auto call = [&](const std::string& text) {
    Descriptor caller = connect_to("127.0.0.1", port_of(listener), Clock::now() + kTimeout);
    EXPECT_EQ(send(caller.number(), text.data(), text.size(), MSG_NOSIGNAL), static_cast<ssize_t>(text.size()));
    return caller;
  };
  const std::string token = random_nonce();
  EXPECT_EQ(token.size(), 32u);
  EXPECT_NE(token, random_nonce());
  const Descriptor silent = call(""), half = call(token.substr(0, 9)), other = call("GET / HTTP/1.1\r\n\r\n");
  call(token.substr(0, 5));  // and closes
  const Descriptor right = call(token + "and more");
  const Descriptor accepted = accept_from(listener, token, Clock::now() + kTimeout);
  ASSERT_TRUE(accepted.is_open());
  char bytes[16];
  EXPECT_EQ(recv(accepted.number(), bytes, sizeof bytes, 0), 8);
  EXPECT_EQ(std::string(bytes, 8), "and more");
  EXPECT_EQ(recv(accepted.number(), bytes, sizeof bytes, 0), -1) << "it blocks";

  call(token.substr(0, 31) + "!");
  EXPECT_EQ(message_of([&] { accept_from(listener, token, Clock::now() + std::chrono::milliseconds(50)); }),
            "Connection timed out");
}

TEST(Communicator, ARankAloneHasNothingToSay) {
  Job job;
  const auto backend = make_test_backend();
  const auto communicator = make_communicator(job, *backend, kTimeout);
  float x = 3;  // nobody touches it, wherever the device's memory is
  communicator->wait(communicator->all_reduce(Tensor::of(&x, DType::kF32, {1})));
  communicator->wait(communicator->all_gather(&x, sizeof x));
  EXPECT_EQ(x, 3);
  EXPECT_EQ(communicator->size(), 1);
  EXPECT_EQ(communicator->bytes_sent(), 0);
}

}  // namespace
