// test_layer_stream.cpp: layers in host memory, or spread over ranks, that visit the device, on every backend: their
// numbers come back after any walk over them, copies wait for operations and operations for copies, and wrong use is
// refused.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "kernels/layer_stream.h"
#include "parallel/part.h"
#include "tests/backends.h"
#include "tests/thread_ranks.h"

namespace {

constexpr int kLayers = 6;
constexpr int64_t kNumbers = 5000, kCodes = 700;

class Bench {
 public:
  // `ranks`: those that keep the layers, of which this is one.
  Bench(int slots, LayerStream::Order order, ThreadRanks* ranks = nullptr, int rank = 0)
      : backend(make_test_backend()),
        communicator(ranks ? ranks->communicator(rank, *backend) : nullptr),
        stream("layers", Category::kWeights, kLayers, slots, order, *backend, communicator.get()) {
    for (int layer = 0; layer < kLayers; ++layer) {
      stream.add(layer, Tensor::of(nullptr, DType::kF32, {numbers_of(layer)}));
      stream.add(layer, Tensor::of(nullptr, DType::kI8, {kCodes}));
    }
    MemoryPlan plan;
    stream.declare(plan, kPhaseAlways);
    void* workspace = nullptr;
    plan.add(&workspace, "workspace", Category::kWorkspace, 1 << 20);
    plan.add(&counter, "counter", Category::kWorkspace, sizeof *counter);
    arena_ = std::make_unique<Arena>(*backend, std::move(plan));
    backend->set_workspace(workspace, 1 << 20);
    backend->fill(counter, 0, sizeof *counter);
  }

  // Layers need not be equally large.
  static int64_t numbers_of(int layer) { return kNumbers + 13 * layer; }

  void set(int layer, float value) {
    stream.acquire(layer, Access::kOverwrite);
    backend->fill_constant(stream.tensor(layer, 0), value);
    const Tensor codes = stream.tensor(layer, 1);
    backend->fill(codes.data, layer + 1, codes.bytes());
    backend->fill(codes.scales, layer + 2, static_cast<size_t>(quant_blocks(kCodes)) * sizeof(float));
    stream.release(layer, true);
  }

  // x += x: an operation that needs what is there.
  void redouble(int layer) {
    stream.acquire(layer, Access::kUpdate);
    const Tensor x = stream.tensor(layer, 0);
    backend->accumulate(x, x, {}, counter);
    stream.release(layer, true);
  }

  void expect(int layer, float value) {
    stream.acquire(layer, Access::kRead);
    const Tensor x = stream.tensor(layer, 0), codes = stream.tensor(layer, 1);
    std::vector<float> numbers(static_cast<size_t>(x.elements()));
    std::vector<uint8_t> bytes(kCodes), scales(static_cast<size_t>(quant_blocks(kCodes)) * sizeof(float));
    backend->copy(numbers.data(), x.data, x.bytes());
    backend->copy(bytes.data(), codes.data, bytes.size());
    backend->copy(scales.data(), codes.scales, scales.size());
    backend->synchronize();
    stream.release(layer, false);
    EXPECT_EQ(numbers, std::vector<float>(numbers.size(), value)) << "layer " << layer;
    EXPECT_EQ(bytes, std::vector<uint8_t>(bytes.size(), static_cast<uint8_t>(layer + 1))) << "layer " << layer;
    EXPECT_EQ(scales, std::vector<uint8_t>(scales.size(), static_cast<uint8_t>(layer + 2))) << "layer " << layer;
  }

  std::unique_ptr<Backend> backend;
  std::unique_ptr<Communicator> communicator;
  LayerStream stream;
  uint32_t* counter = nullptr;  // on the device; for fp32 its value does not matter

 private:
  std::unique_ptr<Arena> arena_;
};

struct Walk {
  int slots;
  LayerStream::Order order;
  int ranks = 0;  // that keep the layers; 0: host memory does
};

class LayerStreams : public ::testing::TestWithParam<Walk> {
 protected:
  // f(bench), on each rank.
  static void with_bench(const std::function<void(Bench&)>& f) {
    const Walk walk = GetParam();
    if (walk.ranks == 0) {
      Bench bench(walk.slots, walk.order);
      f(bench);
      return;
    }
    ThreadRanks ranks(walk.ranks);
    ranks.run([&](int rank) {
      Bench bench(walk.slots, walk.order, &ranks, rank);
      f(bench);
    });
  }
};
INSTANTIATE_TEST_SUITE_P(
    All, LayerStreams,
    ::testing::Values(Walk{2, LayerStream::Order::kUpAndDown}, Walk{3, LayerStream::Order::kUpAndDown},
                      Walk{2, LayerStream::Order::kDown}, Walk{3, LayerStream::Order::kDown},
                      Walk{2, LayerStream::Order::kDownAgain}, Walk{9, LayerStream::Order::kDownAgain},
                      Walk{2, LayerStream::Order::kUpAndDown, 2}, Walk{3, LayerStream::Order::kUpAndDown, 3},
                      Walk{3, LayerStream::Order::kDown, 2}, Walk{2, LayerStream::Order::kDownAgain, 3},
                      Walk{9, LayerStream::Order::kDownAgain, 2}),
    [](const auto& info) {
      return std::string("slots") + std::to_string(info.param.slots) + "order" +
             std::to_string(static_cast<int>(info.param.order)) + "ranks" + std::to_string(info.param.ranks);
    });

void keep_what_they_hold(Bench& bench) {
  std::vector<float> expected;
  for (int layer = 0; layer < kLayers; ++layer) {
    expected.push_back(static_cast<float>(layer + 1));
    bench.set(layer, expected.back());
  }
  for (int round = 0; round < 3; ++round) {
    for (int layer = 0; layer < kLayers; ++layer) bench.expect(layer, expected[static_cast<size_t>(layer)]);
    for (int layer = kLayers - 1; layer >= 0; --layer) {
      bench.redouble(layer);
      expected[static_cast<size_t>(layer)] *= 2;
    }
  }
  std::mt19937 generator(5);
  for (int visit = 0; visit < 60; ++visit) {
    const int layer = static_cast<int>(generator() % kLayers);
    const uint32_t what = generator() % 3;
    if (what == 0) {
      bench.redouble(layer);
      expected[static_cast<size_t>(layer)] *= 2;
    } else if (what == 1) {  // also where the layer is just being fetched ahead
      bench.set(layer, expected[static_cast<size_t>(layer)] = static_cast<float>(visit));
    } else {
      bench.expect(layer, expected[static_cast<size_t>(layer)]);
    }
  }
}

TEST_P(LayerStreams, KeepWhatTheyHold) { with_bench(keep_what_they_hold); }

// A layer that is being fetched ahead is overwritten: the copy must not come after.
TEST_P(LayerStreams, OverwriteWhatIsOnItsWay) {
  for (int round = 0; round < 8; ++round) {
    with_bench([](Bench& bench) {
      for (int layer = 0; layer < kLayers; ++layer) bench.set(layer, 1);
      for (int layer = kLayers - 1; layer > 0; layer -= 2) {
        bench.expect(layer, 1);  // fetches the next one
        bench.set(layer - 1, static_cast<float>(100 + layer));
        bench.backend->synchronize();  // the compute stream may be ahead of the copies
      }
      for (int layer = 0; layer < kLayers; ++layer)
        bench.expect(layer, layer % 2 ? 1 : static_cast<float>(101 + layer));
    });
  }
}

// Two layers held, as the forward pass does at the end of a block.
void hold_two_layers_at_a_time(Bench& bench) {
  for (int layer = 0; layer < kLayers; ++layer) bench.set(layer, 1);
  for (int layer = 0; layer + 1 < kLayers; ++layer) {
    bench.stream.acquire(layer, Access::kRead);
    bench.stream.acquire(layer, Access::kUpdate);
    bench.stream.acquire(layer + 1, Access::kUpdate);
    const Tensor from = bench.stream.tensor(layer, 0).slice(0, kNumbers);
    const Tensor to = bench.stream.tensor(layer + 1, 0);
    bench.backend->accumulate(to.slice(0, kNumbers), from, {}, bench.counter);
    bench.backend->fill_constant(to.slice(kNumbers, to.elements() - kNumbers), static_cast<float>(layer + 2));
    bench.stream.release(layer + 1, true);
    bench.stream.release(layer, false);
    bench.stream.release(layer, false);
  }
  for (int layer = 0; layer < kLayers; ++layer) bench.expect(layer, static_cast<float>(layer + 1));
}

TEST_P(LayerStreams, HoldTwoLayersAtATime) { with_bench(hold_two_layers_at_a_time); }

// Every rank writes its part where it is kept; what is whole on the device is old then, also while it is held.
TEST(LayerStream, PartsAreChangedInPlace) {
  for (const int count : {1, 2, 3}) {
    ThreadRanks ranks(count);
    ranks.run([&](int rank) {
      Bench bench(2, LayerStream::Order::kUpAndDown, &ranks, rank);
      for (int layer = 0; layer < kLayers; ++layer) bench.set(layer, 1);
      for (int layer = 0; layer < kLayers; ++layer) {
        bench.expect(layer, 1);  // fetches the next one
        bench.stream.acquire(layer, Access::kRead);
        const Tensor whole = bench.stream.tensor(layer, 0), mine = bench.stream.part(layer, 0);
        const Part part = part_of(Bench::numbers_of(layer), rank, count);
        ASSERT_EQ(mine.elements(), part.count);
        bench.backend->copy(mine.data, whole.slice(part.begin, part.count).data, mine.bytes());
        bench.backend->accumulate(mine, mine, {}, bench.counter);
        const Tensor codes = bench.stream.part(layer, 1);
        bench.backend->fill(codes.data, layer + 1, codes.bytes());
        bench.stream.part_changed(layer);
        bench.stream.release(layer, false);
        if (layer > 0) {  // one that nobody holds
          const Tensor before = bench.stream.part(layer - 1, 0);
          bench.backend->accumulate(before, before, {}, bench.counter);
          bench.stream.part_changed(layer - 1);
        }
      }
      for (int layer = 0; layer < kLayers; ++layer) bench.expect(layer, layer + 1 < kLayers ? 4 : 2);
    });
  }
}

TEST(LayerStream, RefusesWrongUse) {
  Bench bench(2, LayerStream::Order::kUpAndDown);
  EXPECT_THROW(bench.stream.tensor(0, 0), std::logic_error);
  bench.stream.acquire(0, Access::kRead);
  bench.stream.acquire(1, Access::kRead);
  EXPECT_THROW(bench.stream.acquire(2, Access::kRead), std::logic_error);
  bench.stream.release(0, false);
  EXPECT_THROW(bench.stream.release(0, false), std::logic_error);
  EXPECT_THROW(bench.stream.tensor(0, 0), std::logic_error);
  EXPECT_NO_THROW(bench.stream.acquire(2, Access::kRead));
  EXPECT_THROW(bench.stream.part(0, 0), std::logic_error) << "not spread over ranks";
  EXPECT_THROW(Bench(0, LayerStream::Order::kDown), std::invalid_argument);
}

}  // namespace
