// matmul_staging.cu: products whose matrices cuBLASLt does not take as they are, or only without tensor cores: operands
// of different dtypes, a bf16 result of fp32 operands, a bias of another dtype, rows that do not begin at multiples of
// 16 bytes. They are computed in pieces of the result that fit a part of the workspace: what has to change is copied
// there first, the result back at the end.
// A copy is read again from the L2 cache, so what it costs is one more pass over the matrix in memory: for a gradient
// [n, m] that meets a projection of rank 256, 4 n m bytes beside 512 n m operations.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/views.cuh"
#include "kernels/cuda_workspace.h"

namespace {

// Of the workspace, beside what is left for the library.
constexpr size_t kStagingBytes = kCublasWorkspaceBytes - kStagedProductWorkspace;
constexpr int64_t kStep = 8;  // rows and columns of pieces: whole octets
constexpr int kCopyThreads = 256;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

Tensor matrix(void* data, DType dtype, int64_t rows, int64_t cols, int64_t pitch) {
  Tensor t = Tensor::of(data, dtype, {rows, cols});
  t.stride[0] = pitch;
  return t;
}

Tensor matrix(const Tensor& t) { return matrix(t.data, t.dtype, t.rows(), t.cols(), t.leading_dimension()); }

// Of op(matrix): some of its rows, or of its columns, that is.
Tensor across(const Tensor& t, bool rows_in_memory, int64_t begin, int64_t count) {
  return rows_in_memory ? t.slice(begin, count) : t.columns(begin, count);
}

size_t staged_bytes(DType dtype, int64_t rows, int64_t cols) {
  constexpr int64_t kAligned = 256;  // bytes
  return static_cast<size_t>(
      round_up(rows * round_up(cols, kStep) * static_cast<int64_t>(dtype_size(dtype)), kAligned));
}

// Memory-bound: one read, one write; number by number, for rows at odd addresses.
__global__ void __launch_bounds__(kCopyThreads) matmul_copy_kernel(AnyView out, AnyView in, int64_t cols) {
  const int64_t row = blockIdx.y, column = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (column < cols) out.store_one(row, column, in.load_one(row, column));
}

bool octets(const Tensor& a, const Tensor& b) {
  return (has_octet_rows(a) && has_octet_rows(b)) ||
         (a.contiguous() && b.contiguous() && begins_aligned(a) && begins_aligned(b));
}

void copy_matrix(const Tensor& out, const Tensor& in, cudaStream_t stream) {
  if (octets(out, in)) return convert_elements(out, in, stream);
  constexpr int64_t kMostRows = 65535;  // of a grid
  for (int64_t row = 0; row < out.rows(); row += kMostRows) {
    const int64_t rows = std::min(kMostRows, out.rows() - row);
    launch("matmul_copy", matmul_copy_kernel,
           {.grid = dim3(static_cast<unsigned>(divide_up(out.cols(), kCopyThreads)), static_cast<unsigned>(rows)),
            .block = dim3(kCopyThreads),
            .stream = stream},
           any_view(out.slice(row, rows)), any_view(in.slice(row, rows)), out.cols());
  }
}

}  // namespace

// Operands that differ meet in bf16, which tensor cores multiply; what is staged of a result is rounded once, at the
// end.
CudaMatmul::Staging CudaMatmul::staging(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias) {
  const auto is_odd = [](const Tensor& t) { return row_alignment(t) < kWideAccess; };
  Staging s;
  s.operands = a.dtype == b.dtype ? a.dtype : DType::kBF16;
  s.a = a.dtype != s.operands || is_odd(a);
  s.b = b.dtype != s.operands || is_odd(b);
  s.out = is_odd(out) || (s.operands == DType::kF32 && out.dtype != DType::kF32);
  s.result = s.out ? DType::kF32 : out.dtype;
  s.bias = !bias.empty() && (bias.dtype != s.result || !begins_aligned(bias));
  return s;
}

void CudaMatmul::run_in_pieces(const Tensor& whole_out, const Tensor& whole_a, const Tensor& whole_b,
                               const MatmulOptions& options, const Staging& s, void* workspace, cudaStream_t stream) {
  const Tensor out = matrix(whole_out), a = matrix(whole_a), b = matrix(whole_b);
  const int64_t M = out.rows(), N = out.cols(), K = options.transpose_a ? a.rows() : a.cols();
  int64_t m = M, n = N;  // of a piece
  const auto bytes_a = [&] {
    if (!s.a) return size_t{0};
    return options.transpose_a ? staged_bytes(s.operands, K, m) : staged_bytes(s.operands, m, K);
  };
  const auto bytes_b = [&] {
    if (!s.b) return size_t{0};
    return options.transpose_b ? staged_bytes(s.operands, n, K) : staged_bytes(s.operands, K, n);
  };
  const auto bytes_out = [&] { return s.out ? staged_bytes(s.result, m, n) : 0; };
  const auto bytes_bias = [&] { return s.bias ? staged_bytes(s.result, 1, n) : 0; };
  while (bytes_a() + bytes_b() + bytes_out() + bytes_bias() > kStagingBytes) {
    if (m <= kStep && n <= kStep) return run_plain(out, a, b, options, "too deep for the workspace", stream);
    int64_t& side = n <= kStep || (m > kStep && bytes_a() >= bytes_b()) ? m : n;
    side = round_up(divide_up(side, 2), kStep);
  }
  char* const room_a = static_cast<char*>(workspace) + kStagedProductWorkspace;
  char* const room_b = room_a + bytes_a();
  char* const room_out = room_b + bytes_b();
  char* const room_bias = room_out + bytes_out();
  // What stays where it is is passed on, what is staged is read from its place in the room.
  const auto in_room = [](char* room, bool staged, DType dtype, const Tensor& t) {
    return staged ? matrix(room, dtype, t.rows(), t.cols(), round_up(t.cols(), kStep)) : t;
  };
  for (int64_t row = 0; row < M; row += m) {
    const int64_t rows = std::min(m, M - row);
    const Tensor part_a = across(a, !options.transpose_a, row, rows);
    const Tensor ready_a = in_room(room_a, s.a, s.operands, part_a);
    if (s.a) copy_matrix(ready_a, part_a, stream);
    for (int64_t column = 0; column < N; column += n) {
      const int64_t cols = std::min(n, N - column);
      const Tensor part_b = across(b, options.transpose_b, column, cols);
      const Tensor ready_b = in_room(room_b, s.b, s.operands, part_b);
      if (s.b && (row == 0 || n < N)) copy_matrix(ready_b, part_b, stream);
      const Tensor part_out = out.slice(row, rows).columns(column, cols);
      const Tensor ready_out = in_room(room_out, s.out, s.result, part_out);
      if (s.out && options.accumulate) copy_matrix(ready_out, part_out, stream);
      MatmulOptions part = options;
      if (options.bias) {
        const Tensor bias = matrix(options.bias).columns(column, cols);
        part.bias = in_room(room_bias, s.bias, s.result, bias);
        if (s.bias) copy_matrix(part.bias, bias, stream);
      }
      if (!run_by_library(ready_out, ready_a, ready_b, part, {workspace, kStagedProductWorkspace}, stream))
        run_plain(ready_out, ready_a, ready_b, part, "cuBLASLt has no algorithm", stream);
      if (s.out) copy_matrix(part_out, ready_out, stream);
    }
  }
}
