// layer_stream.h: numbers that belong to the layers of a model (weights, optimizer states, activations), of which a few
// layers at a time are whole on the device. All of them are kept
//   in host memory: the next layer is copied in and a changed one copied back, on one copy stream or, with three slots
//   or more, on one for each direction at the same time, or
//   by the ranks of a run, each its part of every tensor (parallel/part.h), on its device: the next layer is gathered
//   from them, and of a changed one each keeps its part,
// while the compute stream works on the layer at hand.
//
// Device memory: `slots` times the largest layer, and the part. Traffic: every visit copies a layer in, every change
// copies it back; from ranks every visit gathers a layer, and a change costs a copy of the part on the device.
// The bits are those that a resident tensor would have.
//
// Ranks acquire and release the same layers in the same order, and write the same numbers to them.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/memory_plan.h"

class Communicator;

enum class Access : uint8_t {
  kRead,
  kUpdate,     // read and written
  kOverwrite,  // written in full before it is read, so that nothing has to be copied in
};

// Where what belongs to layers is, for those that stream it.
struct LayerPlace {
  int streamed_layers = 0;        // > 0: not on the device but for so many layers at a time
  Communicator* peers = nullptr;  // streamed: ranks keep what is a matrix; null: all of it is in host memory
  bool parts = false;             // with peers: an update changes a rank's part only
};

class LayerStream {
 public:
  // In which order layers are acquired, so which one is fetched ahead.
  enum class Order : uint8_t {
    kUpAndDown,  // in the direction of the last two, up to the ends
    kDown,       // from the last to the first
    kDownAgain,  // from the last to the first, then again from the last
  };

  // `peers` keep the layers; null: host memory does.
  LayerStream(std::string name, Category category, int layers, int slots, Order order, Backend& backend,
              Communicator* peers = nullptr);

  // One more tensor of a layer, which may be one more layer; `shape` without memory gives dtype and shape. Returns its
  // number within the layer.
  int add(int layer, const Tensor& shape);

  // What is kept of every layer, and the slots, alive in `phases`. Contents are undefined.
  void declare(MemoryPlan& plan, uint32_t phases);

  // acquire() makes the layer's tensors valid for operations on the compute stream, until its last release();
  // `changed` says that they were written to. Calls nest. At most slots - 1 other layers may be acquired.
  void acquire(int layer, Access access);
  void release(int layer, bool changed);

  // Tensor `number` of an acquired layer.
  Tensor tensor(int layer, int number) const;

  // Of layers that peers keep: this rank's elements of tensor `number`, [count], maybe none, where they are kept; no
  // acquire() is needed. part_changed(): they were written to, and what a slot holds of the layer is old.
  Tensor part(int layer, int number) const;
  void part_changed(int layer);

 private:
  // Elements, or scales, of a tensor: where they are in a slot, and where and how many bytes of them are kept.
  struct Piece {
    size_t offset, kept, kept_bytes;
  };
  struct Member {
    Tensor shape;
    Piece elements, scales;
  };
  struct Layer {
    std::vector<Member> members;
    std::vector<Piece> pieces;  // of all of them
    size_t bytes = 0, kept_bytes = 0;
    char* kept = nullptr;
    int slot = -1;  // where it is on the device
  };
  struct Slot {
    char* memory = nullptr;
    int layer = -1;
    int acquired = 0;                       // acquire() without release() so far
    bool changed = false;                   // since it was acquired
    bool old = false;                       // the parts have changed since
    bool loading = false, storing = false;  // copies that the compute stream has not waited for
    bool stored_beside = false;             // one back that the stream of copies in has not waited for
    int64_t ticket = 0;                     // of the last gather
    bool has_events = false;
    int used_event = 0, loaded_event = 0, stored_event = 0;
    uint64_t last_use = 0;
  };

  int ranks() const;
  Piece add_piece(Layer& layer, size_t kept_bytes) const;
  Tensor member_tensor(const Member& member, char* base, size_t Piece::*offset) const;
  int next_after(int layer);
  Slot* free_slot();
  void load(Slot& slot, int layer, bool copy);
  void gather(Slot& slot);
  void arrive(Slot& slot);
  void store(Slot& slot);
  void keep_part(Slot& slot);
  void forget(Slot& slot);
  void create_events(Slot& slot);
  // With two slots the one copy waits for the other anyway: a layer comes to where one goes.
  Stream copy_back() const { return slots_.size() > 2 ? Stream::kCopyBack : Stream::kCopy; }

  std::string name_;
  Category category_;
  Order order_;
  Backend& backend_;
  Communicator* peers_;
  std::vector<Layer> layers_;
  std::vector<Slot> slots_;
  int previous_ = 0, direction_ = 1;
  uint64_t clock_ = 0;
};

// Holds one layer of something at a time: a stream of layers, or a store with the same acquire() and release().
template <typename Layers>
class HeldLayer {
 public:
  explicit HeldLayer(Layers& layers) : layers_(layers) {}
  // After an exception nothing is written back: the device may be lost, and what is held half-changed.
  ~HeldLayer() {
    if (std::uncaught_exceptions() > exceptions_) return;
    try {
      release();
    } catch (const std::exception&) {
      // An error of the device stays with it and is reported by the next operation.
    }
  }
  HeldLayer(const HeldLayer&) = delete;
  HeldLayer& operator=(const HeldLayer&) = delete;

  void hold(int layer, Access access) {
    if (held_ && layer == layer_ && access == access_) return;
    release();
    layers_.acquire(layer, access);
    layer_ = layer;
    access_ = access;
    held_ = true;
  }

  void release() {
    if (held_) layers_.release(layer_, access_ != Access::kRead);
    held_ = false;
  }

  // Lets go of the layer without giving it back.
  void forget() { held_ = false; }

 private:
  Layers& layers_;
  int exceptions_ = std::uncaught_exceptions();
  bool held_ = false;
  int layer_ = 0;
  Access access_ = Access::kRead;
};
