// cosine_transform.h: the discrete cosine transform (DCT-II) of vectors of one length, some of its frequencies or their
// sum, of many vectors at a time: what products with a cosine projection (kernels/cosine_projection.h) are without the
// projection.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/lanes.h"

// The transform of length d is a Fourier transform of d/2 complex numbers (Makhoul, "A fast cosine transform in one and
// two dimensions", IEEE Transactions on Acoustics, Speech and Signal Processing 28, 1980), 2.5 d log2(d) operations,
// and four products for each frequency that is wanted. Work is done in x [d], where a complex number takes two places.
//
//   frequencies of v:           x[input(j)] = v[j] for all j, fourier(x), then read(x, frequency)
//   sum of some frequencies:    x = 0, add(x, frequency, amount) for each, fourier(x), then v[j] = x[output(j)]
class CosineTransform {
 public:
  // A frequency f is weights . (x[2 first], x[2 first + 1], x[2 second], x[2 second + 1]) after the Fourier transform,
  // its amplitude (cosine_projection.h) included.
  struct Frequency {
    uint32_t first, second;
    float weights[4];
  };

  // Even, and no prime factor above 7 in its half.
  static bool has_length(int64_t length);

  explicit CosineTransform(int64_t length);

  int64_t length() const { return length_; }
  uint32_t input(int64_t j) const { return inputs_[static_cast<size_t>(j)]; }
  uint32_t output(int64_t j) const { return outputs_[static_cast<size_t>(j)]; }
  void fourier(Lanes* x) const;

  void read(Lanes& out, const Lanes* x, const Frequency& f) const {
    const Lanes *a = x + 2 * f.first, *b = x + 2 * f.second;
    out = a[0] * f.weights[0] + a[1] * f.weights[1] + (b[0] * f.weights[2] + b[1] * f.weights[3]);
  }
  // The transpose of all of read(): the Fourier transform, too, which is its own with real and imaginary parts
  // exchanged.
  void add(Lanes* x, const Frequency& f, const Lanes& amount) const {
    Lanes *a = x + 2 * places_[f.first], *b = x + 2 * places_[f.second];
    a[1] += amount * f.weights[0];
    a[0] += amount * f.weights[1];
    b[1] += amount * f.weights[2];
    b[0] += amount * f.weights[3];
  }

  // What a projection consists of: its frequencies and the signs of its columns.
  struct Projection {
    std::vector<Frequency> frequencies;  // [r]
    std::vector<float> signs;            // [d]
  };
  // In memory of this object: the next call overwrites what this one returned.
  const Projection& projection(const CosineProjection& p);

 private:
  struct Stage {
    int radix;
    int64_t span;   // how far apart the numbers of a butterfly are
    size_t tables;  // in tables_: radix roots of unity, then the factors of each butterfly of a span
  };

  Frequency frequency(uint32_t f) const;

  int64_t length_;
  std::vector<Stage> stages_;
  std::vector<float> tables_;     // cosines and sines, one after another
  std::vector<float> cosines_;    // of a / (4 d) of a turn, [4 d]
  std::vector<uint32_t> places_;  // where the Fourier transform expects complex number n, [d/2]
  std::vector<uint32_t> inputs_, outputs_;
  Projection projection_;
};
