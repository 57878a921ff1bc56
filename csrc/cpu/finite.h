// Vectorised checks that values are finite.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "check.h"
#include "core/scalar.h"
#include "cpu/dispatch.h"
#include "cpu/multiversion.h"

namespace ace::cpu {

template <class T>
ACE_MULTIVERSION bool all_finite(const T* values, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint32_t>(!is_finite(to_float(values[i])));
  return bad == 0;
}

// Raises for the first entry of a checked matrix that is not finite.
inline void check_finite_rows(std::string_view op, std::string_view argument, const at::Tensor& t) {
  with_scalar(t.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    for (int64_t i = 0; i < t.size(0); ++i) {
      if (!all_finite(data<T>(t) + i * t.stride(0), t.size(1))) refuse_not_finite(op, argument, t);
    }
  });
}

}  // namespace ace::cpu
