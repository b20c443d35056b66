// backend.h: every operation the trainer needs, on one device. The abstract class that the CPU and the CUDA backend
// implement.
//
// Conventions. Tensors are row-major views; letters as everywhere: B batch, T sequence length, C channels, V
// vocabulary, NH heads, HD = C / NH. Outputs come first. Unless a comment says otherwise floating tensors may be fp32
// or bf16, activations, weights and gradients each their own; arithmetic and sums are fp32, and a result is rounded
// once, to nearest even, when stored. Operations run in order on the compute stream, unless on() says otherwise, and
// return before they are done (the CPU backend: when they are). Nothing allocates. Results depend only on inputs and
// the backend's options: no scheduling-dependent order of sums. A shape that does not fit throws std::logic_error (a
// bug of the caller), a failing device throws std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/philox.h"
#include "kernels/profiler.h"
#include "kernels/tensor.h"

// What changes from step to step, in device memory, so that a captured step can be replayed. Written by Backend::copy.
struct StepScalars {
  float lr = 0;                        // learning rate of this step, schedule applied
  float beta2 = 0;                     // decay of the second moment at this step
  float bias_correction1 = 1;          // 1 - beta1^t, AdamW
  float bias_correction2 = 1;          // 1 - beta2^t, AdamW
  float gradient_scale = 1;            // global-norm clipping: min(1, clip_norm / norm)
  uint32_t step = 0;                   // t = 1, 2, ...
  uint32_t projection_index = 0;       // floor((t - 1) / kappa): the projection the stored momentum is in
  uint32_t next_projection_index = 0;  // floor(t / kappa): the projection the momentum is in after this step
  uint32_t gate = 1;              // 0: a loss or gradient was not finite, every update leaves weights and state alone
  uint32_t rounding_counter = 0;  // of accumulate(): micro-batches since the start of the run
};

// For the embedding's backward pass without atomics: the positions of a batch grouped by token id, made on the host.
// All int32, N = B*T positions. ids[k] is the k-th distinct token (ascending; -1 past the last), its positions are
// positions[starts[k] .. starts[k+1]), ascending.
struct TokenGroups {
  Tensor ids;        // [N]
  Tensor starts;     // [N + 1]
  Tensor positions;  // [N]
};

struct MatmulOptions {
  bool transpose_a = false;  // a is [K, M] in memory
  bool transpose_b = false;  // b is [N, K] in memory
  bool accumulate = false;   // add to out instead of overwriting it
  float alpha = 1.0f;        // factor on the product
  Tensor bias = {};          // [N], added to every row of the product, or empty
};

enum class ProjectionKind : uint8_t { kGaussian, kRademacher, kCosine };
inline constexpr std::pair<ProjectionKind, const char*> kProjectionNames[] = {
    {ProjectionKind::kGaussian, "gaussian"},
    {ProjectionKind::kRademacher, "rademacher"},
    {ProjectionKind::kCosine, "cosine"}};

struct AdamWOptions {
  float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f;
};

// Of a parameter whose second moment is not factored, under Flora and Adafactor.
struct UnfactoredOptions {
  float eps1 = 1e-30f, beta1 = 0.0f;
  float clip = 1.0f;  // as in ApplyOptions
  bool scale_parameter = false;
  float eps2 = 1e-3f;
};

struct ApplyOptions {
  float weight_decay = 0.0f, lr_scale = 1.0f;
  float clip = 1.0f;             // on rms(update); 0 turns it off
  bool scale_parameter = false;  // multiply the learning rate by max(eps2, rms(weight))
  float eps2 = 1e-3f;
};

// Where an operation leaves the sum of the squares of what it reads or writes anyway: out[0] (fp32, device memory) = or
// += that sum, whatever the gate says. Nowhere when out is null.
struct SquaresTarget {
  float* out = nullptr;
  bool accumulate = false;
};

// A projection as generate_projection() makes it, and the same with column j times col_scale[j], which
// factored_second_moment() makes beside its scales.
struct ScaledProjection {
  Tensor plain, scaled;  // [r, d], of one dtype
  bool of_rows = false;  // d is the number of rows, and the row scales are meant; else the columns
  ProjectionKind kind = ProjectionKind::kGaussian;
  RandomKey key = {};
  const uint32_t* index = nullptr;
};

// A cosine projection [r, d] that is not made but multiplied with as the transform it is. Its numbers are those of
// generate_projection().
struct CosineProjection {
  int64_t rank = 0;
  bool of_rows =
      false;  // of [d, m] to [r, m]: the vectors are the columns; else of [n, d] to [n, r], they are the rows
  RandomKey key = {};
  const uint32_t* index = nullptr;
};

// Compressed momentum: M <- beta1 M + (1-beta1) S, S = in * row_scale[i] * col_scale[j] (empty: ones). M fp32, bf16 or
// int8, contiguous; `in` fp32 or bf16, contiguous.
struct MomentumAverage {
  Tensor momentum, in, row_scale = {}, col_scale = {};
  float beta1 = 0;
};

// out[i,j] = factor * in[i,j] * row_scale[i] * col_scale[j] + added[i,j]; an empty scale counts as ones, an empty
// `added` as zeros; out may be in or added. Matrices [n, m], each fp32 or bf16; scales [n] and [m], fp32.
struct ScaledSum {
  Tensor out, in = {}, row_scale = {}, col_scale = {};
  float factor = 1.0f;
  Tensor added = {};
};

// One of several parameters that are updated by one operation: whole tensors or parts of them, contiguous.
struct ParameterUpdate {
  Tensor weight, master = {};                // master (fp32): may be empty
  Tensor momentum = {}, second_moment = {};  // may be empty where the optimizer has none
  Tensor grad = {};                          // used up
  float weight_decay = 0.0f;
  float lr_scale = 1.0f;  // factor on the step's learning rate
  RandomKey key = {};     // of the rounding of the weight
};
// As many as one operation takes.
inline constexpr size_t kMostTogether = 16;

// The largest shapes a run will ask for: what workspace_bytes() is computed from.
struct KernelShapes {
  int64_t batch = 0, sequence = 0, channels = 0, heads = 0, vocabulary = 0;
  bool any_bf16 = false;  // some floating tensor is bf16
};

// kCopyBack: a second stream of copies, so that there can be one in each direction at a time. kUpdate: a second one of
// operations, see on().
enum class Stream : uint8_t { kCompute, kCopy, kCopyBack, kUpdate };

class Backend {
 public:
  virtual ~Backend() = default;

  // ---- the device

  virtual std::string name() const = 0;         // "cpu" or "cuda"
  virtual std::string description() const = 0;  // for the banner: model of the device, threads, library of products
  virtual size_t memory_available() const = 0;  // bytes a plan may take, what the runtime itself will need set aside
  // Bytes of the device's memory that the runtime takes beside allocate(), measured now. CPU: what of the process is
  // resident and was not given out, and what buffers of products and of files will still take. CUDA: what is in use and
  // was not given out, at most 1 GiB of it (others may use the device, too), and what kernels and graphs will still
  // take.
  virtual size_t runtime_bytes() const = 0;
  virtual size_t host_memory_available() const = 0;  // bytes that allocate_host() can still give
  // What a user should know about memory that allocate_host() gave out, as one line; empty when all is well.
  virtual std::string host_memory_note() const { return ""; }
  // FLOP/s of a large fp32 (CPU) or bf16 (CUDA) matmul on random data, measured now.
  virtual double measure_peak_flops() = 0;

  // Device memory. allocate() throws std::runtime_error naming the bytes when the device has no more.
  virtual void* allocate(size_t bytes) = 0;
  virtual void release(void* memory) = 0;
  // Pinned where the device can copy from it asynchronously; where the system refuses that, pageable:
  // host_memory_note().
  virtual void* allocate_host(size_t bytes) = 0;
  virtual void release_host(void* memory) = 0;
  virtual size_t allocated_bytes() const = 0;  // device memory given out by allocate() and not yet released

  // Scratch memory of the backend itself: how much the shapes need, and where it is (from the arena). Each stream of
  // operations has its own.
  virtual size_t workspace_bytes(const KernelShapes& shapes) const = 0;
  virtual void set_workspace(void* memory, size_t bytes, Stream stream = Stream::kCompute) = 0;

  // Operations from now on, with copies and fills on the compute stream, go to this stream: kCompute or, where it runs
  // beside that, kUpdate. Events keep the two apart.
  virtual bool has_update_stream() const { return false; }
  virtual void on(Stream /*stream*/) {}

  // Asynchronous copies in any direction between host and device memory; fill sets every byte. Host memory that is not
  // allocate_host()'s has been read when copy() returns.
  virtual void copy(void* destination, const void* source, size_t bytes, Stream stream = Stream::kCompute) = 0;
  virtual void fill(void* destination, int byte, size_t bytes) = 0;
  virtual void synchronize() = 0;  // the host waits for the compute stream
  // Events order the streams: `stream` goes on only after what `event` recorded is done. Event ids are small integers.
  virtual int create_event() = 0;
  virtual void record(int event, Stream stream) = 0;
  virtual void wait(int event, Stream stream) = 0;
  virtual void synchronize_event(int event) = 0;  // the host waits

  // A sequence of operations on the compute stream, recorded once and replayed at the cost of one call. While
  // capturing, operations are recorded and not run; nothing that makes the host wait is allowed. Graph ids are small
  // integers.
  virtual bool can_capture() const { return false; }
  virtual void begin_capture() {}
  virtual int end_capture() { return -1; }
  virtual void abandon_capture() {}  // after an exception
  virtual void replay(int /*graph*/) {}

  // What the device chose by measuring (matmul algorithms), as one line of text, empty when nothing; set_tuning() makes
  // another run of the same device choose the same, and so give the same bits. Ignores what does not fit.
  virtual std::string tuning() const { return ""; }
  virtual void set_tuning(const std::string& /*tuning*/) {}
  // From now on nothing is measured any more: what is new takes the first choice, which is the same in every run.
  virtual void end_tuning() {}

  // Matrix products that were computed in a way far slower than the device's own, and why, as one line; empty when
  // there were none.
  virtual std::string slow_products() const { return ""; }
  // The last result of an operation, by its name in a profile, was wrong: it is computed in another way from now on, a
  // product only where it is of the same kind. Returns what that is, in words; empty when there is no other way.
  virtual std::string distrust(const std::string& /*operation*/) { return ""; }

  Profiler* profiler = nullptr;  // when set, every operation is timed (the device is synchronized around it)

  // ---- elementwise and reductions

  virtual void convert(Tensor out, Tensor in) = 0;  // out = in, between fp32 and bf16; views may be strided
  // accumulator += in. With a bf16 accumulator the sum is rounded stochastically with the numbers of (key, *counter);
  // counter in device memory.
  virtual void accumulate(Tensor accumulator, Tensor in, RandomKey key, const uint32_t* counter) = 0;
  // x *= *factor (device memory), for each of several tensors; no pass over them when it is 1.
  virtual void scale(std::span<const Tensor> tensors, const float* factor) = 0;
  void scale(Tensor x, const float* factor) { scale(std::span<const Tensor>(&x, 1), factor); }
  // out[0] (fp32) = or += sum of x^2; of several tensors, one after another.
  virtual void sum_squares(Tensor out, std::span<const Tensor> tensors, bool accumulate) = 0;
  void sum_squares(Tensor out, Tensor x, bool accumulate) {
    sum_squares(out, std::span<const Tensor>(&x, 1), accumulate);
  }
  virtual void sum(Tensor out, Tensor x, float factor, bool accumulate) = 0;  // out[0] = or += factor * sum(x)
  // x *= sqrt(*target_squares / *current_squares); 1 when the current one is 0.
  virtual void restore_norm(Tensor x, const float* target_squares, const float* current_squares) = 0;
  // scalars->gate = 0 when value[0] (fp32) is infinite or NaN; otherwise unchanged.
  virtual void gate_on_finite(StepScalars* scalars, Tensor value) = 0;
  // Global-norm clipping: scalars->gradient_scale = min(1, clip_norm / (sqrt(*squares) + 1e-6)).
  virtual void clip_scale(StepScalars* scalars, const float* squares, float clip_norm) = 0;
  virtual void increment(uint32_t* counter) = 0;  // *counter += 1
  // x = mean + stddev * normal(key, counter 0), element by position.
  virtual void fill_normal(Tensor x, float mean, float stddev, RandomKey key) = 0;
  virtual void fill_constant(Tensor x, float value) = 0;

  // ---- the model

  // out[b,t,:] = wte[tokens[b,t],:] + wpe[t,:]. out [B,T,C], tokens [B,T] int32, wte [>=V,C], wpe [>=T,C]
  virtual void embedding_forward(Tensor out, Tensor tokens, Tensor wte, Tensor wpe) = 0;
  // dwte[id - first_row,:] (+)= sum of dout over the positions of id; dwpe[t,:] (+)= sum over b of dout[b,t,:]. Without
  // `accumulate` the rows that get no gradient are set to 0. dwte is rows first_row .. first_row + dwte.rows() - 1 of
  // the table's gradient: ids outside of it are skipped. One of dwte and dwpe may be empty: that half is left out.
  virtual void embedding_backward(Tensor dwte, bool accumulate_wte, Tensor dwpe, bool accumulate_wpe, Tensor dout,
                                  const TokenGroups& groups, int64_t first_row = 0) = 0;

  // LayerNorm of each row: out = (in - mean) * rstd * weight + bias, rstd = 1/sqrt(var + 1e-5), biased variance.
  // in, out [..., C]; mean, rstd fp32, one per row; weight, bias [C].
  virtual void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor in, Tensor weight, Tensor bias) = 0;
  // residual = a + b (rounded to its dtype), then out = LayerNorm of the *stored* residual: bit-identical to
  // add() followed by layernorm_forward(). residual may be a.
  virtual void residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                          Tensor weight, Tensor bias) = 0;
  // din += dLoss/din; dweight, dbias (+)= their gradients (fp32 sums over the rows, rounded once).
  virtual void layernorm_backward(Tensor din, Tensor dweight, Tensor dbias, bool accumulate_parameters, Tensor dout,
                                  Tensor in, Tensor mean, Tensor rstd, Tensor weight) = 0;

  // out[M,N] (+)= alpha * op(a)[M,K] op(b)[K,N] + bias. Any mix of fp32 and bf16; rows may be strided. A GPU multiplies
  // an fp32 operand that meets a bf16 one as bf16, rounded to nearest even.
  virtual void matmul(Tensor out, Tensor a, Tensor b, const MatmulOptions& options = {}) = 0;
  virtual void bias_backward(Tensor dbias, Tensor dout, bool accumulate) = 0;  // dbias[j] (+)= sum_i dout[i,j]

  // GELU, tanh form, of one dtype: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
  virtual void gelu_forward(Tensor out, Tensor in) = 0;
  // d[N, C] *= gelu'(in), in place and rounded, then dbias[C] (+)= its sums over the rows. d and in have one dtype.
  virtual void gelu_backward(Tensor d, Tensor dbias, Tensor in, bool accumulate) = 0;

  // Causal self-attention, softmax(Q K^T / sqrt(HD)) V for each head, on the packed projection.
  // qkv [B,T,3C]: Q, K, V one after another, each NH heads of HD; out [B,T,C]; lse [B,NH,T] fp32: log-sum-exp of a row.
  virtual void attention_forward(Tensor out, Tensor lse, Tensor qkv, int heads) = 0;
  // The last token's row of it alone, for one sequence whose projections are kept: out [C], qkv [T,3C].
  virtual void attention_decode(Tensor out, Tensor qkv, int heads) = 0;
  // dqkv [B,T,3C] is overwritten, dbias[3C] (+)= its sums over the tokens, as it is stored.
  virtual void attention_backward(Tensor dqkv, Tensor dbias, Tensor dout, Tensor out, Tensor lse, Tensor qkv, int heads,
                                  bool accumulate) = 0;

  // One chunk of tokens through softmax and cross-entropy. logits [n, Vp], only the first `vocabulary` columns count;
  // targets [n] int32, losses [n] fp32: losses[i] = -log softmax(logits[i])[targets[i]]. With write_gradient the logits
  // become gradient_scale * (softmax - onehot), 0 in the padding. A target of -1 has loss 0 and gradient 0. lse [n]
  // fp32, unless empty: log-sum-exp of each row, 0 where the target is -1.
  virtual void classifier(Tensor losses, Tensor logits, Tensor targets, int64_t vocabulary, float gradient_scale,
                          bool write_gradient, Tensor lse = {}) = 0;
  // The gradient of some columns, from logits that were computed again: logits [n, k] are columns first .. first + k -
  // 1 of all and become gradient_scale * (exp(logit - lse) - onehot), 0 in the padding and in rows with a target of -1.
  virtual void classifier_gradient(Tensor logits, Tensor targets, Tensor lse, int64_t first, int64_t vocabulary,
                                   float gradient_scale) = 0;

  // ---- optimizers

  // Everything below that changes weights or state does nothing when scalars->gate is 0. Formulas: docs/design.md.

  // projection [r, d] (fp32 or bf16), numbers of (key, *index): Gaussian N(0,1)/sqrt(r) or Rademacher +-1/sqrt(r),
  // element k*d + j; or, with r <= d, rows of a cosine transform with random signs, which are orthonormal
  // (cosine_projection.h).
  virtual void generate_projection(Tensor projection, ProjectionKind kind, RandomKey key, const uint32_t* index) = 0;

  // Whether cosine_down() and cosine_up() are there for projections of this shape, and faster than products with a
  // projection that is made.
  virtual bool transforms_cosines(int64_t /*rank*/, int64_t /*dimension*/) const { return false; }
  // out (+)= P diag(scale) in, [r, m] of [d, m] (of_rows); else out (+)= in diag(scale) P^T, [n, r] of [n, d]. scale
  // (fp32) may be empty.
  virtual void cosine_down(Tensor /*out*/, Tensor /*in*/, Tensor /*scale*/, const CosineProjection& /*projection*/,
                           bool /*accumulate*/ = false) {
    throw std::logic_error("cosine_down: not on this device");
  }
  // out = the scaled sum + alpha P^T in, [d, m] of [r, m] (of_rows), or + alpha in P, [n, d] of [n, r]. sum.in is empty
  // or out, sum.added is empty. `squares`: of out.
  virtual void cosine_up(const ScaledSum& /*sum*/, Tensor /*in*/, const CosineProjection& /*projection*/,
                         float /*alpha*/, SquaresTarget /*squares*/ = {}) {
    throw std::logic_error("cosine_up: not on this device");
  }

  // Factored second moment of grad [n, m]: row_state[i] <- beta2 row_state[i] + (1-beta2) mean_j(g^2 + eps1), col_state
  // alike; then row_scale[i] = rsqrt(row_state[i] / mean(row_state)), col_scale[j] = rsqrt(col_state[j]). All fp32.
  // beta2 is scalars->beta2. `squares`: of the gradient, summed from the row sums. `projection`: what else to make of
  // the scales, may be null.
  virtual void factored_second_moment(Tensor row_state, Tensor col_state, Tensor row_scale, Tensor col_scale,
                                      Tensor grad, float eps1, const StepScalars* scalars, SquaresTarget squares = {},
                                      const ScaledProjection* projection = nullptr) = 0;
  // The same in pieces, for a gradient that is never whole. First for each piece, some rows [k, m] of the matrix:
  // row_squares[i] = mean_j(g^2 + eps1) of these rows [k], col_squares[j] = or += sum_i(g^2 + eps1) over them [m]. All
  // fp32.
  virtual void factored_squares(Tensor row_squares, Tensor col_squares, Tensor grad, float eps1, bool accumulate) = 0;
  // Then once: row_scale [n] holds all row means, col_scale [m] the column sums over all n rows. row_state <- beta2
  // row_state + (1-beta2) row_scale, col_state <- beta2 col_state + (1-beta2) col_scale / n, and the scales as above.
  virtual void factored_scales(Tensor row_state, Tensor col_state, Tensor row_scale, Tensor col_scale,
                               const StepScalars* scalars) = 0;
  // V <- beta2 V + (1-beta2) (g^2 + eps1), then grad <- grad * rsqrt(V). V fp32 or uint8, as long as grad.
  virtual void full_second_moment(Tensor grad, Tensor second_moment, float eps1, const StepScalars* scalars) = 0;
  // `beside`: a smaller sum, of other tensors, in the same operation; may be null.
  virtual void scale_rows_cols(const ScaledSum& sum, const ScaledSum* beside = nullptr) = 0;
  // Uncompressed momentum: M <- beta1 M + (1-beta1) update; update <- M (before M is rounded). M fp32, bf16 or int8.
  virtual void momentum_update(Tensor update, Tensor momentum, float beta1, const StepScalars* scalars) = 0;
  // scale_rows_cols() of the update, in place, then momentum_update() unless the momentum is empty, in
  // one pass over a contiguous update; `squares`: of the update as it is left. When the gate is 0 none of it happens.
  virtual void scaled_momentum_update(Tensor update, Tensor momentum, Tensor row_scale, Tensor col_scale, float beta1,
                                      const StepScalars* scalars, SquaresTarget squares = {}) = 0;
  virtual void ema(const MomentumAverage& average, const StepScalars* scalars) = 0;
  // W <- W - lr' (weight_decay W + update / max(1, rms(update)/clip)), lr' = lr * max(eps2, rms(W)) with
  // scale_parameter, else lr; lr is lr_scale times the step's, here and below. The sums of squares (fp32 scalars in
  // device memory) belong to the whole parameter of `elements` elements; weight_squares may be null without
  // scale_parameter. With a master copy (fp32) the update goes to it and weight is its nearest rounding; without one a
  // bf16 weight is rounded stochastically with the numbers of (key, step). With an `average` ema() happens beside it.
  virtual void apply_update(Tensor weight, Tensor master, Tensor update, const ApplyOptions& options,
                            const float* update_squares, const float* weight_squares, int64_t elements, RandomKey key,
                            const StepScalars* scalars, const MomentumAverage* average = nullptr) = 0;
  // For each of several parameters: full_second_moment(), momentum_update() unless the momentum is empty, and
  // apply_update() with the sums of squares it asks for. `squares`: of the gradients, one after another.
  virtual void unfactored_update(std::span<const ParameterUpdate> parameters, const UnfactoredOptions& options,
                                 const StepScalars* scalars, SquaresTarget squares = {}) = 0;
  // AdamW, decoupled decay: m, v decayed averages of g and g^2; W <- W - lr (m^/(sqrt(v^) + eps) + weight_decay W).
  // m fp32, bf16 or int8, maybe empty; v fp32 or uint8. Rounding of W as in apply_update. `squares`: of the gradients.
  virtual void adamw_update(std::span<const ParameterUpdate> parameters, const AdamWOptions& options,
                            const StepScalars* scalars, SquaresTarget squares = {}) = 0;
  void adamw_update(const ParameterUpdate& parameter, const AdamWOptions& options, const StepScalars* scalars) {
    adamw_update(std::span<const ParameterUpdate>(&parameter, 1), options, scalars);
  }
  // W <- W - lr (weight_decay W + u); u = grad, or with beta1 > 0 the momentum m <- beta1 m + grad. m may be empty.
  virtual void sgd_update(std::span<const ParameterUpdate> parameters, float beta1, const StepScalars* scalars,
                          SquaresTarget squares = {}) = 0;
  void sgd_update(const ParameterUpdate& parameter, float beta1, const StepScalars* scalars) {
    sgd_update(std::span<const ParameterUpdate>(&parameter, 1), beta1, scalars);
  }

  // 8-bit states, blocks of kQuantBlock elements, s = the block's largest magnitude (0 in a block of zeros):
  //   int8:  code = round(127 sqrt(|x|/s)) with x's sign,        value = s * sign * (|code|/127)^2
  //   uint8: code = max(1, round(255 (x/s)^(1/4))), 0 for x = 0, value = s * (code/255)^4
  // Power laws, because a linear map rounds most second moments to zero; a positive one never becomes zero.
  virtual void quantize(Tensor out, Tensor in) = 0;    // `in` fp32 contiguous
  virtual void dequantize(Tensor out, Tensor in) = 0;  // out fp32 or bf16, in int8, uint8, fp32 or bf16

  // 8-bit weights: int8 codes, value = scale * code, |code| <= 127, blocks of kQuantBlock elements. `in` fp32, both
  // contiguous. With s the block's largest magnitude:
  //   scalars null:  scale = 1.125 s / 127, code = x / scale, rounded to nearest even. 0 in a block of zeros.
  //   else (update): the old scale stays where 0.5 < s / (127 scale) <= 1, or else is made anew as above; code =
  //                  floor(x / scale + u), at most 127; u the uniform number of (key, step) in [0, 1).
  // A scale that stays keeps weights that hardly moved from being rounded at random again: x / scale is then a whole
  // number, which has no other rounding. A number that is not finite makes its whole block NaN.
  virtual void quantize_weight(Tensor out, Tensor in, RandomKey key, const StepScalars* scalars) = 0;
  virtual void dequantize_weight(Tensor out, Tensor in) = 0;  // out fp32 or bf16, contiguous
};

struct CpuOptions {
  int threads = 0;                            // 0: as many as there are cores this process may use
  std::optional<bool> multiply_in_bf16 = {};  // two bf16 operands, where the processor can; empty: where that is faster
};

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options = {});

// Stands for a CUDA device that is not here, to plan a run on it: name(), workspace_bytes() and what operations there
// are are the CUDA backend's, memory_available() is 0 (unknown), runtime_bytes() an assumption (cuda_workspace.h).
// Throws std::runtime_error when asked to allocate or to measure.
std::unique_ptr<Backend> make_planning_backend();

struct CudaOptions {
  int device = 0;        // among those that this process sees
  bool tf32 = false;     // fp32 matmuls may round their inputs to 10 bits of mantissa
  bool autotune = true;  // time the best candidates for each matmul once; off: the library's first choice
};

// How many GPUs this process sees, usable or not; 0 without CUDA. Takes no memory on them.
int cuda_device_count();

// What no other GPU has: its UUID, in hexadecimal. "" where there is no such device.
std::string cuda_device_id(int device);

// Empty when this CUDA device can be used, otherwise why not, for a user to read: no CUDA in this build, no driver or
// one that is too old, no device, a device older than sm_80.
std::string cuda_unavailable(int device = 0);

// Empty when the CUDA backend can compute a model of so many channels and heads, otherwise why not, for a user to read.
// Known without a GPU.
std::string cuda_refuses(int64_t channels, int64_t heads);

// Throws std::runtime_error with cuda_unavailable()'s text when there is no usable device.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options = {});
