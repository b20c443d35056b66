// memory_plan.cpp: the layout of planned allocations and the arena that holds them. Costs at most O(n^2) comparisons in
// the number of allocations (a few thousand), once per run.
#include "kernels/memory_plan.h"

#include <algorithm>
#include <array>
#include <map>
#include <stdexcept>
#include <utility>

#include "kernels/backend.h"

const char* category_name(Category category) {
  switch (category) {
    case Category::kWeights: return "weights";
    case Category::kOptimizerState: return "optimizer state";
    case Category::kGradients: return "gradients";
    case Category::kActivations: return "activations";
    case Category::kWorkspace: return "workspace";
  }
  return "?";
}

namespace {

// Greedy first fit, largest first: every allocation takes the lowest aligned offset at which it touches no allocation
// of a common phase that has its place already. Returns the extent. The layers of a model are alike, so most
// allocations have the size and the phases of one before: the search goes on from that one's place, below which there
// was no room.
size_t place(std::vector<Allocation>& allocations, bool host) {
  std::vector<size_t> order;
  for (size_t i = 0; i < allocations.size(); ++i) {
    if (allocations[i].host != host) continue;
    allocations[i].offset = 0;
    if (allocations[i].bytes > 0) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return allocations[a].bytes > allocations[b].bytes; });

  struct Place {
    size_t offset, end;
    uint32_t phases;
  };
  const auto before = [](const Place& place, size_t offset) { return place.offset < offset; };
  std::vector<Place> placed;         // by offset
  std::map<uint32_t, size_t> alike;  // by phases: where the last one of this size was placed
  size_t extent = 0, bytes = 0;
  for (size_t i : order) {
    Allocation& allocation = allocations[i];
    if (std::exchange(bytes, allocation.bytes) != allocation.bytes) alike.clear();
    size_t offset = alike[allocation.phases];
    for (auto other = std::lower_bound(placed.begin(), placed.end(), offset, before); other != placed.end(); ++other) {
      if ((other->phases & allocation.phases) == 0) continue;
      if (offset + bytes <= other->offset) break;
      offset = std::max(offset, other->end);
    }
    allocation.offset = alike[allocation.phases] = offset;
    extent = std::max(extent, offset + bytes);
    placed.insert(std::lower_bound(placed.begin(), placed.end(), offset, before),
                  {offset, MemoryPlan::aligned(offset + bytes), allocation.phases});
  }
  return extent;
}

}  // namespace

void MemoryPlan::add(Allocation allocation) {
  if (!index_.emplace(allocation.name, allocations_.size()).second)
    throw std::logic_error("memory plan: " + allocation.name + " is declared twice");
  if ((allocation.phases & kPhaseAlways) == 0)
    throw std::logic_error("memory plan: " + allocation.name + " is alive in no phase");
  allocations_.push_back(std::move(allocation));
  laid_out_ = false;
}

void MemoryPlan::add(Tensor* tensor, const std::string& name, Category category, const Tensor& shape, uint32_t phases) {
  *tensor = shape;
  add(&tensor->data, name, category, shape.bytes(), phases);
  if (shape.dtype == DType::kI8 || shape.dtype == DType::kU8)
    add(&tensor->scales, name + ".scales", category,
        static_cast<size_t>(quant_blocks(shape.elements())) * sizeof(float), phases);
}

void MemoryPlan::layout() {
  if (laid_out_) return;
  device_bytes_ = place(allocations_, false);
  host_bytes_ = place(allocations_, true);
  laid_out_ = true;
}

const Allocation* MemoryPlan::find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &allocations_[found->second];
}

size_t MemoryPlan::device_bytes() const {
  if (!laid_out_) throw std::logic_error("memory plan: device_bytes() before layout()");
  return device_bytes_;
}

size_t MemoryPlan::host_bytes() const {
  if (!laid_out_) throw std::logic_error("memory plan: host_bytes() before layout()");
  return host_bytes_;
}

std::vector<size_t> MemoryPlan::bytes_by_category() const {
  if (!laid_out_) throw std::logic_error("memory plan: bytes_by_category() before layout()");
  struct Edge {
    size_t offset;
    int category;
    int change;
  };
  std::vector<Edge> edges;
  for (const Allocation& allocation : allocations_) {
    if (allocation.host || allocation.bytes == 0) continue;
    const int category = static_cast<int>(allocation.category);
    edges.push_back({allocation.offset, category, 1});
    edges.push_back({allocation.offset + allocation.bytes, category, -1});
  }
  std::sort(edges.begin(), edges.end(), [](const Edge& a, const Edge& b) { return a.offset < b.offset; });

  // Sweep over the arena with the number of allocations of each category that cover the current byte.
  std::vector<size_t> bytes(kCategoryCount, 0);
  std::array<int, kCategoryCount> covering{};
  size_t position = 0;
  for (const Edge& edge : edges) {
    const auto first = std::find_if(covering.begin(), covering.end(), [](int count) { return count > 0; });
    const size_t owner = first == covering.end() ? static_cast<size_t>(Category::kWorkspace)
                                                 : static_cast<size_t>(first - covering.begin());
    bytes[owner] += edge.offset - position;
    position = edge.offset;
    covering[static_cast<size_t>(edge.category)] += edge.change;
  }
  return bytes;
}

Arena::Arena(Backend& backend, MemoryPlan plan) : backend_(backend), plan_(std::move(plan)) {
  plan_.layout();
  if (plan_.device_bytes() > 0) device_ = backend_.allocate(plan_.device_bytes());
  try {
    if (plan_.host_bytes() > 0) host_ = backend_.allocate_host(plan_.host_bytes());
  } catch (...) {
    if (device_) backend_.release(device_);
    throw;
  }
  for (const Allocation& allocation : plan_.allocations())
    allocation.allocated(static_cast<char*>(allocation.host ? host_ : device_) + allocation.offset);
}

Arena::~Arena() {
  if (device_) backend_.release(device_);
  if (host_) backend_.release_host(host_);
}
