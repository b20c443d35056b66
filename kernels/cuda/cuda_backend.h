// cuda_backend.h: the CUDA implementation of every operation, for sm_80 and later. Matmuls go to cuBLASLt, all other
// kernels are in this folder, one file per family; read the CPU version of an operation first. No atomics on floats and
// no order that depends on scheduling: the same inputs give the same bits. Two streams of operations, two of copies;
// nothing is allocated after construction but what allocate() is asked for.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "kernels/backend.h"

class CudaMatmul;  // matmul.h

class CudaBackend final : public Backend {
 public:
  // Throws std::runtime_error when there is no usable device.
  explicit CudaBackend(const CudaOptions& options);
  ~CudaBackend() override;

  cudaStream_t compute_stream() const { return lanes_[0].stream; }  // for side_stream.cu

  std::string name() const override;
  std::string description() const override;
  size_t memory_available() const override;
  size_t runtime_bytes() const override;
  size_t host_memory_available() const override;
  std::string host_memory_note() const override;
  double measure_peak_flops() override;
  void* allocate(size_t bytes) override;
  void release(void* memory) override;
  void* allocate_host(size_t bytes) override;
  void release_host(void* memory) override;
  size_t allocated_bytes() const override;
  size_t workspace_bytes(const KernelShapes& shapes) const override;
  void set_workspace(void* memory, size_t bytes, Stream stream) override;
  bool has_update_stream() const override { return true; }
  void on(Stream stream) override;
  void copy(void* destination, const void* source, size_t bytes, Stream stream) override;
  void fill(void* destination, int byte, size_t bytes) override;
  void synchronize() override;
  int create_event() override;
  void record(int event, Stream stream) override;
  void wait(int event, Stream stream) override;
  void synchronize_event(int event) override;
  bool can_capture() const override;
  void begin_capture() override;
  int end_capture() override;
  void abandon_capture() override;
  void replay(int graph) override;
  std::string tuning() const override;
  void set_tuning(const std::string& tuning) override;
  void end_tuning() override;
  std::string slow_products() const override;
  std::string distrust(const std::string& operation) override;

  void convert(Tensor out, Tensor in) override;
  void accumulate(Tensor accumulator, Tensor in, RandomKey key, const uint32_t* counter) override;
  void scale(std::span<const Tensor> tensors, const float* factor) override;
  void sum_squares(Tensor out, std::span<const Tensor> tensors, bool accumulate) override;
  void sum(Tensor out, Tensor x, float factor, bool accumulate) override;
  void restore_norm(Tensor x, const float* target_squares, const float* current_squares) override;
  void gate_on_finite(StepScalars* scalars, Tensor value) override;
  void clip_scale(StepScalars* scalars, const float* squares, float clip_norm) override;
  void increment(uint32_t* counter) override;
  void fill_normal(Tensor x, float mean, float stddev, RandomKey key) override;
  void fill_constant(Tensor x, float value) override;
  void embedding_forward(Tensor out, Tensor tokens, Tensor wte, Tensor wpe) override;
  void embedding_backward(Tensor dwte, bool accumulate_wte, Tensor dwpe, bool accumulate_wpe, Tensor dout,
                          const TokenGroups& groups, int64_t first_row) override;
  void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor in, Tensor weight, Tensor bias) override;
  void residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                  Tensor weight, Tensor bias) override;
  void layernorm_backward(Tensor din, Tensor dweight, Tensor dbias, bool accumulate_parameters, Tensor dout, Tensor in,
                          Tensor mean, Tensor rstd, Tensor weight) override;
  void matmul(Tensor out, Tensor a, Tensor b, const MatmulOptions& options) override;
  void bias_backward(Tensor dbias, Tensor dout, bool accumulate) override;
  void gelu_forward(Tensor out, Tensor in) override;
  void gelu_backward(Tensor d, Tensor dbias, Tensor in, bool accumulate) override;
  void attention_forward(Tensor out, Tensor lse, Tensor qkv, int heads) override;
  void attention_decode(Tensor out, Tensor qkv, int heads) override;
  void attention_backward(Tensor dqkv, Tensor dbias, Tensor dout, Tensor out, Tensor lse, Tensor qkv, int heads,
                          bool accumulate) override;
  void classifier(Tensor losses, Tensor logits, Tensor targets, int64_t vocabulary, float gradient_scale,
                  bool write_gradient, Tensor lse) override;
  void classifier_gradient(Tensor logits, Tensor targets, Tensor lse, int64_t first, int64_t vocabulary,
                           float gradient_scale) override;
  void generate_projection(Tensor projection, ProjectionKind kind, RandomKey key, const uint32_t* index) override;
  void factored_second_moment(Tensor row_state, Tensor col_state, Tensor row_scale, Tensor col_scale, Tensor grad,
                              float eps1, const StepScalars* scalars, SquaresTarget squares,
                              const ScaledProjection* projection) override;
  void factored_squares(Tensor row_squares, Tensor col_squares, Tensor grad, float eps1, bool accumulate) override;
  void factored_scales(Tensor row_state, Tensor col_state, Tensor row_scale, Tensor col_scale,
                       const StepScalars* scalars) override;
  void full_second_moment(Tensor grad, Tensor second_moment, float eps1, const StepScalars* scalars) override;
  void scale_rows_cols(const ScaledSum& sum, const ScaledSum* beside) override;
  void momentum_update(Tensor update, Tensor momentum, float beta1, const StepScalars* scalars) override;
  void scaled_momentum_update(Tensor update, Tensor momentum, Tensor row_scale, Tensor col_scale, float beta1,
                              const StepScalars* scalars, SquaresTarget squares) override;
  void ema(const MomentumAverage& average, const StepScalars* scalars) override;
  void apply_update(Tensor weight, Tensor master, Tensor update, const ApplyOptions& options,
                    const float* update_squares, const float* weight_squares, int64_t elements, RandomKey key,
                    const StepScalars* scalars, const MomentumAverage* average) override;
  void unfactored_update(std::span<const ParameterUpdate> parameters, const UnfactoredOptions& options,
                         const StepScalars* scalars, SquaresTarget squares) override;
  void adamw_update(std::span<const ParameterUpdate> parameters, const AdamWOptions& options,
                    const StepScalars* scalars, SquaresTarget squares) override;
  void sgd_update(std::span<const ParameterUpdate> parameters, float beta1, const StepScalars* scalars,
                  SquaresTarget squares) override;
  void quantize(Tensor out, Tensor in) override;
  void dequantize(Tensor out, Tensor in) override;
  void quantize_weight(Tensor out, Tensor in, RandomKey key, const StepScalars* scalars) override;
  void dequantize_weight(Tensor out, Tensor in) override;

 private:
  // Times an operation while a profiler is set: the compute stream is idle before and after.
  class Timed {
   public:
    Timed(CudaBackend& backend, const char* operation, double flops, double bytes);
    ~Timed();
    Timed(const Timed&) = delete;
    Timed& operator=(const Timed&) = delete;

   private:
    struct Idle {
      explicit Idle(CudaBackend& backend);
    };
    CudaBackend& backend_;
    const char* operation_;
    Idle idle_;
    Profiler::Scope scope_;  // ends after ~Timed() has waited for the device
  };

  // The first `bytes` of the workspace, for what one operation keeps between its own kernels. Operations run one after
  // another, so all of them (cuBLASLt, too) share it. Throws std::logic_error when there is not so much.
  template <typename T = void>
  T* scratch(size_t bytes) const {
    return static_cast<T*>(checked_scratch(bytes));
  }
  void* checked_scratch(size_t bytes) const;

  template <typename Launch>
  void for_parts(std::span<const ParameterUpdate> parameters, SquaresTarget squares, Launch&& launch_parts);

  bool in_pageable_block(void* memory) const;
  void check_earlier(cudaError_t status, const char* what) const;

  // A stream of operations and what belongs to it.
  struct Lane {
    cudaStream_t stream = nullptr;
    void* workspace = nullptr;
    size_t workspace_bytes = 0;
    unsigned* arrivals = nullptr;  // arrivals.cuh
  };
  void enter(const Lane& lane);
  cudaStream_t stream_of(Stream stream) const;
  cudaEvent_t event(int id) const { return events_.at(static_cast<size_t>(id)); }

  int device_ = 0;
  int architecture_ = 0;  // 80, 90, ...
  size_t multiprocessor_shared_bytes_ = 0;
  bool reaches_pageable_memory_ = false;  // the device by itself, without the driver's staging
  std::string description_;
  std::string failed_operation_;       // which one failed, when that is known
  Lane lanes_[2];                      // Stream::kCompute and kUpdate
  cudaStream_t copy_streams_[2] = {};  // Stream::kCopy and kCopyBack
  std::vector<cudaEvent_t> events_;
  std::vector<cudaGraphExec_t> graphs_;
  std::unique_ptr<CudaMatmul> matmul_;
  // After distrust(): no tensor-core kernels, no kernel that keeps a row of logits in shared memory.
  bool plain_attention_forward_ = false, plain_attention_backward_ = false, plain_classifier_ = false;
  // Of the lane that operations go to now.
  bool updating_ = false;
  cudaStream_t stream_ = nullptr;
  void* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
  unsigned* arrivals_ = nullptr;
  size_t allocated_ = 0;
  std::unordered_map<void*, size_t> device_blocks_;
  std::unordered_set<void*> pinned_blocks_;
  std::map<char*, size_t> pageable_blocks_;  // of allocate_host(), where page-locked memory was refused
  std::string host_memory_note_;
};
