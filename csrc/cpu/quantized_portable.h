// The product with a packed matrix of quantized survivors in plain C++.
#pragma once

#include "cpu/quantized_matrix.h"

namespace ace::cpu::portable {

ACE_HD float from_float(float value, float) { return value; }
ACE_HD Half from_float(float value, Half) { return to_half(value); }
ACE_HD BFloat16 from_float(float value, BFloat16) { return to_bfloat16(value); }

// The code at this place of a row, counted in codes from the row's byte `start`; 0 beyond the end.
template <int kBits, class T>
int code_at(const QuantizedMatrix<T>& matrix, int64_t start, int64_t place) {
  const int64_t byte = start + place * kBits / 8;
  if (byte >= matrix.bytes) return 0;
  const unsigned stored = matrix.codes[byte];
  if constexpr (kBits == 8) return static_cast<int8_t>(stored);
  const unsigned half = place % 2 ? stored >> 4 : stored & 15u;
  return static_cast<int>(half ^ 8u) - 8;
}

// Calls action(column, code) for every survivor of a row, by rising column.
template <int kBits, class T, class Action>
void each_code(const QuantizedMatrix<T>& matrix, int64_t row, int64_t first_word, int64_t last_word, int64_t* place,
               Action&& action) {
  const int64_t start = matrix.start(row);
  for (int64_t index = first_word; index < last_word; ++index)
    for (uint64_t bits = matrix.word(row, index); bits; bits &= bits - 1)
      action(index * kBitmapColumns + __builtin_ctzll(bits), code_at<kBits>(matrix, start, (*place)++));
}

// Tokens 0 to `tokens`, rows begin to end.
template <int kBits, class T>
void quantized_product(const QuantizedProduct<T, float>& product, int64_t tokens, int64_t begin, int64_t end) {
  const QuantizedMatrix<T>& matrix = product.matrix;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t t = 0; t < tokens; ++t) product.out[t * product.rows + row] = 0.0f;
    int64_t place = 0;
    for (int64_t group = 0; group < matrix.groups; ++group) {
      const int64_t first = group * matrix.group_words, last = std::min(matrix.words, first + matrix.group_words);
      const int64_t before = place;
      for (int64_t t = 0; t < tokens; ++t) {
        const float* x = product.token(t);
        float sum = 0.0f;
        place = before;
        each_code<kBits>(matrix, row, first, last, &place,
                         [&](int64_t column, int code) { sum += static_cast<float>(code) * x[column]; });
        product.out[t * product.rows + row] += matrix.scale(row, group) * sum;
      }
    }
  }
}

// Unpacks rows begin to end: out [end - begin, cols].
template <int kBits, class T>
void quantized_unpack(const QuantizedMatrix<T>& matrix, int64_t begin, int64_t end, int64_t cols, T* out) {
  for (int64_t row = begin; row < end; ++row, out += cols) {
    std::memset(static_cast<void*>(out), 0, sizeof(T) * static_cast<size_t>(cols));
    int64_t place = 0;
    each_code<kBits>(matrix, row, 0, matrix.words, &place, [&](int64_t column, int code) {
      const float scale = matrix.scale(row, column / kBitmapColumns / matrix.group_words);
      if (column < cols) out[column] = from_float(static_cast<float>(code) * scale, T{});
    });
  }
}

}  // namespace ace::cpu::portable
