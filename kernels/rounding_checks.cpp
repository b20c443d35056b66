// rounding_checks.cpp: sums that are rounded at random and codes of 8 bits against their formulas; see checks.h.
#include "kernels/check_bench.h"
#include "kernels/checks.h"

namespace {

constexpr int64_t kMostNumbers = int64_t{1} << 20;

int64_t count_of(const CheckShapes& s) { return std::min(4 * s.channels * s.channels, kMostNumbers); }

// A sum in bf16, rounded at random.
Difference accumulate(Backend& backend, const CheckShapes& s) {
  CheckBench bench(backend);
  const int64_t count = count_of(s);
  const RandomMatrix sum = bench.normal(DType::kBF16, 1, count), added = bench.normal(s.gradients, 1, count);
  backend.accumulate(sum.tensor, added.tensor, {}, &bench.upload(StepScalars{})->rounding_counter);
  Comparison comparison;
  const std::vector<double> a = sum.row(0), b = added.row(0), result = bench.read(sum.tensor, 0);
  for (size_t i = 0; i < a.size(); ++i) comparison.add(result[i], a[i] + b[i], 0);
  comparison.require(bench.all_finite(sum.tensor));
  return comparison.allowing(rounding_of(DType::kBF16));
}

enum class Codes : uint8_t { kOfStates, kOfWeights, kOfUpdatedWeights };

// 8-bit codes, which the host decodes; `decode`: and the device, which must come to the same.
Difference codes(Backend& backend, const CheckShapes& s, Codes kind, bool decode) {
  CheckBench bench(backend);
  const int64_t count = count_of(s);
  const RandomMatrix x = bench.normal(DType::kF32, 1, count);
  const Tensor out = bench.poisoned(DType::kI8, {count}), decoded = bench.poisoned(s.activations, {count});
  const bool of_states = kind == Codes::kOfStates;
  if (of_states) {
    backend.quantize(out, x.tensor);
    if (decode) backend.dequantize(decoded, out);
  } else {
    backend.quantize_weight(out, x.tensor, {}, nullptr);
    if (kind == Codes::kOfUpdatedWeights) backend.quantize_weight(out, x.tensor, {}, bench.upload(StepScalars{}));
    if (decode) backend.dequantize_weight(decoded, out);
  }
  std::vector<int8_t> code(static_cast<size_t>(count));
  backend.copy(code.data(), out.data, out.bytes());
  const std::vector<double> scales = bench.read(Tensor::of(out.scales, DType::kF32, {quant_blocks(count)}), 0);
  const std::vector<double> by_device = decode ? bench.read(decoded, 0) : std::vector<double>();
  Comparison comparison;
  for (const int64_t block : spread(quant_blocks(count), 256)) {
    const int64_t begin = block * kQuantBlock, end = std::min(count, begin + kQuantBlock);
    const std::vector<double> numbers = x.numbers(0, begin, end - begin);
    double largest = 0;
    for (const double number : numbers) largest = std::max(largest, std::abs(number));
    for (int64_t i = begin; i < end; ++i) {
      const double scale = scales[static_cast<size_t>(block)], q = code[static_cast<size_t>(i)];
      const double value = of_states ? scale * q * std::abs(q) / (127.0 * 127.0) : scale * q;
      if (decode) {
        comparison.add(by_device[static_cast<size_t>(i)], value, 1e-3 * largest);
      } else {
        comparison.add(value, numbers[static_cast<size_t>(i - begin)], largest);
      }
    }
  }
  return comparison.allowing(decode ? rounding_of(s.activations) : 0.01);
}

}  // namespace

std::vector<Check> rounding_checks(const CheckShapes& s) {
  std::vector<Check> checks;
  const auto add = [&](const char* operation, const std::string& shape, auto function, auto... options) {
    checks.push_back({operation, shape, [=](Backend& backend) { return function(backend, s, options...); }});
  };
  const std::string numbers = shape_text({count_of(s)}) + " ";
  const std::string of_activations = numbers + dtype_name(s.activations);
  if (s.states == DType::kI8) {
    add("quantize", numbers + "fp32", codes, Codes::kOfStates, false);
    add("dequantize", of_activations, codes, Codes::kOfStates, true);
  }
  if (s.weight_codes) {
    add("quantize_weight", numbers + "fp32", codes, Codes::kOfWeights, false);
    add("quantize_weight", numbers + "fp32 updated", codes, Codes::kOfUpdatedWeights, false);
    add("dequantize_weight", of_activations, codes, Codes::kOfWeights, true);
  }
  add("accumulate", numbers + dtype_name(s.gradients) + " to bf16", accumulate);
  return checks;
}
