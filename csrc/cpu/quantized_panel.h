// The rows of a packed matrix of quantized survivors for panel_product (packed_panel.h): five and more bfloat16 tokens,
// with AVX-512's bf16 instructions. Panels hold the codes as bfloat16, which is exact; runs end where a scale does, and
// their sums are multiplied with it.
#pragma once

#include <memory>

#include "cpu/packed_panel.h"
#include "cpu/quantized_avx512.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16")
namespace ace::cpu::avx512bf16 {

template <int kBits>
struct QuantizedRows {
  QuantizedMatrix<BFloat16> matrix;
  std::shared_ptr<BFloat16[]> space;  // of this thread: space_size(words), for the words of a panel's part

  static size_t space_size(int64_t words) { return static_cast<size_t>((words + 1) * kBitmapColumns); }

  int64_t words() const { return matrix.words; }
  static int64_t begin(int64_t /*row*/) { return 0; }  // places count the codes of a row

  // Decodes `count` codes of a row from this place on; returns the first one's address. As many as `space` has can be
  // read from it.
  const BFloat16* decoded(int64_t row, int64_t place, int64_t count) const {
    constexpr int kDecoded = 32, kBytes = kDecoded * kBits / 8;
    const int64_t skipped = place * kBits % 8 / kBits, byte = matrix.start(row) + place * kBits / 8;
    for (int64_t done = 0; done < count + skipped; done += kDecoded) {
      const int64_t from = byte + done * kBits / 8;
      const uint8_t* codes = matrix.codes + from;
      uint8_t last[kBytes];
      if (__builtin_expect(!matrix.whole(from, kBytes), 0)) {
        matrix.copy(from, kBytes, last);
        codes = last;
      }
      __m512i found;
      if constexpr (kBits == 4) {
        found = avx512::half_codes(codes);
      } else {
        const __m512 low = avx512::byte_codes(codes), high = avx512::byte_codes(codes + 16);
        found = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
      }
      _mm512_storeu_si512(space.get() + done, found);
    }
    return space.get() + skipped;
  }
  void expand(int64_t first, int64_t count, int64_t first_word, int64_t words, int64_t* places, const PanelShape& shape,
              BFloat16* panel) const {
    for (int64_t r = 0; r < count; ++r, panel += shape.stride) {
      const uint8_t* bits = matrix.bits(first + r) + 8 * first_word;
      int64_t survivors = 0;
      for (int64_t half = 0; half < 2 * words; ++half) survivors += __builtin_popcount(half_word(bits, half));
      const BFloat16* codes = decoded(first + r, places[r], survivors);
      for (int64_t half = 0; half < 2 * words; ++half) {
        const uint32_t stored = half_word(bits, half);
        Avx512Bf16::store(panel + half * shape.step, Avx512Bf16::expand(codes, stored));
        codes += __builtin_popcount(stored);
      }
      places[r] += survivors;
    }
  }
  uintptr_t next(int64_t row, int64_t place) const {
    return reinterpret_cast<uintptr_t>(matrix.codes) + static_cast<uintptr_t>(matrix.start(row) + place * kBits / 8);
  }
  uintptr_t ahead(int64_t row, int64_t place, int64_t columns) const {
    return next(row, place + columns * kPanelRows / 2);
  }
  int64_t run(int64_t column, int64_t /*cols*/) const {
    const int64_t group = matrix.group_words * kBitmapColumns;
    return std::min(kLongRun, group - column % group);
  }
  const float* scales(int64_t first, int64_t count, int64_t column, float* factors) const {
    const BFloat16* scale = matrix.scales + first * matrix.groups + column / (matrix.group_words * kBitmapColumns);
    for (int64_t r = 0; r < count; ++r) factors[r] = to_float(scale[r * matrix.groups]);
    return factors;
  }

 private:
  static uint32_t half_word(const uint8_t* bits, int64_t index) {
    uint32_t half;
    std::memcpy(&half, bits + 4 * index, sizeof half);
    return half;
  }
};

}  // namespace ace::cpu::avx512bf16
#pragma GCC pop_options
#endif
