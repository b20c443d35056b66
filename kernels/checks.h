// checks.h: whether a device computes what it should: operations on random numbers, compared with their formulas in
// float64. A device that nobody has run this program on is checked before it trains, and `selftest` checks any.
//
// Inputs are normal random numbers that the host makes again where it needs them, so that nothing large is copied. Of
// large results some elements are compared, spread over rows and columns with the first and the last ones; attention is
// compared for whole heads. That no element of a result was left out is seen by the NaN that was there before.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/backend.h"

// The largest |result - formula|, as a part of the size of what was added up for it, and what rounding may make of it.
struct Difference {
  double largest = 0, allowed = 0;
  bool agrees() const { return largest <= allowed; }
};

// One operation at one shape.
struct Check {
  std::string operation;  // by its name in a profile
  std::string shape;      // and dtypes
  std::function<Difference(Backend&)> run;
};

// What the operations of a model are computed on.
struct CheckShapes {
  int64_t batch = 1, sequence = 1, channels = 8, heads = 1;
  int64_t vocabulary = 8, padded_vocabulary = 8, head_chunk = 1;
  DType weights = DType::kF32, activations = DType::kF32, gradients = DType::kF32;
  DType states = DType::kF32;  // of a momentum
  bool weight_codes = false;   // weights are stored in 8 bits
  int64_t rank = 0;            // of random projections
  ProjectionKind projection = ProjectionKind::kCosine;
  bool transforms = false;  // the device has transforms for projections of this rank and width
  bool tf32 = false;        // products of fp32 operands may round them
};

// Every operation of forward and backward passes, the ones that take longest first; those of updates; and what rounds
// at random or to 8 bits. Of operations whose rows are independent only some thousands of numbers are taken.
std::vector<Check> model_checks(const CheckShapes& shapes);
std::vector<Check> update_checks(const CheckShapes& shapes);
std::vector<Check> rounding_checks(const CheckShapes& shapes);
