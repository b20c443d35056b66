// planner.cpp: see planner.h.
#include "train/planner.h"

#include <algorithm>
#include <map>
#include <sstream>
#include <tuple>

namespace {

constexpr int64_t kHeadChunks[] = {128, 512, 2048, 8192, INT64_MAX};  // the last one: all tokens
constexpr int64_t kMostTokens = INT32_MAX;                            // of a pass

std::vector<int64_t> micro_batches(const EngineConfig& start, const SearchSpace& space) {
  if (!space.micro_batch) return {start.shapes.batch};
  std::vector<int64_t> sizes;
  if (space.sequences_per_step > 0) {
    for (int64_t size = 1; size <= space.sequences_per_step / size; ++size) {
      if (space.sequences_per_step % size != 0) continue;
      sizes.push_back(size);
      if (size != space.sequences_per_step / size) sizes.push_back(space.sequences_per_step / size);
    }
  } else {
    for (int64_t size = 1; size < space.largest_micro_batch; size *= 2) sizes.push_back(size);
    sizes.push_back(space.largest_micro_batch);
  }
  std::erase_if(sizes, [&](int64_t size) { return size > kMostTokens / start.shapes.sequence; });
  return sizes;
}

std::vector<Offload> offloads(const EngineConfig& start, const SearchSpace& space) {
  if (!space.offload) return {start.offload};
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

std::vector<int64_t> head_chunks(const EngineConfig& start, const SearchSpace& space, int64_t tokens) {
  if (!space.head_chunk) return {std::min(start.shapes.head_chunk, tokens)};
  std::vector<int64_t> chunks;
  for (const int64_t chunk : kHeadChunks) chunks.push_back(std::min(chunk, tokens));
  chunks.erase(std::unique(chunks.begin(), chunks.end()), chunks.end());
  return chunks;
}

// Settings that differ in nothing but micro-batch, head chunk and recomputation: more tokens, a longer chunk or less
// recomputation never take fewer bytes.
using Family = std::tuple<bool, GradientBlocks, bool, bool, bool, Spread>;
Family family(const EngineConfig& c) {
  return {c.gradients.micro_batches == 1,
          c.gradients.blocks,
          c.offload.activations,
          c.offload.state,
          c.offload.weights,
          c.spread};
}

bool at_most(const EngineConfig& a, const EngineConfig& b) {
  return a.shapes.batch <= b.shapes.batch && a.shapes.head_chunk <= b.shapes.head_chunk &&
         a.shapes.recompute >= b.shapes.recompute;
}

// A family, and its parts of one micro-batch (else 0), and of one recompute level and head chunk, too (else 0).
using Group = std::tuple<Family, int64_t, int, int64_t>;
std::vector<Group> groups(const EngineConfig& c) {
  const int level = 1 + static_cast<int>(c.shapes.recompute);
  return {{family(c), 0, 0, 0},
          {family(c), c.shapes.batch, 0, 0},
          {family(c), c.shapes.batch, level, 0},
          {family(c), c.shapes.batch, level, c.shapes.head_chunk}};
}

// The setting of each group that takes the least.
std::map<Group, const EngineConfig*> least_of_groups(const std::vector<Candidate>& candidates) {
  std::map<Group, const EngineConfig*> least;
  for (const Candidate& candidate : candidates) {
    for (const Group& group : groups(candidate.config)) {
      const EngineConfig*& kept = least[group];
      if (!kept || at_most(candidate.config, *kept)) kept = &candidate.config;
    }
  }
  return least;
}

Candidate with_bytes(Candidate candidate, Backend& backend) {
  const MemoryPlan plan = Engine(candidate.config, backend).plan();
  candidate.device_bytes = plan.device_bytes();
  candidate.host_bytes = plan.host_bytes();
  return candidate;
}

}  // namespace

MemoryLimit available_memory_limit(const Backend& backend, Job& job) {
  const size_t sharing = static_cast<size_t>(job.local_size());
  MemoryLimit least{backend.memory_available(), backend.host_memory_available() / sharing, backend.name() == "cpu"};
  if (least.shared) least.device /= sharing;
  for (const std::string& text : job.gather(std::to_string(least.device) + " " + std::to_string(least.host))) {
    std::istringstream rank(text);
    size_t device, host;
    rank >> device >> host;
    least.device = std::min(least.device, device);
    least.host = std::min(least.host, host);
  }
  return least;
}

SearchSpace search_space(const RunSetup& setup, bool given_too) {
  const Options& asked = setup.request.options;
  const bool fresh = setup.request.checkpoint.empty();
  const auto open = [&](const char* flag) { return given_too || !asked.was_given(flag); };
  SearchSpace space;
  space.recompute = open("recompute");
  space.offload = open("offload");
  space.spread = open("shard") && setup.options.ranks > 1;
  space.micro_batch = fresh && open("micro-batch");
  space.head_chunk = fresh && open("head-chunk");
  space.gradient_blocks = fresh && open("gradient-blocks");
  if (!asked.is_open("tokens-per-step")) {
    space.sequences_per_step = asked.tokens_per_step / (setup.engine.shapes.sequence * setup.options.ranks);
  } else {
    // A micro-batch that was given is never made larger: without --tokens-per-step it is the whole step.
    space.largest_micro_batch =
        asked.was_given("micro-batch") ? setup.engine.shapes.batch : default_micro_batch(setup.request.device);
  }
  return space;
}

Bytes least_bytes(const MemoryPlan& plan) {
  Bytes least;
  for (uint32_t phase = 1; phase & kPhaseAlways; phase *= 2) {
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

int64_t longest_head_chunk(const EngineConfig& config, const MemoryLimit& limit, Backend& backend) {
  const int64_t tokens = config.shapes.batch * config.shapes.sequence;
  const MemoryLimit most = {limit.device - limit.device / 16, limit.host, limit.shared};
  EngineConfig longer = config;
  for (int64_t parts = 1; tokens / parts > config.shapes.head_chunk; parts *= 2) {
    longer.shapes.head_chunk = divide_up(tokens, parts);
    const MemoryPlan plan = Engine(longer, backend).plan();
    if (fits({plan.device_bytes(), plan.host_bytes()}, most)) return longer.shapes.head_chunk;
  }
  return config.shapes.head_chunk;
}

std::string settings_flags(const EngineConfig& config) {
  return "--micro-batch " + std::to_string(config.shapes.batch) + " --recompute " +
         name_of(kRecomputeNames, config.shapes.recompute) + " --head-chunk " +
         std::to_string(config.shapes.head_chunk) + " --gradient-blocks " +
         name_of(kGradientBlocksNames, config.gradients.blocks) + " --offload " + offload_name(config.offload) +
         (config.ranks > 1 ? " --shard " + name_of(kSpreadNames, config.spread) : "");
}

std::vector<Candidate> candidates(const EngineConfig& start, const SearchSpace& space, const Rates& rates,
                                  Backend& backend) {
  const BlockBytes bytes = block_bytes(start, backend);
  std::vector<Candidate> all;
  for (const int64_t batch : micro_batches(start, space)) {
    EngineConfig config = start;
    config.shapes.batch = batch;
    if (space.micro_batch)
      config.gradients.micro_batches =
          space.sequences_per_step > 0 ? static_cast<int>(space.sequences_per_step / batch) : 1;
    for (const auto& [blocks, blocks_name] : kGradientBlocksNames) {
      if (!space.gradient_blocks && blocks != start.gradients.blocks) continue;
      config.gradients.blocks = blocks;
      if (blocks != GradientBlocks::kWhole && !gradient_blocks_possible(config)) continue;
      for (const auto& [level, level_name] : kRecomputeNames) {
        if (!space.recompute && level != start.shapes.recompute) continue;
        config.shapes.recompute = level;
        for (const int64_t chunk : head_chunks(start, space, batch * start.shapes.sequence)) {
          config.shapes.head_chunk = chunk;
          for (const auto& [spread, spread_name] : kSpreadNames) {
            if (!space.spread && spread != start.spread) continue;
            config.spread = spread;
            for (const Offload& offload : offloads(start, space)) {
              if (spread != Spread::kNone && (offload.state || offload.weights)) continue;
              config.offload = offload;
              all.push_back({.config = config, .seconds = predict_step(config, rates, bytes)});
            }
          }
        }
      }
    }
  }
  // Equally fast ones: first what was tried first, which keeps more on the device and less of it.
  std::stable_sort(all.begin(), all.end(), [](const Candidate& a, const Candidate& b) {
    return a.seconds_per_token() < b.seconds_per_token();
  });
  return all;
}

std::vector<Candidate> fitting(const std::vector<Candidate>& candidates, const MemoryLimit& limit, size_t count,
                               Backend& backend) {
  // There may be thousands of candidates, and a plan of a large model takes milliseconds, so most of them are rejected
  // because the least of one of their groups was.
  const std::map<Group, const EngineConfig*> least = least_of_groups(candidates);
  std::map<const EngineConfig*, bool> too_large;
  const auto rejected = [&](const EngineConfig* config) {
    const auto [entry, unknown] = too_large.try_emplace(config, false);
    if (unknown) entry->second = !fits(least_bytes(Engine(*config, backend).declared()), limit);
    return entry->second;
  };
  std::vector<Candidate> found;
  for (const Candidate& candidate : candidates) {
    if (found.size() == count) break;
    const std::vector<Group> its = groups(candidate.config);
    if (std::any_of(its.begin(), its.end(), [&](const Group& group) { return rejected(least.at(group)); })) continue;
    const Candidate planned = with_bytes(candidate, backend);
    if (fits(planned.bytes(), limit)) found.push_back(planned);
  }
  return found;
}

std::optional<Candidate> smallest(const std::vector<Candidate>& candidates, const MemoryLimit& limit,
                                  Backend& backend) {
  std::optional<Candidate> best;
  const auto rank = [&](const Candidate& c) {
    return std::make_pair(!limit.shared && c.host_bytes > limit.host,
                          c.device_bytes + (limit.shared ? c.host_bytes : 0));
  };
  for (const auto& [group, config] : least_of_groups(candidates)) {
    if (std::get<1>(group) != 0) continue;  // a part of a family
    const Candidate candidate = with_bytes({.config = *config}, backend);
    if (!best || rank(candidate) < rank(*best)) best = candidate;
  }
  return best;
}
