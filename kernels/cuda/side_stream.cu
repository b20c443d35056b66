// side_stream.cu: see side_stream.h. Two events for each piece of work that is under way, used again once it is not.
#include "kernels/side_stream.h"

#include <map>
#include <mutex>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"

namespace {

class CudaSideStream final : public SideStream {
 public:
  explicit CudaSideStream(CudaBackend& backend) : compute_(backend.compute_stream()) {
    check_cuda(cudaGetDevice(&device_), "asking for the device");
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  }

  ~CudaSideStream() override {
    cudaStreamSynchronize(stream_);
    for (const auto& [name, piece] : under_way_) free_.push_back(piece);
    for (const Piece& piece : free_) {
      for (cudaEvent_t event : {piece.begin, piece.end}) cudaEventDestroy(event);
    }
    cudaStreamDestroy(stream_);
  }

  void* handle() const override { return stream_; }

  int64_t begin() override {
    const Piece piece = take();
    check_cuda(cudaEventRecord(piece.begin, compute_), "recording an event");
    check_cuda(cudaStreamWaitEvent(stream_, piece.begin, 0), "waiting for an event");
    const std::lock_guard lock(mutex_);
    under_way_[++last_] = piece;
    return last_;
  }

  void end() override {
    check_cuda(cudaEventRecord(under_way_.at(last_).end, stream_), "recording an event");
    const std::lock_guard lock(mutex_);
    under_way_.at(last_).ended = true;
  }

  // Only this thread changes under_way_, which it may read without the lock: CUDA's calls can take long.
  void compute_waits_for(int64_t name) override {
    const auto piece = under_way_.find(name);
    if (piece == under_way_.end()) return;
    check_cuda(cudaStreamWaitEvent(compute_, piece->second.end, 0), "waiting for an event");
  }

  bool has_begun(int64_t name) const override {
    cudaSetDevice(device_);
    const std::lock_guard lock(mutex_);
    const auto piece = under_way_.find(name);
    return piece == under_way_.end() || has_happened(piece->second.begin);
  }

  bool is_done(int64_t name) const override {
    cudaSetDevice(device_);
    const std::lock_guard lock(mutex_);
    const auto piece = under_way_.find(name);
    return piece == under_way_.end() || (piece->second.ended && has_happened(piece->second.end));
  }

 private:
  struct Piece {
    cudaEvent_t begin = nullptr, end = nullptr;
    bool ended = false;
  };

  // Of events there are as many as can be under way, and some more, so that the device is not asked each time.
  Piece take() {
    const std::lock_guard lock(mutex_);
    while (free_.empty() && under_way_.size() > kEnough && has_happened(under_way_.begin()->second.end)) {
      free_.push_back({under_way_.begin()->second.begin, under_way_.begin()->second.end});
      under_way_.erase(under_way_.begin());
    }
    if (!free_.empty()) {
      const Piece piece = free_.back();
      free_.pop_back();
      return piece;
    }
    Piece piece;
    for (cudaEvent_t* event : {&piece.begin, &piece.end})
      check_cuda(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "creating an event");
    return piece;
  }

  static bool has_happened(cudaEvent_t event) {
    if (cudaEventQuery(event) == cudaSuccess) return true;
    cudaGetLastError();  // "not ready" is none
    return false;
  }

  static constexpr size_t kEnough = 64;

  const cudaStream_t compute_;
  int device_ = 0;  // a thread that only asks would else use the first one
  cudaStream_t stream_ = nullptr;
  std::vector<Piece> free_;

  mutable std::mutex mutex_;  // of what follows
  std::map<int64_t, Piece> under_way_;
  int64_t last_ = 0;
};

}  // namespace

std::unique_ptr<SideStream> make_side_stream(Backend& backend) {
  return std::make_unique<CudaSideStream>(dynamic_cast<CudaBackend&>(backend));
}
