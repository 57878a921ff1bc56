// Tokens for quantized_tiles.h: the two bytes of each number (quantized_fixed.h) in AMX's tiles.
#pragma once

#include "cpu/packed_tiles.h"
#include "cpu/quantized_fixed.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16")
namespace ace::cpu::amx {

// Up to 16 tokens in bytes, n_j = 256 h_j + l_j as in FixedToken, in one or two blocks of at most eight. For each word
// and block a tile [16, width, 2, 4]: of four neighbouring columns and each token the bytes h, then l. After the words,
// for each span, 2^e of 16 tokens. What is beyond the tokens is never used.
template <int kSpan>
struct FixedTiles {
  static constexpr int kWords = kSpan;
  static constexpr int64_t kBlock = 8;

  int64_t tokens, words;

  int64_t blocks() const { return tokens > kBlock ? 2 : 1; }
  int64_t width() const { return std::min(tokens, kBlock); }
  int64_t line() const { return 8 * width(); }
  int64_t spans() const { return (words + kSpan - 1) / kSpan; }
  int64_t place(int64_t word, int64_t block) const { return (word * blocks() + block) * kRows * line(); }
  int64_t unit_place(int64_t span, int64_t token) const { return place(words, 0) + 4 * (span * kRows + token); }
  int64_t size() const { return unit_place(spans(), kBlock); }  // 16 units can be read from each block's first

  // Writes token t, from x [cols].
  template <class S>
  void write(const S* x, int64_t cols, int64_t t, uint8_t* out) const {
    using Token = avx512vnni::FixedToken<kSpan>;
    alignas(64) uint8_t span[Token::kBytes];
    for (int64_t word = 0; word < words; ++word) {
      const int64_t first = word * kBitmapColumns, part = word % kSpan;
      if (part == 0) {
        const int64_t count = std::min<int64_t>(kSpan, words - word);
        const float unit = avx512vnni::fix_span<0>(x + first, cols - first, count, span);
        std::memcpy(out + unit_place(word / kSpan, t), &unit, sizeof unit);
      }
      const uint8_t* from = span + Token::kSums + part * Token::kWord;
      uint8_t* to = out + place(word, t / kBlock) + t % kBlock * 8;
      for (int64_t row = 0; row < kRows; ++row, to += line(), from += 4) {
        std::memcpy(to, from, 4);
        std::memcpy(to + 4, from + kBitmapColumns, 4);
      }
    }
  }
};

// What with_quantized_product (quantized_level.h) asks of an input: any number of tokens, 16 at a time.
struct TiledInput {
  static constexpr int64_t kTogether = kRows;

  // Calls action(tiles, first token, place) for each 16 tokens, and returns the place after them.
  template <class Action>
  static int64_t each(int64_t tokens, int64_t words, int64_t group_words, Action&& action) {
    const auto with = [&](auto tiles) {
      int64_t place = 0;
      for (int64_t t = 0; t < tokens; t += kTogether, place += tiles.size()) {
        tiles.tokens = std::min(kTogether, tokens - t);
        action(tiles, t, place);
      }
      return place;
    };
    return group_words % 2 == 0 ? with(FixedTiles<2>{0, words}) : with(FixedTiles<1>{0, words});
  }
  static int64_t size(int64_t tokens, int64_t words, int64_t group_words) {
    return each(tokens, words, group_words, [](const auto&, int64_t, int64_t) {});
  }
  template <class S>
  static void write(const S* x, int64_t stride, int64_t tokens, int64_t cols, int64_t words, int64_t group_words,
                    uint8_t* out) {
    each(tokens, words, group_words, [&](const auto& tiles, int64_t first, int64_t place) {
      for (int64_t t = 0; t < tiles.tokens; ++t) tiles.write(x + (first + t) * stride, cols, t, out + place);
    });
  }
};

}  // namespace ace::cpu::amx
#pragma GCC pop_options
#endif
