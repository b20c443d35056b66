// memory_plan.h: the one declared list of allocations, its layout, and the arena that allocates exactly that list.
// Components declare by name from the configuration alone (no device needed) and later bind the same names to memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/tensor.h"

class Backend;

enum class Category : uint8_t { kWeights, kOptimizerState, kGradients, kActivations, kWorkspace };
inline constexpr int kCategoryCount = 5;
const char* category_name(Category category);

// The phases of a training step. An allocation is alive in a set of phases; two whose sets are disjoint may share
// bytes. Evaluation and sampling run kForward and kHead between steps.
enum Phase : uint32_t {
  kPhaseForward = 1,   // embedding and blocks
  kPhaseHead = 2,      // final LayerNorm's output to loss and the gradient of the head
  kPhaseBackward = 4,  // blocks and embedding backward; fused updates happen here, too
  kPhaseUpdate = 8,    // the optimizer after the last micro-batch
  kPhaseAlways = 15,   // survives from step to step
};

struct Allocation {
  std::string name;
  Category category;
  size_t bytes;       // as requested; the layout aligns the offset, not the size
  uint32_t phases;    // set of Phase
  bool host = false;  // in (pinned) host memory instead of on the device
  size_t offset = 0;  // from the start of the arena, filled in by layout()
};

class MemoryPlan {
 public:
  static constexpr size_t kAlignment = 256;
  static size_t aligned(size_t offset) { return (offset + kAlignment - 1) / kAlignment * kAlignment; }

  // Declares `bytes` under a unique name. Throws std::logic_error for a name that exists already.
  void add(const std::string& name, Category category, size_t bytes, uint32_t phases = kPhaseAlways, bool host = false);

  // Declares a tensor of `elements`; int8 and uint8 tensors get their scales as "<name>.scales".
  void add_tensor(const std::string& name, Category category, DType dtype, int64_t elements,
                  uint32_t phases = kPhaseAlways);

  // Assigns offsets so that allocations with a common phase never overlap. Deterministic; called once, by the arena and
  // by printing.
  void layout();

  const std::vector<Allocation>& allocations() const { return allocations_; }
  const Allocation* find(const std::string& name) const;
  size_t device_bytes() const;  // extent of the device arena after layout()
  size_t host_bytes() const;

  // Bytes of the device arena charged to each category; they add up to device_bytes(). A byte shared over time is
  // charged to the first category (in enum order) that uses it, alignment gaps to kWorkspace.
  std::vector<size_t> bytes_by_category() const;

 private:
  std::vector<Allocation> allocations_;
  std::unordered_map<std::string, size_t> index_;
  size_t device_bytes_ = 0, host_bytes_ = 0;
  bool laid_out_ = false;
};

// Owns the memory of a plan: one device allocation, one host allocation, nothing else. Released in the destructor.
class Arena {
 public:
  Arena(Backend& backend, MemoryPlan plan);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Memory declared under `name`. Throws std::logic_error when the name is unknown or `bytes` is not what was declared.
  void* bytes(const std::string& name, size_t bytes);
  Tensor tensor(const std::string& name, DType dtype, std::initializer_list<int64_t> shape);

  // Declared names that nobody bound: an empty list proves that the plan holds nothing but what is used.
  std::vector<std::string> unbound() const;
  const MemoryPlan& plan() const { return plan_; }

 private:
  Backend& backend_;
  MemoryPlan plan_;
  void* device_ = nullptr;
  void* host_ = nullptr;
  std::vector<bool> bound_;
};

// A buffer that parameters of different sizes take turns to use: as large as the largest of them, alive in the phases
// of all.
class Scratch {
 public:
  Scratch(const char* name, DType dtype, uint32_t phases, Category category = Category::kWorkspace)
      : name_(name), dtype_(dtype), category_(category), phases_(phases) {}

  void reserve(int64_t elements, uint32_t more_phases = 0) {
    elements_ = elements > elements_ ? elements : elements_;
    phases_ |= more_phases;
  }
  void declare(MemoryPlan& plan) const {
    if (elements_ > 0) plan.add_tensor(name_, category_, dtype_, elements_, phases_);
  }
  void bind(Arena& arena) {
    if (elements_ > 0) memory_ = arena.tensor(name_, dtype_, {elements_});
  }
  Tensor tensor(std::initializer_list<int64_t> shape) const {
    return Tensor::of(memory_.data, dtype_, shape, memory_.scales);
  }
  void* data() const { return memory_.data; }

 private:
  const char* name_;
  DType dtype_;
  Category category_;
  uint32_t phases_;
  int64_t elements_ = 0;
  Tensor memory_;
};
