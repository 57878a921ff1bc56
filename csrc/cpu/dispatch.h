// From torch dtypes to the core's number types.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/scalar.h"

namespace ace::cpu {

// Calls action(T{}) with the core type of a checked weight or activation dtype.
template <class Action>
void with_scalar(at::ScalarType dtype, Action&& action) {
  switch (dtype) {
    case at::kHalf: return action(Half{});
    case at::kBFloat16: return action(BFloat16{});
    default: return action(float{});
  }
}

template <class T>
const T* data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The least number of rows for a thread: enough elements that scheduling costs little.
inline int64_t row_grain(int64_t cols) { return 1 + (int64_t{1} << 15) / (cols > 0 ? cols : 1); }

}  // namespace ace::cpu
