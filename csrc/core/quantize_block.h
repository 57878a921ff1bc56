// The steps of GPTQ's recursion inside a block of columns (Frantar et al., arXiv 2210.17323), with the grid of
// ace_ext/grids.py: codes from -2^(bits-1) to 2^(bits-1) - 1 times a scale. Float32, each operation rounded once and in
// this order, so that all back ends give the same bits.
#pragma once

#include "core/scalar.h"

namespace ace {

struct CodeRange {
  float lowest, highest;

  ACE_HD explicit CodeRange(int bits)
      : lowest(-static_cast<float>(1 << (bits - 1))), highest(static_cast<float>((1 << (bits - 1)) - 1)) {}
};

// The code nearest to weight / scale, ties to even; 0 for a scale of 0. NaN stays NaN.
ACE_HD float nearest_code(float weight, float scale, CodeRange range) {
  if (scale == 0.0f) return 0.0f;
  float code = weight / scale;
  code = code < range.lowest ? range.lowest : code;
  code = code > range.highest ? range.highest : code;
  constexpr float kInteger = 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number
  return (code + kInteger) - kInteger;
}

// A point of the grid: the product is rounded to float32, then to T, the dtype of the scale.
template <class T>
ACE_HD float grid_value(float code, float scale) {
  T narrow;
  round_to(code * scale, &narrow);
  return to_float(narrow);
}

}  // namespace ace
