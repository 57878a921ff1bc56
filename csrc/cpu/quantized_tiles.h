// The product with a packed matrix of quantized survivors for AMX, for two to 16 bfloat16 or float16 tokens. Codes are
// expanded as signed bytes, into tiles of 16 rows and 64 columns, which are multiplied with the two bytes of each
// number of the tokens (quantized_fixed.h). The sums of a span are exact, and together below 2^31; then they are
// multiplied with scale and unit.
//
// The limit is the expansion, 4 and 6 cycles for 64 columns of a row with 8 and 4 bits: a move to a mask, two steps of
// the expansion and, with 4 bits, two of decoding need the one vector unit that shuffles. The tiles need 1 to 2 cycles
// more, which hardly overlap with the rest; multiplied one step later, in turns with the expansion, they took longer.
// So one token is as fast by quantized_vnni.h.
#pragma once

#include "cpu/quantized_tiled_input.h"
#include "cpu/quantized_vnni.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target(                                                                                              \
    "avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16", \
    "amx-tile,amx-bf16,amx-int8")
namespace ace::cpu::amx {

// Signed codes of 64 columns, and the total 256 high + low of sums with them.
template <int kBits>
struct SignedCodes;

template <>
struct SignedCodes<8> {
  static ACE_HD __m512i load(uintptr_t place) { return avx512::in_register(reinterpret_cast<const uint8_t*>(place)); }
  static ACE_HD __m512i total(__m512i high, __m512i low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
};

// In the upper half of a byte a code is 16 times as large, and so are the sums.
template <>
struct SignedCodes<4> {
  static ACE_HD __m512i load(uintptr_t place) {
    return _mm512_and_si512(avx512vnni::decode_halves(place, avx512vnni::kUpperShifts), _mm512_set1_epi8(-16));
  }
  static ACE_HD __m512i total(__m512i high, __m512i low) {
    return _mm512_add_epi32(_mm512_slli_epi32(high, 4), _mm512_srai_epi32(low, 4));
  }
};

// Rows that are expanded at a time, and multiplied with one load of the tokens.
constexpr int64_t kGroupRows = 2 * kRows;
constexpr int64_t kTileBytes = kRows * kBitmapColumns;

// Some words of a row as rows of tiles of codes.
template <int kBits>
class RowCodes {
 public:
  RowCodes() = default;
  template <class S>
  RowCodes(const QuantizedMatrix<S>& matrix, int64_t row) : place_(matrix.start(row) * kCodes) {}

  // Writes `words` words from first_word on, tiles kTileBytes apart.
  template <class S>
  ACE_HD void expand(const QuantizedMatrix<S>& matrix, int64_t row, int64_t first_word, int64_t words, uint8_t* tile) {
    constexpr int64_t kMost = kPanelWords * kBitmapColumns / kCodes + 65;  // bytes
    uint8_t last[kMost];
    const int64_t byte = place_ / kCodes;
    const uint8_t* codes = matrix.codes + byte;
    if (__builtin_expect(!matrix.whole(byte, kMost), 0)) {
      matrix.copy(byte, kMost, last);
      codes = last;
    }
    const uint8_t* bits = matrix.bits(row) + 8 * first_word;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(codes) * kCodes + static_cast<uintptr_t>(place_ % kCodes);
    uintptr_t place = begin;
    for (int64_t w = 0; w < words; ++w, bits += 8, tile += kTileBytes) {
      uint64_t word;
      std::memcpy(&word, bits, sizeof word);
      _mm512_store_si512(tile, _mm512_maskz_expand_epi8(_cvtu64_mask64(word), SignedCodes<kBits>::load(place)));
      place += static_cast<uintptr_t>(__builtin_popcountll(word));
    }
    place_ += static_cast<int64_t>(place - begin);
  }

 private:
  static constexpr int64_t kCodes = 8 / kBits;  // of a byte
  int64_t place_ = 0;                           // codes from the first one of the matrix
};

// The scales of kGroupRows rows, for 32 groups at a time: pairs of groups for 16 rows.
template <class S>
class TileScales {
 public:
  // Those of a group for 16 rows, the first or second of `count` rows from `first` on.
  ACE_HD __m512 of(const QuantizedMatrix<S>& matrix, int64_t first, int64_t count, int64_t group, int64_t half) {
    if (group / kColumns != loaded_) load(matrix, first, count, group / kColumns);
    const __m512i pairs = _mm512_load_si512(pairs_ + half * kTileSize + group % kColumns / 2 * kColumns);
    if constexpr (std::is_same_v<S, Half>)
      return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(group % 2 ? _mm512_srli_epi32(pairs, 16) : pairs));
    constexpr int kUpper = static_cast<int>(0xffff0000u);
    return _mm512_castsi512_ps(group % 2 ? _mm512_and_si512(pairs, _mm512_set1_epi32(kUpper))
                                         : _mm512_slli_epi32(pairs, 16));
  }

 private:
  void load(const QuantizedMatrix<S>& matrix, int64_t first, int64_t count, int64_t part) {
    alignas(64) BFloat16 rows[kTileSize];
    const int64_t left = matrix.groups - part * kColumns;
    const auto mask = static_cast<__mmask32>(left >= kColumns ? 0xffffffffu : (1u << left) - 1);
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t row = half * kRows + r;
        const S* from = matrix.scales + (first + row) * matrix.groups + part * kColumns;
        _mm512_store_si512(rows + r * kColumns, row < count ? _mm512_maskz_loadu_epi16(mask, from) : __m512i{});
      }
      avx512bf16::transpose_pairs(rows, kColumns, pairs_ + half * kTileSize, kColumns);
    }
    loaded_ = part;
  }
  alignas(64) BFloat16 pairs_[2 * kTileSize];  // any bits of 16
  int64_t loaded_ = -1;
};

// Which row and token the entries of sums [16, width] are of.
struct TileLanes {
  explicit TileLanes(int64_t width) {
    for (int64_t i = 0; i < kRows * width; ++i) {
      row[i] = static_cast<int32_t>(i / width);
      token[i] = static_cast<int32_t>(i % width);
    }
  }
  static constexpr int64_t kMost = kRows * FixedTiles<1>::kBlock;
  alignas(64) int32_t row[kMost], token[kMost];
};

// sums [16, width] += scale * unit * total, of 16 rows' scales and the tokens' units. parts [16, width, 2].
template <int kBits>
ACE_HD void add_totals(const int32_t* parts, __m512 scales, __m512 units, const TileLanes& lanes, int64_t width,
                       float* sums) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int64_t i = 0; i < kRows * width; i += kRows) {
    const __m512i a = _mm512_load_si512(parts + 2 * i), b = _mm512_load_si512(parts + 2 * i + kRows);
    const __m512i total =
        SignedCodes<kBits>::total(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b));
    const __m512 factor = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_load_si512(lanes.row + i), scales),
                                        _mm512_permutexvar_ps(_mm512_load_si512(lanes.token + i), units));
    _mm512_store_ps(sums + i, _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(total), _mm512_load_ps(sums + i)));
  }
}

// Multiplies `words` tiles of one or two rows of tiles, kPanelWords apart, with those of one or two blocks of tokens.
// out [kRowTiles, kBlocks, 16, line / 4].
template <int kRowTiles, int kBlocks>
ACE_HD void multiply_codes(const uint8_t* tiles, const uint8_t* x, int64_t words, int64_t line, int32_t* out) {
  constexpr bool kHigh = kRowTiles == 2, kWide = kBlocks == 2;
  constexpr int64_t kLine = 64;
  const int64_t block = kRows * line, part = block / 4;
  Tiles::barrier();
  _tile_zero(0);
  if constexpr (kWide) _tile_zero(1);
  if constexpr (kHigh) _tile_zero(2);
  if constexpr (kWide && kHigh) _tile_zero(3);
  for (int64_t w = 0; w < words; ++w, tiles += kTileBytes, x += kBlocks * block) {
    _tile_loadd(4, tiles, kLine);
    _tile_loadd(6, x, line);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kWide) _tile_loadd(7, x + block, line);
    if constexpr (kWide) _tile_dpbssd(1, 4, 7);
    if constexpr (kHigh) _tile_loadd(5, tiles + kPanelWords * kTileBytes, kLine);
    if constexpr (kHigh) _tile_dpbssd(2, 5, 6);
    if constexpr (kWide && kHigh) _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, out, line);
  if constexpr (kWide) _tile_stored(1, out + part, line);
  if constexpr (kHigh) _tile_stored(2, out + kBlocks * part, line);
  if constexpr (kWide && kHigh) _tile_stored(3, out + 3 * part, line);
  Tiles::barrier();
}

// All tokens of `count` rows from `first` on, at most 16 kRowTiles.
template <int kBits, int kSpan, int kRowTiles, int kBlocks, class S>
class TileGroup {
 public:
  TileGroup(const QuantizedProduct<S, uint8_t>& product, const FixedTiles<kSpan>& x, const TileLanes& lanes,
            int64_t first, int64_t count)
      : product_(product),
        x_(x),
        lanes_(lanes),
        first_(first),
        count_(count),
        sums_of_tile_(kRows * x.width()),
        ahead_(product.matrix.bits(first + count), address(first), address(first + count),
               count * ((product.matrix.words + kPanelWords - 1) / kPanelWords)) {
    for (int64_t r = 0; r < count; ++r) rows_[r] = {product.matrix, first + r};
    std::fill_n(sums_, kRowTiles * kBlocks * sums_of_tile_, 0.0f);
  }

  // tiles: kRowTiles rows of kPanelWords tiles.
  ACE_HD void multiply(uint8_t* tiles) {
    const QuantizedMatrix<S>& matrix = product_.matrix;
    for (int64_t word = 0; word < matrix.words; word += kPanelWords) {
      const int64_t words = std::min(kPanelWords, matrix.words - word);
      for (int64_t r = 0; r < count_; ++r) {
        rows_[r].expand(matrix, first_ + r, word, words,
                        tiles + r / kRows * kPanelWords * kTileBytes + r % kRows * kBitmapColumns);
        ahead_.prefetch();
      }
      for (int64_t w = 0; w < words; w += kSpan)
        multiply_codes<kRowTiles, kBlocks>(tiles + w * kTileBytes, product_.x + x_.place(word + w, 0),
                                           std::min<int64_t>(kSpan, words - w), x_.line(), parts_ + w / kSpan * kParts);
      for (int64_t w = 0; w < words; w += kSpan) add_span(word + w, parts_ + w / kSpan * kParts);
    }
    for (int64_t t = 0; t < x_.tokens; ++t) {
      const float* sums = sums_ + t / x_.kBlock * sums_of_tile_ + t % x_.kBlock;
      float* out = product_.out + t * product_.rows + first_;
      for (int64_t r = 0; r < count_; ++r) out[r] = sums[r / kRows * kBlocks * sums_of_tile_ + r % kRows * x_.width()];
    }
  }

 private:
  static constexpr int64_t kSums = kRowTiles * kBlocks * TileLanes::kMost, kParts = 2 * kSums;

  uintptr_t address(int64_t row) const {
    return reinterpret_cast<uintptr_t>(product_.matrix.codes) + static_cast<uintptr_t>(product_.matrix.start(row));
  }
  ACE_HD void add_span(int64_t word, const int32_t* parts) {
    float* sums = sums_;
    for (int64_t tile = 0; tile < kRowTiles; ++tile) {
      const __m512 scales = scales_.of(product_.matrix, first_, count_, word / product_.matrix.group_words, tile);
      for (int64_t block = 0; block < kBlocks; ++block, parts += 2 * sums_of_tile_, sums += sums_of_tile_) {
        const __m512 units = _mm512_loadu_ps(product_.x + x_.unit_place(word / kSpan, block * x_.kBlock));
        add_totals<kBits>(parts, scales, units, lanes_, x_.width(), sums);
      }
    }
  }

  const QuantizedProduct<S, uint8_t>& product_;
  const FixedTiles<kSpan>& x_;
  const TileLanes& lanes_;
  int64_t first_, count_, sums_of_tile_;
  RowsAhead ahead_;
  RowCodes<kBits> rows_[kRowTiles * kRows];
  TileScales<S> scales_;
  alignas(64) float sums_[kSums];
  alignas(64) int32_t parts_[kPanelWords / kSpan * kParts];
};

template <int kBits, int kSpan, int kBlocks, class S>
void multiply_all(const QuantizedProduct<S, uint8_t>& product, const FixedTiles<kSpan>& x, int64_t begin, int64_t end) {
  const TileLanes lanes(x.width());
  TileConfig config;
  for (const int tile : {0, 1, 2, 3, 6, 7}) config.bytes[tile] = static_cast<uint16_t>(x.line());
  const Tiles configured(config);
  alignas(64) uint8_t tiles[kGroupRows * kPanelWords * kBitmapColumns] = {};
  int64_t row = begin;
  for (; end - row > kRows; row += kGroupRows)
    TileGroup<kBits, kSpan, 2, kBlocks, S>(product, x, lanes, row, std::min(kGroupRows, end - row)).multiply(tiles);
  if (row < end) TileGroup<kBits, kSpan, 1, kBlocks, S>(product, x, lanes, row, end - row).multiply(tiles);
}

// x: TiledInput.
template <int kBits, class S>
void quantized_product(const QuantizedProduct<S, uint8_t>& product, int64_t tokens, int64_t begin, int64_t end,
                       void* /*memory*/) {
  TiledInput::each(tokens, product.matrix.words, product.matrix.group_words,
                   [&](const auto& x, int64_t first, int64_t place) {
                     QuantizedProduct<S, uint8_t> part = product;
                     part.x += place;
                     part.out += first * product.rows;
                     constexpr int kSpan = std::decay_t<decltype(x)>::kWords;
                     x.blocks() == 1 ? multiply_all<kBits, kSpan, 1>(part, x, begin, end)
                                     : multiply_all<kBits, kSpan, 2>(part, x, begin, end);
                   });
}

}  // namespace ace::cpu::amx
#pragma GCC pop_options
#endif
