// resident_store.cpp: see resident_store.h.
#include "model/resident_store.h"

namespace {

Tensor view(const Parameter& parameter, void* data, DType dtype, int64_t rows) {
  if (!parameter.matrix) return Tensor::of(data, dtype, {parameter.cols});
  return Tensor::of(data, dtype, {rows, parameter.cols});
}

}  // namespace

ResidentStore::ResidentStore(std::vector<Parameter> parameters, DType weight_dtype, bool master_weights)
    : parameters_(std::move(parameters)),
      weight_dtype_(weight_dtype),
      master_weights_(master_weights && weight_dtype != DType::kF32),
      weights_(parameters_.size()),
      masters_(parameters_.size()) {}

void ResidentStore::declare(MemoryPlan& plan) const {
  for (const Parameter& parameter : parameters_) {
    plan.add_tensor(parameter.name, Category::kWeights, weight_dtype_, parameter.padded_elements());
    if (master_weights_) {
      plan.add_tensor(parameter.name + ".master", Category::kWeights, DType::kF32, parameter.elements());
    }
  }
}

void ResidentStore::bind(Arena& arena, Backend& backend) {
  for (const Parameter& parameter : parameters_) {
    const Tensor padded = arena.tensor(parameter.name, weight_dtype_, {parameter.padded_rows, parameter.cols});
    weights_[parameter.index] = padded.data;
    const Tensor padding = padded.slice(parameter.rows, parameter.padded_rows - parameter.rows);
    if (padding.elements() > 0) backend.fill(padding.data, 0, padding.bytes());
    if (master_weights_) {
      masters_[parameter.index] =
          arena.tensor(parameter.name + ".master", DType::kF32, {parameter.rows, parameter.cols}).data;
    }
  }
}

Tensor ResidentStore::weight(const Parameter& parameter) {
  return view(parameter, weights_[parameter.index], weight_dtype_, parameter.rows);
}

Tensor ResidentStore::padded_weight(const Parameter& parameter) {
  return view(parameter, weights_[parameter.index], weight_dtype_, parameter.padded_rows);
}

Tensor ResidentStore::master(const Parameter& parameter) {
  if (!master_weights_) return {};
  return view(parameter, masters_[parameter.index], DType::kF32, parameter.rows);
}
