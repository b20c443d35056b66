// test_same_bits.cpp: results that have the same bits on every device, because each is a few correctly rounded
// operations in a fixed order: random numbers, elementwise updates, 8-bit states. Compared with the CPU's.
#include <cmath>

#include "tests/backends.h"
#include "tests/device_value.h"

namespace {

class SameBits : public OperationTest {};
INSTANTIATE_GPU_TESTS(SameBits, DType::kF32, DType::kBF16);

TEST_P(SameBits, NormalNumbers) {
  TestDevice device(backend()), cpu("cpu");
  for (uint64_t offset : {uint64_t{0}, uint64_t{2}, uint64_t{5}, (uint64_t{1} << 34) - 7}) {
    const RandomKey key{.seed = 11, .purpose = RandomPurpose::kInit, .tensor = 3, .offset = offset};
    const Tensor x = device.poisoned(dtype(), {50003}), expected = cpu.poisoned(dtype(), {50003});
    device->fill_normal(x, 0.5f, 0.02f, key);
    cpu->fill_normal(expected, 0.5f, 0.02f, key);
    EXPECT_TRUE(device.bits(x) == cpu.bits(expected)) << offset;
  }
}

TEST_P(SameBits, EntriesOfProjections) {
  for (ProjectionKind kind : {ProjectionKind::kGaussian, ProjectionKind::kRademacher, ProjectionKind::kCosine}) {
    TestDevice device(backend()), cpu("cpu");
    const DeviceValue<uint32_t> index(device, 3), cpu_index(cpu, 3);
    for (uint64_t offset : {0u, 3u, 4u, 123u, 130u}) {
      const RandomKey key{.seed = 21, .purpose = RandomPurpose::kProjection, .tensor = 77, .offset = offset};
      const Tensor p = device.poisoned(dtype(), {17, 331}), expected = cpu.poisoned(dtype(), {17, 331});
      device->generate_projection(p, kind, key, index.data());
      cpu->generate_projection(expected, kind, key, cpu_index.data());
      EXPECT_TRUE(device.bits(p) == cpu.bits(expected)) << offset;
    }
  }
}

// ---- optimizers

StepScalars scalars_of_step_3() {
  StepScalars s;
  s.lr = 0.01f, s.beta2 = 0.9f, s.step = 3;
  s.bias_correction1 = 0.3f, s.bias_correction2 = 0.2f;
  return s;
}

// The results of all elementwise operations on n elements that are `offset` elements into a parameter.
std::vector<uint8_t> update_bits(const std::string& backend, DType dtype, int64_t n, uint64_t offset) {
  std::vector<uint8_t> bits;
  for (DType state : {DType::kF32, DType::kBF16, DType::kI8}) {
    for (bool with_master : {false, true}) {
      TestDevice device(backend);
      const auto random = [&](uint32_t seed, DType type) { return device.random(seed, type, {n}); };
      const auto state_of = [&](uint32_t seed, DType type, bool negative) {
        Values numbers = device.read(random(seed, DType::kF32));
        if (!negative) {
          for (double& x : numbers) x = std::abs(x);  // of a root there would be a NaN, whose bits are no device's duty
        }
        const Tensor values = device.upload(numbers, DType::kF32, {n});
        if (type == DType::kF32) return values;
        const Tensor t = device.poisoned(type, {n});
        type == DType::kBF16 ? device->convert(t, values) : device->quantize(t, values);
        return t;
      };
      const RandomKey key{.seed = 17, .purpose = RandomPurpose::kWeightRounding, .tensor = 5, .offset = offset};
      const DeviceValue<StepScalars> s(device, scalars_of_step_3());
      const Tensor weight = random(1, dtype), grad = random(2, dtype), squares = device.random(3, DType::kF32, {2});
      const Tensor master = with_master ? random(1, DType::kF32) : Tensor{};
      const Tensor m = state_of(4, state, true), v = state_of(5, state == DType::kI8 ? DType::kU8 : DType::kF32, false);
      device->full_second_moment(grad, v, 1.0f, s.data());
      append_bits(device, bits, grad);
      device->momentum_update(grad, m, 0.9f, s.data());
      device->ema({.momentum = m, .in = grad, .beta1 = 0.8f}, s.data());
      append_bits(device, bits, m);
      device.write(squares, {static_cast<double>(n), 2.0 * static_cast<double>(n)});
      device->apply_update(weight, master, grad, {.weight_decay = 0.1f, .clip = 0.5f, .scale_parameter = true},
                           squares.as<float>(), squares.as<float>() + 1, n, key, s.data());
      ParameterUpdate update = {.weight = weight, .master = master, .momentum = m, .grad = grad, .key = key};
      device->sgd_update(update, 0.9f, s.data());
      update.second_moment = v;
      update.weight_decay = 0.1f;
      device->adamw_update(update, {}, s.data());
      device->accumulate(grad, weight, key, &s.data()->step);
      for (const Tensor& t : {weight, m, v, grad}) append_bits(device, bits, t);
      if (master) append_bits(device, bits, master);
    }
  }
  return bits;
}

TEST_P(SameBits, OptimizerUpdates) {
  for (int64_t n : {1, 255, 256, 5000}) {
    for (uint64_t offset : {0, 1, 6})
      EXPECT_TRUE(update_bits(backend(), dtype(), n, offset) == update_bits("cpu", dtype(), n, offset))
          << n << " elements from " << offset;
  }
}

// ---- 8-bit states

class SameCodes : public OperationTest {};
INSTANTIATE_GPU_TESTS(SameCodes, DType::kI8, DType::kU8);

// Codes and scales of numbers of all sizes, and what the finite ones among them are read as.
std::vector<uint8_t> quantized_bits(const std::string& backend, DType dtype) {
  TestDevice device(backend);
  const int64_t count = 10001;
  Values x = device.read(device.random(7, DType::kF32, {count}));
  for (size_t i = 0; i < x.size(); ++i) x[i] *= std::exp2(-static_cast<double>(i % 120));
  x[300] = 0.0, x[301] = -0.0, x[2000] = 3e38, x[5000] = INFINITY;
  const Tensor out = device.poisoned(dtype, {count});
  device->quantize(out, device.upload(x, DType::kF32, {count}));
  const Tensor finite = out.slice(0, 19 * kQuantBlock);  // 5000 lies in the block after
  const Tensor back = device.poisoned(DType::kF32, {finite.elements()});
  device->dequantize(back, finite);
  std::vector<uint8_t> bits;
  for (const Tensor& t : {out, back}) append_bits(device, bits, t);
  return bits;
}

// Square roots and divisions are correctly rounded everywhere.
// Codes and scales of weights, fresh and after an update that some of the scales stay for.
std::vector<uint8_t> weight_code_bits(const std::string& backend, int64_t count) {
  TestDevice device(backend);
  Values x = device.read(device.random(7, DType::kF32, {count}));
  for (size_t i = 0; i < x.size(); ++i) x[i] *= std::exp2(-static_cast<double>(i / kQuantBlock % 150));
  if (count > 1000) x[300] = 0.0, x[301] = -0.0, x[700] = INFINITY, x[900] = NAN;
  const Tensor in = device.poisoned(DType::kF32, {count});
  const Tensor out = device.poisoned(DType::kI8, {count});
  const RandomKey key{.seed = 1, .purpose = RandomPurpose::kWeightRounding, .tensor = 2, .offset = 11};
  const DeviceValue<StepScalars> s(device, scalars_of_step_3());
  std::vector<uint8_t> bits;
  device.write(in, x);
  device->quantize_weight(out, in, key, nullptr);
  append_bits(device, bits, out);
  for (size_t i = 0; i < x.size(); ++i) x[i] *= 0.8 + static_cast<double>(i / kQuantBlock % 7) * 0.1;
  device.write(in, x);
  device->quantize_weight(out, in, key, s.data());
  append_bits(device, bits, out);
  const Tensor finite = out.slice(std::min<int64_t>(count / kQuantBlock, 4) * kQuantBlock, count % kQuantBlock);
  const Tensor back = device.poisoned(DType::kBF16, {finite.elements()});
  device->dequantize_weight(back, finite);
  append_bits(device, bits, back);
  return bits;
}

TEST_P(SameCodes, OfWeights) {
  if (dtype() != DType::kI8) return;
  for (int64_t count : {1, 255, 257, 50001}) {
    EXPECT_TRUE(weight_code_bits(backend(), count) == weight_code_bits("cpu", count)) << count;
  }
}

TEST_P(SameCodes, OfAllSizes) { EXPECT_TRUE(quantized_bits(backend(), dtype()) == quantized_bits("cpu", dtype())); }

}  // namespace
