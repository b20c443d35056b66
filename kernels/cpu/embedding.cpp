// embedding.cpp: token plus position embedding, forward and backward.
// Memory-bound. Backward has no atomics: the positions of a batch come grouped by token id, so one thread owns a row of
// dwte and adds its positions in order; dwpe is a sum over the batch, one thread to a position.
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"
#include "kernels/operands.h"

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

// Rows first_row .. of the table's gradient, one thread to a token. `sums()`: room for a row of fp32 on this thread.
template <typename Wte, typename Out, typename Sums>
void add_tokens(int threads, const Tensor& dwte, bool accumulate, const Tensor& dout, const TokenGroups& groups,
                int64_t first_row, Sums&& sums_of_thread) {
  const int32_t *ids = groups.ids.as<const int32_t>(), *starts = groups.starts.as<const int32_t>();
  const int32_t* positions = groups.positions.as<const int32_t>();
  const int64_t channels = dout.cols(), rows = dwte.rows();
  const int64_t distinct = std::find(ids, ids + dout.rows(), -1) - ids;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t k = 0; k < distinct; ++k) {
    const int64_t table_row = ids[k] - first_row;
    if (table_row < 0 || table_row >= rows) continue;
    float* const sums = sums_of_thread();
    Wte* const row = element<Wte>(dwte, table_row);
    start_row(sums, row, channels, accumulate);
    for (int32_t i = starts[k]; i < starts[k + 1]; ++i) add_to(sums, element<const Out>(dout, positions[i]), channels);
    store_row(row, sums, channels);
  }
}

template <typename Wpe, typename Out, typename Sums>
void add_positions(int threads, const Tensor& dwpe, bool accumulate, const Tensor& dout, Sums&& sums_of_thread) {
  const int64_t batch = dout.shape[0], sequence = dout.shape[1], channels = dout.cols();
  parallel_blocks(threads, dwpe.rows(), 8, [&](int64_t begin, int64_t end) {
    float* const sums = sums_of_thread();
    for (int64_t t = begin; t < end; ++t) {
      if (t >= sequence && accumulate) break;
      Wpe* const row = element<Wpe>(dwpe, t);
      start_row(sums, row, channels, accumulate);
      for (int64_t b = 0; b < batch && t < sequence; ++b) {
        add_to(sums, element<const Out>(dout, b * sequence + t), channels);
      }
      store_row(row, sums, channels);
    }
  });
}

}  // namespace

void CpuBackend::embedding_forward(Tensor out, Tensor tokens, Tensor wte, Tensor wpe) {
  check_embedding_forward(out, tokens, wte, wpe);
  const int64_t sequence = tokens.shape[1], channels = wte.cols();
  const Profiler::Scope scope(profiler, "embedding_forward", 0, 2.0 * static_cast<double>(out.bytes()));
  const int32_t* ids = tokens.as<const int32_t>();
  dispatch(out.dtype, wte.dtype, [&]<typename Out, typename Weight>() {
    parallel_blocks(threads_, out.rows(), rows_per_span(channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Out* row = element<Out>(out, i);
        const Weight *token = element<const Weight>(wte, ids[i]), *position = element<const Weight>(wpe, i % sequence);
#pragma omp simd
        for (int64_t j = 0; j < channels; ++j) row[j] = from_float<Out>(to_float(token[j]) + to_float(position[j]));
      }
    });
  });
}

void CpuBackend::embedding_backward(Tensor dwte, bool accumulate_wte, Tensor dwpe, bool accumulate_wpe, Tensor dout,
                                    const TokenGroups& groups, int64_t first_row) {
  check_embedding_backward(dwte, dwpe, dout, groups, first_row);
  const size_t row_bytes = static_cast<size_t>(dout.cols()) * sizeof(float);
  thread_scratch(row_bytes);  // an error must not be thrown inside a parallel loop
  const auto sums_of_thread = [&] { return thread_scratch(row_bytes); };
  const Profiler::Scope scope(profiler, "embedding_backward", 0,
                              embedding_backward_bytes(dwte, accumulate_wte, dwpe, dout));
  if (dwte) {
    if (!accumulate_wte) fill_constant(dwte, 0.0f);
    dispatch(dwte.dtype, dout.dtype, [&]<typename Wte, typename Out>() {
      add_tokens<Wte, Out>(threads_, dwte, accumulate_wte, dout, groups, first_row, sums_of_thread);
    });
  }
  if (dwpe) {
    dispatch(dwpe.dtype, dout.dtype, [&]<typename Wpe, typename Out>() {
      add_positions<Wpe, Out>(threads_, dwpe, accumulate_wpe, dout, sums_of_thread);
    });
  }
}
