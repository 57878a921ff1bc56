// The product with a packed matrix of quantized survivors in plain C++.
#pragma once

#include <type_traits>

#include "cpu/quantized_matrix.h"

namespace ace::cpu::portable {

struct Quantized {
  using T = int8_t;
  static constexpr int kWidth = 8, kDecoded = 2;
  static constexpr float kUnit = 1.0f;
  struct Lanes {
    float lane[kWidth];
  };
  using Weights = Lanes;
  using Sums = Lanes;

  template <int kBits>
  static ACE_HD void decode(const uint8_t* codes, T* out) {
    if constexpr (kBits == 8) {
      std::memcpy(out, codes, kDecoded);
    } else {
      out[0] = static_cast<T>(((codes[0] & 15) ^ 8) - 8);
      out[1] = static_cast<T>(((codes[0] >> 4) ^ 8) - 8);
    }
  }
  static ACE_HD Sums zero() { return {}; }
  static ACE_HD Weights expand(const T* values, uint64_t bits) {
    Weights weights;
    for (int c = 0; c < kWidth; ++c) {
      const bool stored = bits >> c & 1u;
      weights.lane[c] = stored ? static_cast<float>(*values) : 0.0f;
      values += stored;
    }
    return weights;
  }
  static ACE_HD Sums add(Sums sums, const Weights& weights, const float* x) {
    for (int c = 0; c < kWidth; ++c) sums.lane[c] += weights.lane[c] * x[c];
    return sums;
  }
  static ACE_HD Sums plus(Sums a, const Sums& b) {
    for (int c = 0; c < kWidth; ++c) a.lane[c] += b.lane[c];
    return a;
  }
  static ACE_HD Sums add_scaled(Sums sums, float scale, const Sums& part) {
    for (int c = 0; c < kWidth; ++c) sums.lane[c] += scale * part.lane[c];
    return sums;
  }
  static ACE_HD float total(const Sums& sums) {
    float sum = 0.0f;
    for (int c = 0; c < kWidth; ++c) sum += sums.lane[c];
    return sum;
  }
  static ACE_HD void store_scaled(float* out, float scale, const Weights& weights) {
    for (int c = 0; c < kWidth; ++c) out[c] = scale * weights.lane[c] + 0.0f;
  }
};

#include "cpu/quantized_loop.inc"

}  // namespace ace::cpu::portable
