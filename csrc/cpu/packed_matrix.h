// A packed matrix and one product with it: the data of the loops of every instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/scalar.h"

namespace ace::cpu {

constexpr int64_t kBitmapColumns = 64;  // of one word of a row's bitmap

constexpr int64_t kTokenBytes = 40 * 1024;  // of inputs that are read for every row: about the first-level cache

// Marks a lambda in a loop over a row: it is inlined, and so compiled for the caller's instruction set.
#define ACE_FOLD __attribute__((always_inline))

// Prefetches survivors 4 KiB ahead, because their places depend on all bits before them, which the hardware prefetcher
// does not follow far enough. (Measured: speed rises from 1 to 4 KiB.) Prefetching beyond the end has no effect.
template <class T>
ACE_HD void prefetch_values(const T* values) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(values) + 4096));
}

// Prefetches one sequence of bytes from `place` on, `each` bytes at a time, to the second-level cache: several rows
// that are read ahead would displace x from the first. Beyond the end of the memory it has no effect.
struct BytesAhead {
  uintptr_t place;
  int64_t each;  // 0: none

  ACE_HD void next() {
    constexpr int64_t kLine = 64;
    constexpr int kSecondLevel = 2;
    for (int64_t done = 0; done < each; done += kLine)
      __builtin_prefetch(reinterpret_cast<const void*>(place + static_cast<uintptr_t>(done)), 0, kSecondLevel);
    place += static_cast<uintptr_t>(each);
  }
};

// The layout of ops/packed.h. A wrong bitmap or row_start must not make a reader leave the tensors: a row begins inside
// `values`, and code that reads `width` values from a place checks `whole` first.
template <class T>
struct PackedMatrix {
  const uint8_t* bitmap;  // [rows, 8 words]
  int64_t words;
  const T* values;  // [survivors]
  int64_t survivors;
  const int64_t* row_start;  // [rows + 1], or null: row i begins at i * keep
  int64_t keep;

  ACE_HD uint64_t word(int64_t row, int64_t index) const {
    uint64_t bits;
    std::memcpy(&bits, bitmap + 8 * (row * words + index), sizeof bits);
    return bits;
  }
  ACE_HD int64_t start(int64_t row) const {
    const int64_t place = row_start ? row_start[row] : row * keep;
    return place < 0 ? 0 : place > survivors ? survivors : place;
  }
  // Whether `width` values can be read from this place.
  ACE_HD bool whole(int64_t place, int64_t width) const { return place + width <= survivors; }
  // Copies those of the `width` values that exist; the others become 0.
  ACE_HD void copy(int64_t place, int width, T* target) const {
    const int64_t left = survivors - place < width ? survivors - place : width;
    std::memset(static_cast<void*>(target), 0, sizeof(T) * static_cast<size_t>(width));
    if (left > 0) std::memcpy(static_cast<void*>(target), values + place, sizeof(T) * static_cast<size_t>(left));
  }
};

// One product: x [tokens, 64 words], zero beyond the columns, tokens `stride` inputs apart; out [tokens, rows].
template <class T, class X>
struct PackedProduct {
  PackedMatrix<T> matrix;
  const X* x;
  int64_t stride;
  float* out;
  int64_t rows;
  ACE_HD const X* token(int64_t t) const { return x + t * stride; }
};

}  // namespace ace::cpu
