// A packed matrix of quantized survivors and one product with it: the data of the loops of every instruction set.
#pragma once

#include "cpu/packed_matrix.h"

namespace ace::cpu {

// The layout of ops/quantized.h. A wrong bitmap or row_start must not make a reader leave the tensors: a row begins
// inside `codes`, and code that reads `width` bytes from a place checks `whole` first.
template <class T>
struct QuantizedMatrix {
  const uint8_t* bitmap;  // [rows, 8 words]
  int64_t words;
  const uint8_t* codes;  // [bytes]
  int64_t bytes;
  const int64_t* row_start;  // [rows + 1], or null: row i begins at byte i * keep
  int64_t keep;
  const T* scales;  // [rows, groups]
  int64_t groups;
  int64_t group_words;  // words of the bitmap that share a scale

  ACE_HD uint64_t word(int64_t row, int64_t index) const {
    uint64_t bits;
    std::memcpy(&bits, bitmap + 8 * (row * words + index), sizeof bits);
    return bits;
  }
  ACE_HD int64_t start(int64_t row) const {
    const int64_t place = row_start ? row_start[row] : row * keep;
    return place < 0 ? 0 : place > bytes ? bytes : place;
  }
  // Whether `width` bytes can be read from this place.
  ACE_HD bool whole(int64_t place, int64_t width) const { return place + width <= bytes; }
  // Copies those of the `width` bytes that exist; the others become 0.
  ACE_HD void copy(int64_t place, int width, uint8_t* target) const {
    const int64_t left = bytes - place < width ? bytes - place : width;
    std::memset(target, 0, static_cast<size_t>(width));
    if (left > 0) std::memcpy(target, codes + place, static_cast<size_t>(left));
  }
  ACE_HD float scale(int64_t row, int64_t group) const { return to_float(scales[row * groups + group]); }
};

// One product: x [tokens, 64 words], zero beyond the columns, tokens `stride` inputs apart; out [tokens, rows].
template <class T, class X>
struct QuantizedProduct {
  QuantizedMatrix<T> matrix;
  const X* x;
  int64_t stride;
  float* out;
  int64_t rows;
  ACE_HD const X* token(int64_t t) const { return x + t * stride; }
};

}  // namespace ace::cpu
