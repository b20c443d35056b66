// cosine_transform.cpp: the cosine transform, and the products with cosine projections that are made of it. Each column
// or row that is projected is read once and written once; what is done between is in the cache.
#include "kernels/cpu/cosine_transform.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numbers>

#include "kernels/cosine_projection.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/state_blocks.h"
#include "kernels/operands.h"

namespace {

constexpr int kRadices[] = {4, 2, 3, 5, 7};

// The factors of a length, in the order of the stages; empty where others are left.
std::vector<int> radices_of(int64_t length) {
  std::vector<int> radices;
  for (const int radix : kRadices) {
    for (; length % radix == 0; length /= radix) radices.push_back(radix);
  }
  return length == 1 ? radices : std::vector<int>{};
}

// `kRadix` numbers, `span` apart, are multiplied with their factors and become their Fourier transform.
template <int kRadix>
inline void butterfly(Lanes* x, int64_t span, const float* roots, const float* factors) {
  Lanes re[kRadix], im[kRadix];
  for (int q = 0; q < kRadix; ++q) {
    const Lanes &a = x[2 * q * span], &b = x[2 * q * span + 1];
    if (factors && q > 0) {
      const float cosine = factors[2 * q - 2], sine = factors[2 * q - 1];
      re[q] = a * cosine + b * sine;
      im[q] = b * cosine - a * sine;
    } else {
      re[q] = a;
      im[q] = b;
    }
  }
  const auto store = [&](int q, const Lanes& a, const Lanes& b) {
    x[2 * q * span] = a;
    x[2 * q * span + 1] = b;
  };
  if constexpr (kRadix == 2) {
    store(0, re[0] + re[1], im[0] + im[1]);
    store(1, re[0] - re[1], im[0] - im[1]);
  } else if constexpr (kRadix == 4) {
    const Lanes a = re[0] + re[2], b = im[0] + im[2], c = re[0] - re[2], d = im[0] - im[2];
    const Lanes e = re[1] + re[3], f = im[1] + im[3], g = re[1] - re[3], h = im[1] - im[3];
    store(0, a + e, b + f);
    store(1, c + h, d - g);
    store(2, a - e, b - f);
    store(3, c - h, d + g);
  } else {  // odd: x[q] and x[radix - q] have the same cosines and opposite sines
    constexpr int kHalf = kRadix / 2;
    Lanes sum_re = re[0], sum_im = im[0];
    for (int q = 1; q <= kHalf; ++q) {
      const Lanes r = re[q], i = im[q];
      re[q] += re[kRadix - q];
      im[q] += im[kRadix - q];
      re[kRadix - q] = r - re[kRadix - q];
      im[kRadix - q] = i - im[kRadix - q];
      sum_re += re[q];
      sum_im += im[q];
    }
    store(0, sum_re, sum_im);
    for (int k = 1; k <= kHalf; ++k) {
      Lanes even_re = re[0], even_im = im[0], odd_re = {}, odd_im = {};
      for (int q = 1; q <= kHalf; ++q) {
        const float cosine = roots[2 * (k * q % kRadix)], sine = roots[2 * (k * q % kRadix) + 1];
        even_re += re[q] * cosine;
        even_im += im[q] * cosine;
        odd_re += im[kRadix - q] * sine;
        odd_im += re[kRadix - q] * sine;
      }
      store(k, even_re + odd_re, even_im - odd_im);
      store(kRadix - k, even_re - odd_re, even_im + odd_im);
    }
  }
}

template <int kRadix>
void run_stage(Lanes* x, int64_t count, int64_t span, const float* roots) {
  const float* const all_factors = roots + 2 * kRadix;
  for (int64_t group = 0; group < count; group += kRadix * span) {
    if (span == 1) {
      butterfly<kRadix>(x + 2 * group, 1, roots, nullptr);
      continue;
    }
    const float* factors = all_factors;
    for (int64_t j = 0; j < span; ++j, factors += 2 * (kRadix - 1))
      butterfly<kRadix>(x + 2 * (group + j), span, roots, factors);
  }
}

// ---- from and to memory

// f(0) to f(count - 1); without a loop where there is one for each lane.
template <typename F>
inline void for_lanes(int64_t count, F&& f) {
  if (count == kLanes) {
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) f(l);
  } else {
    for (int l = 0; l < count; ++l) f(l);
  }
}

// A matrix whose columns are vectors, or else its rows.
template <typename T>
struct Vectors {
  Vectors(const Tensor& matrix, bool columns)
      : data(matrix.as<T>()),
        pitch(matrix.leading_dimension()),
        columns(columns),
        count(columns ? matrix.cols() : matrix.rows()),
        length(columns ? matrix.rows() : matrix.cols()) {}

  // From a number to that of the vector kLanes after it.
  int64_t next() const { return columns ? kLanes : kLanes * pitch; }
  T* at(int64_t row, int64_t column) const { return data + row * pitch + column; }

  T* data;
  int64_t pitch;
  bool columns;
  int64_t count, length;
};

// f(j, numbers j of vectors first .. first + count - 1). Those after them are asked for: of columns the hardware sees
// no order.
template <typename T, typename F>
void read_vectors(const Vectors<T>& from, int64_t first, int64_t count, F&& f) {
  if (from.columns) {
    for (int64_t j = 0; j < from.length; ++j) {
      const T* const numbers_at = from.at(j, first);
      __builtin_prefetch(numbers_at + from.next(), 0, 2);
      Lanes numbers;
      load_lanes(numbers, numbers_at, count);
      f(j, numbers);
    }
    return;
  }
  for (int64_t begin = 0; begin < from.length; begin += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, from.length - begin);
    SquareTile tile;
    for_lanes(count, [&](int l) {
      const T* const numbers_at = from.at(first + l, begin);
      __builtin_prefetch(numbers_at + from.next(), 0, 2);
      load_lanes(tile.rows[l], numbers_at, width);
    });
    for (int64_t l = count; l < kLanes; ++l) tile.rows[l] = Lanes{};
    transpose(tile);
    for_lanes(width, [&](int l) { f(begin + l, tile.rows[l]); });
  }
}

// The other way: f(numbers, j) makes them, put(numbers, row, column, count) takes a part of a row of the matrix.
template <typename T, typename F, typename Put>
void write_vectors(const Vectors<T>& to, int64_t first, int64_t count, F&& f, Put&& put) {
  if (to.columns) {
    for (int64_t j = 0; j < to.length; ++j) {
      Lanes numbers;
      f(numbers, j);
      put(numbers, j, first, count);
    }
    return;
  }
  for (int64_t begin = 0; begin < to.length; begin += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, to.length - begin);
    SquareTile tile;
    for_lanes(width, [&](int l) { f(tile.rows[l], begin + l); });
    for (int64_t l = width; l < kLanes; ++l) tile.rows[l] = Lanes{};
    transpose(tile);
    for_lanes(count, [&](int l) { put(tile.rows[l], first + l, begin, width); });
  }
}

double sum_of(const Lanes& values) {
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += values[l];
  return sum;
}

}  // namespace

bool CosineTransform::has_length(int64_t length) {
  return length >= 4 && length % 2 == 0 && !radices_of(length / 2).empty();
}

CosineTransform::CosineTransform(int64_t length) : length_(length) {
  const auto cosine_and_sine = [](std::vector<float>& out, int64_t numerator, int64_t denominator) {
    const double turn = static_cast<double>(numerator % denominator) / static_cast<double>(denominator);
    out.push_back(static_cast<float>(std::cos(2 * std::numbers::pi * turn)));
    out.push_back(static_cast<float>(std::sin(2 * std::numbers::pi * turn)));
  };
  const int64_t half = length / 2;
  // Of the numbers that a stage joins, the last one first, each has its own part of x: those of every radix-th number.
  places_.assign(static_cast<size_t>(half), 0);
  int64_t span = 1;
  for (const int radix : radices_of(half)) {
    stages_.push_back({radix, span, tables_.size()});
    for (int q = 0; q < radix; ++q) cosine_and_sine(tables_, q, radix);
    for (int64_t j = 0; j < span; ++j)
      for (int q = 1; q < radix; ++q) cosine_and_sine(tables_, j * q, span * radix);
    span *= radix;
  }
  for (int64_t n = 0; n < half; ++n) {
    int64_t rest = n;
    for (auto stage = stages_.rbegin(); stage != stages_.rend(); ++stage) {
      places_[static_cast<size_t>(n)] += static_cast<uint32_t>(rest % stage->radix * stage->span);
      rest /= stage->radix;
    }
  }
  for (int64_t j = 0; j < length; ++j) {  // the even numbers, then the odd ones from the last to the first
    const int64_t at = j % 2 == 0 ? j / 2 : length - 1 - j / 2;
    inputs_.push_back(2 * places_[static_cast<size_t>(at / 2)] + static_cast<uint32_t>(at % 2));
    outputs_.push_back(static_cast<uint32_t>(at) ^ 1u);
  }
  for (int64_t a = 0; a < 4 * length; ++a)
    cosines_.push_back(
        static_cast<float>(std::cos(std::numbers::pi * static_cast<double>(a) / (2.0 * static_cast<double>(length)))));
}

void CosineTransform::fourier(Lanes* x) const {
  const int64_t count = length_ / 2;
  for (const Stage& stage : stages_) {
    const float* const tables = tables_.data() + stage.tables;
    switch (stage.radix) {
      case 2: run_stage<2>(x, count, stage.span, tables); break;
      case 3: run_stage<3>(x, count, stage.span, tables); break;
      case 4: run_stage<4>(x, count, stage.span, tables); break;
      case 5: run_stage<5>(x, count, stage.span, tables); break;
      default: run_stage<7>(x, count, stage.span, tables);
    }
  }
}

// With z[n] = v[2 n] + i v[2 n + 1] of the reordered numbers v, Z their transform, k = f up to the half and d - f
// above, w = e^(-2 pi i k / d): V[k] = (1 - i w) / 2 Z[k] + (1 + i w) / 2 Z*[d/2 - k], and frequency f is Re(e^(-i pi f
// / 2 d) V[f]), where V[d - k] = V*[k].
CosineTransform::Frequency CosineTransform::frequency(uint32_t f) const {
  const uint32_t d = static_cast<uint32_t>(length_), half = d / 2, k = f <= half ? f : d - f;
  const auto cosine = [&](uint32_t a) { return cosines_[a % (4 * d)]; };
  const auto sine = [&](uint32_t a) { return cosine(a + 3 * d); };
  const float re = cosine(f), im = f <= half ? -sine(f) : sine(f);  // of V[k]'s factor
  const float w_re = cosine(4 * k), w_im = -sine(4 * k);
  const float amplitude = std::sqrt((f == 0 ? 0.25f : 0.5f) / static_cast<float>(d));  // half of the projection's
  const float a_re = 1 + w_im, a_im = -w_re, b_re = 1 - w_im, b_im = w_re;
  return {k % half,
          (half - k) % half,
          {amplitude * (re * a_re - im * a_im), -amplitude * (re * a_im + im * a_re),
           amplitude * (re * b_re - im * b_im), amplitude * (re * b_im + im * b_re)}};
}

const CosineTransform::Projection& CosineTransform::projection(const CosineProjection& p) {
  const CosineBasis basis = cosine_basis(length_);
  const PhiloxWords words = philox_block(p.key, *p.index, kPermutationBlock);
  projection_.frequencies.resize(static_cast<size_t>(p.rank));
  for (int64_t k = 0; k < p.rank; ++k)
    projection_.frequencies[static_cast<size_t>(k)] =
        frequency(cosine_frequency(basis, words, static_cast<uint32_t>(k)));
  projection_.signs.resize(static_cast<size_t>(length_));
  fill_signs(projection_.signs.data(), 0, length_, 1.0f, p.key, *p.index);
  return projection_;
}

// ---- operations

bool CpuBackend::transforms_cosines(int64_t rank, int64_t dimension) const {
  const int64_t doublings = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(dimension, 1) - 1));
  return rank >= 4 * doublings && rank <= dimension && CosineTransform::has_length(dimension);
}

CosineTransform& CpuBackend::cosine_transform(int64_t length) {
  std::unique_ptr<CosineTransform>& transform = cosine_transforms_[length];
  if (!transform) transform = std::make_unique<CosineTransform>(length);
  return *transform;
}

void CpuBackend::cosine_down(Tensor out, Tensor in, Tensor scale, const CosineProjection& p, bool accumulate) {
  check_cosine_down(out, in, scale, p);
  const Profiler::Scope scope(profiler, "cosine_down", 0, static_cast<double>(in.bytes() + out.bytes()));
  CosineTransform& transform = cosine_transform(p.of_rows ? in.rows() : in.cols());
  const CosineTransform::Projection& projection = transform.projection(p);
  const float* const scales = scale.as<float>();
  dispatch(out.dtype, in.dtype, [&]<typename Out, typename In>() {
    const Vectors<const In> from(in, p.of_rows);
    const Vectors<Out> to(out, p.of_rows);
    parallel_blocks(threads_, divide_up(from.count, kLanes), 1, [&](int64_t begin, int64_t end) {
      Lanes* const x =
          reinterpret_cast<Lanes*>(thread_scratch(static_cast<size_t>(transform.length()) * sizeof(Lanes)));
      for (int64_t first = begin * kLanes; first < std::min(from.count, end * kLanes); first += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, from.count - first);
        read_vectors(from, first, count, [&](int64_t j, const Lanes& numbers) {
          const float sign = projection.signs[static_cast<size_t>(j)];
          x[transform.input(j)] = numbers * (scales ? sign * scales[j] : sign);
        });
        transform.fourier(x);
        write_vectors(
            to, first, count,
            [&](Lanes& numbers, int64_t k) {
              transform.read(numbers, x, projection.frequencies[static_cast<size_t>(k)]);
            },
            [&](Lanes& numbers, int64_t row, int64_t column, int64_t width) {
              Out* const at = to.at(row, column);
              if (accumulate) {
                Lanes before;
                load_lanes(before, at, width);
                numbers += before;
              }
              store_lanes(at, width, numbers);
            });
      }
    });
  });
}

void CpuBackend::cosine_up(const ScaledSum& sum, Tensor in, const CosineProjection& p, float alpha,
                           SquaresTarget squares) {
  check_cosine_up(sum, in, p);
  const Tensor& out = sum.out;
  const Profiler::Scope scope(profiler, "cosine_up", 0, static_cast<double>(sum.in.bytes() + out.bytes() + in.bytes()));
  CosineTransform& transform = cosine_transform(p.of_rows ? out.rows() : out.cols());
  const CosineTransform::Projection& projection = transform.projection(p);
  const float *const rows = sum.row_scale.as<float>(), *const columns = sum.col_scale.as<float>();
  const bool keeps = !sum.in.empty();
  std::array<double, kMaxSumChunks> partials{};
  dispatch(out.dtype, in.dtype, [&]<typename Out, typename In>() {
    const Vectors<const In> from(in, p.of_rows);
    const Vectors<Out> to(out, p.of_rows);
    const int64_t vectors = to.count, strips = divide_up(vectors, kLanes), chunk = divide_up(strips, kMaxSumChunks);
    parallel_blocks(threads_, divide_up(strips, chunk), 1, [&](int64_t begin, int64_t end) {
      Lanes* const x =
          reinterpret_cast<Lanes*>(thread_scratch(static_cast<size_t>(transform.length()) * sizeof(Lanes)));
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t first = part * chunk * kLanes; first < std::min(vectors, (part + 1) * chunk * kLanes);
             first += kLanes) {
          const int64_t count = std::min<int64_t>(kLanes, vectors - first);
          std::fill_n(x, transform.length(), Lanes{});
          read_vectors(from, first, count, [&](int64_t k, const Lanes& numbers) {
            transform.add(x, projection.frequencies[static_cast<size_t>(k)], numbers);
          });
          transform.fourier(x);
          Lanes squared = {};  // of up to kAdded numbers a lane
          constexpr int64_t kAdded = 64;
          int64_t added = 0;
          write_vectors(
              to, first, count,
              [&](Lanes& numbers, int64_t j) {
                numbers = x[transform.output(j)] * (alpha * projection.signs[static_cast<size_t>(j)]);
              },
              [&](Lanes& numbers, int64_t row, int64_t column, int64_t width) {
                Out* const at = to.at(row, column);
                if (keeps) {
                  Lanes more;
                  load_lanes(more, at, width);
                  const float factor = rows ? sum.factor * rows[row] : sum.factor;
                  if (columns) {
                    Lanes column_factors;
                    load_lanes(column_factors, columns + column, width);
                    numbers += more * (column_factors * factor);
                  } else {
                    numbers += more * factor;
                  }
                }
                store_lanes(at, width, numbers);
                if (!squares.out) return;
                load_lanes(numbers, at, width);
                squared += numbers * numbers;
                if (++added % kAdded == 0) {
                  partials[static_cast<size_t>(part)] += sum_of(squared);
                  squared = Lanes{};
                }
              });
          partials[static_cast<size_t>(part)] += sum_of(squared);
        }
      }
    });
  });
  if (!squares.out) return;
  double total = squares.accumulate ? static_cast<double>(*squares.out) : 0.0;
  for (const double partial : partials) total += partial;
  *squares.out = static_cast<float>(total);
}
