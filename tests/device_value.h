// device_value.h: one number or struct in a device's memory, as operations read step counters and scalars.
#pragma once

#include "tests/backends.h"

template <typename T>
class DeviceValue {
 public:
  explicit DeviceValue(TestDevice& device, const T& value = T{})
      : device_(device), memory_(device.poisoned(DType::kI32, {static_cast<int64_t>(sizeof(T) / 4)})) {
    static_assert(sizeof(T) % 4 == 0);
    set(value);
  }

  void set(const T& value) {
    device_->copy(memory_.data, &value, sizeof(T));
    device_->synchronize();
  }
  T get() const {
    T value;
    device_->copy(&value, memory_.data, sizeof(T));
    device_->synchronize();
    return value;
  }
  T* data() const { return static_cast<T*>(memory_.data); }

 private:
  TestDevice& device_;
  Tensor memory_;
};
