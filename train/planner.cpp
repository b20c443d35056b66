// planner.cpp: see planner.h. There are up to a few thousand candidates, and a plan of a large model takes
// milliseconds, so most of them are rejected by the least bytes of a smaller relative that did not fit.
#include "train/planner.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace {

constexpr int64_t kHeadChunks[] = {128, 512, 2048};
constexpr Recompute kLevels[] = {Recompute::kNone, Recompute::kGelu, Recompute::kNormsGelu, Recompute::kAttention,
                                 Recompute::kBlock};
constexpr GradientBlocks kBlocks[] = {GradientBlocks::kWhole, GradientBlocks::kEmbedding, GradientBlocks::kAll};
constexpr int64_t kMostTokens = INT32_MAX;  // of a pass

std::vector<int64_t> micro_batches(const EngineConfig& start, const Freedom& freedom) {
  if (!freedom.micro_batch) return {start.shapes.batch};
  std::vector<int64_t> sizes;
  if (freedom.sequences_per_step > 0) {
    for (int64_t size = 1; size <= freedom.sequences_per_step / size; ++size) {
      if (freedom.sequences_per_step % size != 0) continue;
      sizes.push_back(size);
      if (size != freedom.sequences_per_step / size) sizes.push_back(freedom.sequences_per_step / size);
    }
  } else {
    for (int64_t size = 1; size < freedom.largest_micro_batch; size *= 2) sizes.push_back(size);
    sizes.push_back(freedom.largest_micro_batch);
  }
  std::erase_if(sizes, [&](int64_t size) { return size > kMostTokens / start.shapes.sequence; });
  return sizes;
}

std::vector<Offload> offloads(const EngineConfig& start, const Freedom& freedom) {
  if (!freedom.offload) return {start.offload};
  std::vector<Offload> all;
  for (const bool activations : {false, true}) {
    for (const bool weights : {false, true}) {
      for (const bool state : {false, true}) {
        if (weights && !state) continue;  // state comes along with the weights
        all.push_back({activations, state, weights, start.offload.layers_in_flight});
      }
    }
  }
  return all;
}

std::vector<int64_t> head_chunks(const EngineConfig& start, const Freedom& freedom, int64_t tokens) {
  if (!freedom.head_chunk) return {std::min(start.shapes.head_chunk, tokens)};
  std::vector<int64_t> chunks;
  for (const int64_t chunk : kHeadChunks) chunks.push_back(std::min(chunk, tokens));
  chunks.erase(std::unique(chunks.begin(), chunks.end()), chunks.end());
  return chunks;
}

// A setting's place in the order of memory: with the same family, more tokens, a longer chunk or less recomputation
// never take fewer bytes.
using Family = std::tuple<bool, GradientBlocks, bool, bool, bool>;
Family family(const EngineConfig& c) {
  return {c.gradients.micro_batches == 1, c.gradients.blocks, c.offload.activations, c.offload.state,
          c.offload.weights};
}

bool at_most(const EngineConfig& a, const EngineConfig& b) {
  return a.shapes.batch <= b.shapes.batch && a.shapes.head_chunk <= b.shapes.head_chunk &&
         a.shapes.recompute >= b.shapes.recompute;
}

// The relatives of a candidate that take the least: the smallest of its family, and the smallest of its micro-batch.
class Relatives {
 public:
  explicit Relatives(const std::vector<Choice>& candidates) {
    for (const Choice& choice : candidates) {
      const EngineConfig& c = choice.config;
      keep_smaller(of_family_[family(c)], c);
      keep_smaller(of_batch_[{family(c), c.shapes.batch}], c);
      keep_smaller(of_level_[{family(c), c.shapes.batch, c.shapes.recompute}], c);
    }
  }
  std::vector<const EngineConfig*> of(const EngineConfig& c) const {
    return {of_family_.at(family(c)), of_batch_.at({family(c), c.shapes.batch}),
            of_level_.at({family(c), c.shapes.batch, c.shapes.recompute}), &c};
  }
  std::vector<const EngineConfig*> smallest() const {
    std::vector<const EngineConfig*> all;
    for (const auto& [key, config] : of_family_) all.push_back(config);
    return all;
  }

 private:
  static void keep_smaller(const EngineConfig*& kept, const EngineConfig& c) {
    if (!kept || at_most(c, *kept)) kept = &c;
  }
  std::map<Family, const EngineConfig*> of_family_;
  std::map<std::pair<Family, int64_t>, const EngineConfig*> of_batch_;
  std::map<std::tuple<Family, int64_t, Recompute>, const EngineConfig*> of_level_;
};

}  // namespace

Bytes least_bytes(const MemoryPlan& plan) {
  Bytes least;
  for (uint32_t phase = 1; phase <= kPhaseUpdate; phase *= 2) {
    Bytes alive;
    for (const Allocation& allocation : plan.allocations()) {
      if (allocation.phases & phase) (allocation.host ? alive.host : alive.device) += allocation.bytes;
    }
    least.device = std::max(least.device, alive.device);
    least.host = std::max(least.host, alive.host);
  }
  return least;
}

bool fits(const Bytes& bytes, const MemoryLimit& limit) {
  return bytes.device <= limit.device && bytes.host + (limit.shared ? bytes.device : 0) <= limit.host;
}

bool gradient_blocks_possible(const EngineConfig& config) {
  const OptimizerKind kind = config.optimizer.kind;
  const bool full_moment =
      (kind == OptimizerKind::kFlora || kind == OptimizerKind::kAdafactor) && !config.optimizer.factored;
  return config.gradients.kind == GradientMode::kFused && config.gradients.micro_batches == 1 && !full_moment;
}

std::vector<Choice> Planner::candidates(const EngineConfig& start, const Freedom& freedom) const {
  const BlockBytes bytes = block_bytes(start, backend_);
  std::vector<Choice> all;
  const auto add = [&](const EngineConfig& config) {
    all.push_back({.config = config, .seconds = predict_step(config, speeds_, bytes).seconds()});
  };
  for (const int64_t batch : micro_batches(start, freedom)) {
    EngineConfig config = start;
    config.shapes.batch = batch;
    if (freedom.micro_batch)
      config.gradients.micro_batches =
          freedom.sequences_per_step > 0 ? static_cast<int>(freedom.sequences_per_step / batch) : 1;
    for (const GradientBlocks blocks : kBlocks) {
      if (!freedom.gradient_blocks && blocks != start.gradients.blocks) continue;
      config.gradients.blocks = blocks;
      if (blocks != GradientBlocks::kWhole && !gradient_blocks_possible(config)) continue;
      for (const Recompute level : kLevels) {
        if (!freedom.recompute && level != start.shapes.recompute) continue;
        config.shapes.recompute = level;
        for (const int64_t chunk : head_chunks(start, freedom, batch * start.shapes.sequence)) {
          config.shapes.head_chunk = chunk;
          for (const Offload& offload : offloads(start, freedom)) {
            config.offload = offload;
            add(config);
          }
        }
      }
    }
  }
  // Equally fast ones: first what was tried first, which keeps more on the device and less of it.
  std::stable_sort(all.begin(), all.end(),
                   [](const Choice& a, const Choice& b) { return a.seconds_per_token() < b.seconds_per_token(); });
  return all;
}

std::vector<Choice> Planner::fitting(const std::vector<Choice>& candidates, const MemoryLimit& limit,
                                     size_t count) const {
  const Relatives relatives(candidates);
  std::map<const EngineConfig*, bool> too_large;  // by least bytes
  const auto rejected = [&](const EngineConfig* config) {
    const auto [entry, unknown] = too_large.try_emplace(config, false);
    if (unknown) entry->second = !fits(least_bytes(Engine(*config, backend_).declared()), limit);
    return entry->second;
  };
  std::vector<Choice> found;
  for (const Choice& candidate : candidates) {
    if (found.size() == count) break;
    const std::vector<const EngineConfig*> smaller = relatives.of(candidate.config);
    if (std::any_of(smaller.begin(), smaller.end(), rejected)) continue;
    const MemoryPlan plan = Engine(candidate.config, backend_).plan();
    if (!fits({plan.device_bytes(), plan.host_bytes()}, limit)) continue;
    found.push_back(candidate);
    found.back().device_bytes = plan.device_bytes();
    found.back().host_bytes = plan.host_bytes();
  }
  return found;
}

std::optional<Choice> Planner::smallest(const std::vector<Choice>& candidates, const MemoryLimit& limit) const {
  std::optional<Choice> best;
  const auto host_fits = [&](const Choice& choice) {
    return fits({limit.shared ? choice.device_bytes : 0, choice.host_bytes}, {SIZE_MAX, limit.host, limit.shared});
  };
  for (const EngineConfig* config : Relatives(candidates).smallest()) {
    const MemoryPlan plan = Engine(*config, backend_).plan();
    Choice choice{.config = *config, .device_bytes = plan.device_bytes(), .host_bytes = plan.host_bytes()};
    const auto rank = [&](const Choice& c) {
      return std::make_pair(!limit.shared && !host_fits(c), c.device_bytes + (limit.shared ? c.host_bytes : 0));
    };
    if (!best || rank(choice) < rank(*best)) best = choice;
  }
  return best;
}
