// The product with a packed matrix in plain C++.
#pragma once

#include "cpu/packed_matrix.h"

namespace ace::cpu::portable {

template <class Value>
struct Plain {
  using T = Value;
  using X = float;
  static constexpr int kWidth = 8;
  static constexpr int far_rows(int) { return 1; }
  struct Lanes {
    float lane[kWidth];
  };
  using Weights = Lanes;
  using Sums = Lanes;

  static ACE_HD Sums zero() { return {}; }
  static ACE_HD Weights expand(const T* values, uint64_t bits) {
    Weights weights;
    for (int c = 0; c < kWidth; ++c) {
      const bool stored = bits >> c & 1u;
      weights.lane[c] = stored ? to_float(*values) : 0.0f;
      values += stored;
    }
    return weights;
  }
  static ACE_HD Sums add(Sums sums, const Weights& weights, const float* x) {
    for (int c = 0; c < kWidth; ++c) sums.lane[c] += weights.lane[c] * x[c];
    return sums;
  }
  static ACE_HD float total(const Sums& sums) {
    float sum = 0.0f;
    for (int c = 0; c < kWidth; ++c) sum += sums.lane[c];
    return sum;
  }
};

#include "cpu/packed_loop.inc"

// packed_unpack bit by bit, which needs no conversion back from float.
template <class T>
void unpack_bits(const PackedMatrix<T>& matrix, int64_t begin, int64_t end, int64_t cols, T* out) {
  for (int64_t row = begin; row < end; ++row, out += cols) {
    int64_t place = matrix.start(row);
    std::memset(static_cast<void*>(out), 0, sizeof(T) * static_cast<size_t>(cols));
    for (int64_t index = 0; index < matrix.words; ++index) {
      for (uint64_t bits = matrix.word(row, index); bits; bits &= bits - 1) {
        const int64_t column = index * kBitmapColumns + __builtin_ctzll(bits);
        if (column < cols && place < matrix.survivors) out[column] = matrix.values[place++];
      }
    }
  }
}

}  // namespace ace::cpu::portable
