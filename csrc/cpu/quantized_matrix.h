// A packed matrix of quantized survivors and one product with it: the data of the loops of every instruction set.
#pragma once

#include "cpu/packed_matrix.h"

namespace ace::cpu {

// The layout of ops/quantized.h. A wrong bitmap or row_start must not make a reader leave the tensors: a row begins
// inside `codes`, and code that reads `width` bytes from a place checks `whole` first.
template <class S>
struct QuantizedMatrix {
  const uint8_t* bitmap;  // [rows, 8 words]
  int64_t words;
  const uint8_t* codes;  // [bytes]
  int64_t bytes;
  const int64_t* row_start;  // [rows + 1], or null: row i begins at byte i * keep
  int64_t keep;
  const S* scales;  // [rows, groups]
  int64_t groups;
  int64_t group_words;  // words of the bitmap that share a scale

  ACE_HD const uint8_t* bits(int64_t row) const { return bitmap + 8 * row * words; }
  ACE_HD int64_t start(int64_t row) const {
    const int64_t place = row_start ? row_start[row] : row * keep;
    return place < 0 ? 0 : place > bytes ? bytes : place;
  }
  // Bytes of this row; not negative, and inside `codes`.
  ACE_HD int64_t size(int64_t row) const {
    const int64_t first = start(row), left = bytes - first;
    const int64_t found = row_start ? start(row + 1) - first : keep;
    return found < 0 ? 0 : found > left ? left : found;
  }
  // Whether `width` bytes can be read from this place.
  ACE_HD bool whole(int64_t place, int64_t width) const { return place + width <= bytes; }
  // Copies those of the `width` bytes that exist; the others become 0.
  ACE_HD void copy(int64_t place, int64_t width, uint8_t* target) const {
    const int64_t left = bytes - place < width ? bytes - place : width;
    std::memset(target, 0, static_cast<size_t>(width));
    if (left > 0) std::memcpy(target, codes + place, static_cast<size_t>(left));
  }
};

// A row in spans of kSpan words, whose products are summed before they are multiplied with a scale. The last span may
// be shorter.
template <int kSpan>
struct Spans {
  int64_t count;
  int64_t each;  // spans that share a scale

  template <class S>
  explicit Spans(const QuantizedMatrix<S>& matrix)
      : count((matrix.words + kSpan - 1) / kSpan), each(matrix.group_words / kSpan) {}

  // out [count] = the scales of a row. Inlined, and so compiled for the caller's instruction set.
  template <class S>
  ACE_HD void scales(const QuantizedMatrix<S>& matrix, int64_t row, float* out) const {
    const S* scales = matrix.scales + row * matrix.groups;
    if (each == 1) {
      for (int64_t i = 0; i < count; ++i) out[i] = to_float(scales[i]);
      return;
    }
    for (int64_t i = 0; i < count; i += each, ++scales) {
      const float scale = to_float(*scales);
      const int64_t end = count - i < each ? count : i + each;
      for (int64_t same = i; same < end; ++same) out[same] = scale;
    }
  }
};

// A thread's working memory for one row at a time, zero at first.
class QuantizedSpace {
 public:
  explicit QuantizedSpace(int64_t words) : scales_(kAlign * ((words * kScales * 4 + kAlign - 1) / kAlign)) {}
  // Bytes for rows of `words` words.
  static int64_t size(int64_t words) { return QuantizedSpace(words).scales_ + (words + 1) * kBitmapColumns * 4; }
  // Room for kScales numbers of each word.
  float* scales(void* memory) const { return static_cast<float*>(memory); }
  // Room for 64 words codes of up to 4 bytes, and 256 bytes more; or for as many bytes of each of four rows.
  template <class T>
  T* codes(void* memory) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory) + scales_);
  }

 private:
  static constexpr int64_t kAlign = 64, kScales = 20;  // of four rows, and times four tokens'
  int64_t scales_;
};

// One product: x [tokens, 64 words], zero beyond the columns, tokens `stride` inputs apart; out [tokens, rows].
template <class S, class X>
struct QuantizedProduct {
  QuantizedMatrix<S> matrix;
  const X* x;
  int64_t stride;
  float* out;
  int64_t rows;
};

}  // namespace ace::cpu
