// cpu_backend.h: the CPU implementation of every operation. The plain-spoken one: read an operation here first.
// Matmuls go to oneDNN, everything else is OpenMP loops that the compiler vectorises. Sums over rows or elements are
// cut into chunks of a fixed size and added in order, so results do not depend on the number of threads or on
// scheduling.
#pragma once

#include <unordered_map>

#include "kernels/backend.h"

class CosineTransform;

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(const CpuOptions& options);
  ~CpuBackend() override;

  std::string name() const override;
  std::string description() const override;
  size_t memory_available() const override;
  size_t runtime_bytes() const override;
  size_t host_memory_available() const override;
  double measure_peak_flops() override;
  void* allocate(size_t bytes) override;
  void release(void* memory) override;
  void* allocate_host(size_t bytes) override;
  void release_host(void* memory) override;
  size_t allocated_bytes() const override;
  size_t workspace_bytes(const KernelShapes& shapes) const override;
  void set_workspace(void* memory, size_t bytes, Stream stream) override;
  void copy(void* destination, const void* source, size_t bytes, Stream stream) override;
  void fill(void* destination, int byte, size_t bytes) override;
  void synchronize() override;
  int create_event() override;
  void record(int event, Stream stream) override;
  void wait(int event, Stream stream) override;
  void synchronize_event(int event) override;
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
  bool transforms_cosines(int64_t rank, int64_t dimension) const override;
  void cosine_down(Tensor out, Tensor in, Tensor scale, const CosineProjection& projection, bool accumulate) override;
  void cosine_up(const ScaledSum& sum, Tensor in, const CosineProjection& projection, float alpha,
                 SquaresTarget squares) override;
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
  size_t room_for(size_t bytes) const;
  void check_threads();

  // Scratch of one thread, from the workspace the arena provides. Throws std::logic_error when `bytes` is more than
  // there is.
  float* thread_scratch(size_t bytes) const;

  // The same memory as one piece, for operations that do not use thread_scratch(): partial sums of all threads.
  float* shared_scratch(size_t bytes) const;

  CosineTransform& cosine_transform(int64_t length);

  void leave_squares(SquaresTarget target, const Tensor& x);
  void leave_squares(SquaresTarget target, std::span<const ParameterUpdate> parameters);
  void add_squares(const Tensor& row_sums, const Tensor& col_sums, const Tensor& grad, bool accumulate);

  int threads_;
  std::optional<bool> multiply_in_bf16_;  // products of two bf16 operands; empty: where it is faster than to widen them
  char* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
  size_t allocated_ = 0;
  bool threads_checked_ = false;
  bool heaps_are_mapped_ = false;  // each thread has allocated
  std::unordered_map<int64_t, std::unique_ptr<CosineTransform>>
      cosine_transforms_;  // by length d, some 40 d bytes each
  std::unordered_map<void*, size_t> device_blocks_, host_blocks_;
};

// What files of this folder share beside the operations themselves.

// Floats of attention's scratch per thread: one head's Q, K, V, their gradients and that of the output, and two tiles
// of T scores.
int64_t attention_scratch_floats(int64_t sequence, int64_t channels, int64_t heads);

// What matmul() does for a result of one row. Memory-bound: b is read once, where it is.
void matmul_row(const Tensor& out, const Tensor& a, const Tensor& b, const MatmulOptions& options, int threads);

// What add() does: out = a + b for `count` elements from (row, column) on, on the calling thread. The LayerNorm that
// adds its residual first calls it, too, so that both round the same way. fp32 or bf16, mixed; out may be a or b.
void add_row(const Tensor& out, const Tensor& a, const Tensor& b, int64_t row, int64_t column, int64_t count);
