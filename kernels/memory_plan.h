// memory_plan.h: the one declared list of allocations, its layout, and the arena that allocates exactly that list.
// Components declare from the configuration alone (no device needed): what it is called, how large it is, when it is
// alive, and which of their members is to point to it. The arena fills those in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
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
// bytes. Between steps an evaluation runs kForward and kHead, and a sample of text is a phase of its own, so that what
// it needs lies where a step has its activations and gradients.
enum Phase : uint32_t {
  kPhaseForward = 1,   // embedding and blocks
  kPhaseHead = 2,      // final LayerNorm's output to loss and the gradient of the head
  kPhaseBackward = 4,  // blocks and embedding backward; fused updates happen here, too
  kPhaseUpdate = 8,    // the optimizer after the last micro-batch
  kPhaseSample = 16,   // between steps: text from the model, what a checkpoint gathers
  kPhaseAlways = 31,   // survives from step to step
};

struct Allocation {
  std::string name;
  Category category;
  size_t bytes;                                 // as requested; the layout aligns the offset, not the size
  uint32_t phases;                              // set of Phase
  bool host = false;                            // in (pinned) host memory instead of on the device
  size_t offset = 0;                            // from the start of the arena, filled in by layout()
  std::function<void(void* memory)> allocated;  // called once by the arena
};

class MemoryPlan {
 public:
  static constexpr size_t kAlignment = 256;
  static size_t aligned(size_t offset) { return (offset + kAlignment - 1) / kAlignment * kAlignment; }

  // Declares a tensor under a unique name; int8 and uint8 ones get their scales as "<name>.scales". *tensor has dtype
  // and shape at once, and its memory as soon as an arena has allocated the plan: it has to stay where it is. Throws
  // std::logic_error for a name that exists already.
  void add(Tensor* tensor, const std::string& name, Category category, DType dtype,
           std::initializer_list<int64_t> shape, uint32_t phases = kPhaseAlways) {
    add(tensor, name, category, Tensor::of(nullptr, dtype, shape), phases);
  }
  // The same with dtype and shape of a tensor without memory.
  void add(Tensor* tensor, const std::string& name, Category category, const Tensor& shape,
           uint32_t phases = kPhaseAlways);

  // The same for bytes that are no tensor; *memory will be their address.
  template <typename T>
  void add(T** memory, const std::string& name, Category category, size_t bytes, uint32_t phases = kPhaseAlways,
           bool host = false) {
    add({.name = name,
         .category = category,
         .bytes = bytes,
         .phases = phases,
         .host = host,
         .allocated = [memory](void* address) { *memory = static_cast<T*>(address); }});
  }

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
  void add(Allocation allocation);

  std::vector<Allocation> allocations_;
  std::unordered_map<std::string, size_t> index_;
  size_t device_bytes_ = 0, host_bytes_ = 0;
  bool laid_out_ = false;
};

// Owns the memory of a plan: one device allocation, one host allocation, nothing else. Released in the destructor.
class Arena {
 public:
  // Allocates, and tells whoever declared something where it is; they have to be alive.
  Arena(Backend& backend, MemoryPlan plan);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  const MemoryPlan& plan() const { return plan_; }

 private:
  Backend& backend_;
  MemoryPlan plan_;
  void* device_ = nullptr;
  void* host_ = nullptr;
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
  void declare(MemoryPlan& plan) {
    if (elements_ > 0) plan.add(&memory_, name_, category_, dtype_, {elements_}, phases_);
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
