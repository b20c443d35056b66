// embedding.cpp: token plus position embedding, forward and backward.
// Memory-bound. Backward has no atomics: the positions of a batch come grouped by token id, so one thread owns a row of
// dwte and adds its positions in order; dwpe is a sum over the batch, one thread to a position.
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

namespace {

// Starts sums of one gradient row at 0 or at what is there.
template <typename T>
void start_row(float* sums, const T* row, int64_t channels, bool accumulate) {
  for (int64_t j = 0; j < channels; ++j) sums[j] = accumulate ? to_float(row[j]) : 0.0f;
}

template <typename T>
void add_to(float* sums, const T* row, int64_t channels) {
#pragma omp simd
  for (int64_t j = 0; j < channels; ++j) sums[j] += to_float(row[j]);
}

template <typename T>
void store_row(T* row, const float* sums, int64_t channels) {
#pragma omp simd
  for (int64_t j = 0; j < channels; ++j) row[j] = from_float<T>(sums[j]);
}

}  // namespace

void CpuBackend::embedding_forward(Tensor out, Tensor tokens, Tensor wte, Tensor wpe) {
  require(tokens.dtype == DType::kI32 && tokens.rank == 2, "embedding: tokens [B, T] int32");
  const int64_t sequence = tokens.shape[1], channels = wte.cols();
  require(out.rows() == tokens.elements() && out.cols() == channels && wpe.cols() == channels, "embedding: shapes");
  require(wpe.rows() >= sequence, "embedding: fewer positions than the sequence has");
  require(has_uniform_rows(out) && tokens.contiguous(), "embedding: rows of a view must have one stride");
  const Profiler::Scope scope(profiler, "embedding_forward", 0, 2.0 * static_cast<double>(out.bytes()));
  const int32_t* ids = tokens.as<const int32_t>();
  dispatch(out.dtype, [&]<typename Out>() {
    dispatch(wte.dtype, wpe.dtype, [&]<typename Wte, typename Wpe>() {
      parallel_blocks(threads_, out.rows(), rows_per_span(channels), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          Out* row = element<Out>(out, i);
          const Wte* token = element<const Wte>(wte, ids[i]);
          const Wpe* position = element<const Wpe>(wpe, i % sequence);
#pragma omp simd
          for (int64_t j = 0; j < channels; ++j) row[j] = from_float<Out>(to_float(token[j]) + to_float(position[j]));
        }
      });
    });
  });
}

void CpuBackend::embedding_backward(Tensor dwte, bool accumulate_wte, Tensor dwpe, bool accumulate_wpe, Tensor dout,
                                    const TokenGroups& groups) {
  require(dout.rank == 3 && has_uniform_rows(dout), "embedding: dout [B, T, C]");
  const int64_t batch = dout.shape[0], sequence = dout.shape[1], channels = dout.cols(), count = batch * sequence;
  require(dwte.cols() == channels && dwpe.cols() == channels && dwpe.rows() >= sequence, "embedding: shapes");
  require(groups.ids.elements() == count && groups.positions.elements() == count, "embedding: token groups");
  const size_t row_bytes = static_cast<size_t>(channels) * sizeof(float);
  thread_scratch(row_bytes);  // an error must not be thrown inside a parallel loop
  const Profiler::Scope scope(
      profiler, "embedding_backward", 0,
      3.0 * static_cast<double>(dout.bytes()) + (accumulate_wte ? 0.0 : static_cast<double>(dwte.bytes())));
  if (!accumulate_wte) fill_constant(dwte, 0.0f);
  const int32_t *ids = groups.ids.as<const int32_t>(), *starts = groups.starts.as<const int32_t>();
  const int32_t* positions = groups.positions.as<const int32_t>();
  dispatch(dwte.dtype, dout.dtype, [&]<typename Wte, typename Out>() {
    const int64_t distinct = std::find(ids, ids + count, -1) - ids;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads_)
    for (int64_t k = 0; k < distinct; ++k) {
      float* const sums = thread_scratch(row_bytes);
      Wte* const row = element<Wte>(dwte, ids[k]);
      start_row(sums, row, channels, accumulate_wte);
      for (int32_t i = starts[k]; i < starts[k + 1]; ++i) {
        add_to(sums, element<const Out>(dout, positions[i]), channels);
      }
      store_row(row, sums, channels);
    }
  });
  dispatch(dwpe.dtype, dout.dtype, [&]<typename Wpe, typename Out>() {
    parallel_blocks(threads_, dwpe.rows(), 8, [&](int64_t begin, int64_t end) {
      float* const sums = thread_scratch(row_bytes);
      for (int64_t t = begin; t < end; ++t) {
        if (t >= sequence && accumulate_wpe) break;
        Wpe* const row = element<Wpe>(dwpe, t);
        start_row(sums, row, channels, accumulate_wpe);
        for (int64_t b = 0; b < batch && t < sequence; ++b) {
          add_to(sums, element<const Out>(dout, b * sequence + t), channels);
        }
        store_row(row, sums, channels);
      }
    });
  });
}
