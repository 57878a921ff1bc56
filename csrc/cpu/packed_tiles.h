// The product with a packed bfloat16 matrix, also of quantized survivors, for AMX and any number of tokens. Panels of
// rows are expanded, 512 columns at a time, as tiles of 16 rows and 32 columns, and multiplied with all tokens. The
// inputs are the second factor, so weights need no transposition. Codes are exact in bfloat16; the sum of a group's
// products is multiplied with its scale.
#pragma once

#include "cpu/packed_panel.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,amx-tile,amx-bf16")
namespace ace::cpu::amx {

constexpr int kRows = 16;                           // of a tile
constexpr int kColumns = 32;                        // of a tile of weights
constexpr int64_t kPanelWords = 8;                  // of the bitmap that are expanded at a time
constexpr int64_t kTileSize = kRows * kColumns;     // numbers of a tile of weights, and of inputs
constexpr int64_t kSums = kRows * kRows;            // of a tile of results: 16 rows and 16 tokens
constexpr int64_t kTilesOfPanel = 2 * kPanelWords;  // in a row of tiles

// Whether the processor has these tiles and the system allows their use, which a process must request.
inline bool available() {
  static const bool granted = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl, from the kernel's documentation
    return __builtin_cpu_supports("amx-tile") != 0 && __builtin_cpu_supports("amx-bf16") != 0 &&
           __builtin_cpu_supports("amx-int8") != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// During its lifetime this thread's tiles have 16 rows of these numbers of bytes; afterwards the configuration is
// restored for torch's own kernels.
class Tiles {
 public:
  explicit Tiles(const TileConfig& wanted = {}) {
    _tile_storeconfig(&before_);
    barrier();
    _tile_loadconfig(&wanted);
  }
  ~Tiles() {
    barrier();
    before_.palette ? _tile_loadconfig(&before_) : _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // The intrinsics do not tell GCC 12 that they read and write memory.
  static ACE_HD void barrier() { __asm__ volatile("" ::: "memory"); }

 private:
  TileConfig before_;
};

// Rows of a panel. With few tokens its tiles stay in the first-level cache. With many it is in the second, so that
// inputs are read less often.
inline int64_t panel_rows(int64_t tokens) { return tokens <= kRows ? kRows : 8 * kRows; }

// One product. pairs [blocks, 32 words, 16 tokens, 2]: pairs of neighbouring columns for 16 tokens at a time, zero
// beyond the columns and tokens. bias [rows] or null; out [tokens, rows].
template <class Rows>
struct TileProduct {
  Rows matrix;
  const BFloat16* pairs;
  int64_t tokens;
  const BFloat16* bias;
  BFloat16* out;
  int64_t rows;

  int64_t blocks() const { return (tokens + kRows - 1) / kRows; }
};

// A thread's working memory, aligned to 64 bytes.
struct TileSpace {
  int64_t rows;     // of a panel
  BFloat16* tiles;  // [rows / 16, kTilesOfPanel, 16, 32]
  float* sums;      // [rows / 16, blocks, 16, 16]: tokens beside each other
};

// Writes x [16, 32 words 2], `stride` apart, as pairs [32 words, 16, 2].
inline void write_pairs(const BFloat16* x, int64_t stride, int64_t words, BFloat16* pairs) {
  for (int64_t step = 0; step < 2 * words; ++step)
    avx512bf16::transpose_pairs(x + step * kColumns, stride, pairs + step * kTileSize, kColumns);
}

// Where the factors and sums of a product of tiles are: the first one's, and the distance to the next.
struct TilePlaces {
  const BFloat16* tiles;  // rows of tiles are kTilesOfPanel tiles apart
  const BFloat16* x;
  int64_t next_block;  // from x to that of the next 16 tokens
  float* sums;         // of the next 16 tokens: kSums further
  int64_t next_row;    // from sums to those of the next row of tiles
};

// Multiplies `steps` tiles of one or two rows of tiles with those of kBlocks blocks of tokens, four products at most.
// Adds to sums, or replaces them.
template <int kRowTiles, int kBlocks>
void multiply_tiles(const TilePlaces& at, int64_t steps, bool add) {
  static_assert(kRowTiles * kBlocks <= 4 && kRowTiles <= 2);
  constexpr int64_t kLine = 64;
  constexpr bool kSecond = kRowTiles * kBlocks > 1, kThird = kRowTiles * kBlocks > 2, kLast = kThird;
  float* const second = kRowTiles == 2 ? at.sums + at.next_row : at.sums + kSums;
  float* const third = kRowTiles == 2 ? at.sums + kSums : at.sums + 2 * kSums;
  float* const last = kRowTiles == 2 ? at.sums + at.next_row + kSums : at.sums + 3 * kSums;
  if (add) {
    _tile_loadd(0, at.sums, kLine);
    if constexpr (kSecond) _tile_loadd(1, second, kLine);
    if constexpr (kThird) _tile_loadd(2, third, kLine);
    if constexpr (kLast) _tile_loadd(3, last, kLine);
  } else {
    _tile_zero(0);
    if constexpr (kSecond) _tile_zero(1);
    if constexpr (kThird) _tile_zero(2);
    if constexpr (kLast) _tile_zero(3);
  }
  const BFloat16 *tiles = at.tiles, *x = at.x;
  for (int64_t step = 0; step < steps; ++step, tiles += kTileSize, x += kTileSize) {
    _tile_loadd(4, tiles, kLine);
    _tile_loadd(6, x, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, tiles + kTilesOfPanel * kTileSize, kLine);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (kBlocks == 2) {
        _tile_loadd(7, x + at.next_block, kLine);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else if constexpr (kBlocks > 1) {
      _tile_loadd(7, x + at.next_block, kLine);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kBlocks == 4) {
        _tile_loadd(5, x + 2 * at.next_block, kLine);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, x + 3 * at.next_block, kLine);
        _tile_dpbf16ps(3, 4, 6);
      }
    }
  }
  _tile_stored(0, at.sums, kLine);
  if constexpr (kSecond) _tile_stored(1, second, kLine);
  if constexpr (kThird) _tile_stored(2, third, kLine);
  if constexpr (kLast) _tile_stored(3, last, kLine);
}

// One run. scales [16 kRowTiles], or null.
template <int kRowTiles, int kBlocks>
void multiply_run(const TilePlaces& at, int64_t steps, const float* scales) {
  Tiles::barrier();
  if (!scales) {
    multiply_tiles<kRowTiles, kBlocks>(at, steps, true);
    return Tiles::barrier();
  }
  alignas(64) float part[kRowTiles * kBlocks * kSums];
  multiply_tiles<kRowTiles, kBlocks>({at.tiles, at.x, at.next_block, part, kBlocks * kSums}, steps, false);
  Tiles::barrier();
  for (int tile = 0; tile < kRowTiles; ++tile, scales += kRows)
    for (int block = 0; block < kBlocks; ++block) {
      const float* from = part + (tile * kBlocks + block) * kSums;
      float* sums = at.sums + tile * at.next_row + block * kSums;
      for (int row = 0; row < kRows; ++row, from += kRows, sums += kRows)
        _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_load_ps(from), _mm512_set1_ps(scales[row]), _mm512_load_ps(sums)));
    }
}

// Writes rows first to first + count of the result: sums + bias, rounded once. Subnormal results become 0.
template <class Rows>
void store_tiles(const TileProduct<Rows>& product, const float* sums, int64_t first, int64_t count) {
  alignas(64) float turned[kSums];  // rows beside each other
  for (int64_t row = 0; row < count; row += kRows) {
    const auto mask = static_cast<__mmask16>(count - row < kRows ? (1u << (count - row)) - 1 : 0xffffu);
    __m512 shift = _mm512_setzero_ps();
    if (product.bias) {
      const __m256i stored = _mm256_maskz_loadu_epi16(mask, product.bias + first + row);
      shift = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
    }
    for (int64_t block = 0; block < product.blocks(); ++block) {
      const float* tile = sums + (row / kRows * product.blocks() + block) * kSums;
      avx512bf16::transpose_pairs(reinterpret_cast<const BFloat16*>(tile), kColumns,
                                  reinterpret_cast<BFloat16*>(turned), kColumns);
      BFloat16* out = product.out + block * kRows * product.rows + first + row;
      for (int64_t t = 0; t < std::min<int64_t>(kRows, product.tokens - block * kRows); ++t) {
        const __m512 sum = _mm512_add_ps(_mm512_load_ps(turned + t * kRows), shift);
        _mm256_mask_storeu_epi16(out + t * product.rows, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
      }
    }
  }
}

// Multiplies some steps of a panel's first `count` rows with all tokens. scales [count rounded up to 16], or null.
template <class Rows>
void multiply_panel(const TileProduct<Rows>& product, int64_t count, int64_t steps, const BFloat16* tiles,
                    const BFloat16* x, const float* scales, float* sums) {
  const int64_t next_block = 2 * product.matrix.words() * kTileSize, next_row = product.blocks() * kSums;
  const auto with_blocks = [&](auto number, int64_t block) ACE_FOLD {
    constexpr int kBlocks = decltype(number)::value;
    TilePlaces at{tiles, x + block * next_block, next_block, sums + block * kSums, next_row};
    int64_t row = 0;
    if constexpr (kBlocks <= 2) {
      for (; row + kRows < count; row += 2 * kRows, at.tiles += 2 * kTilesOfPanel * kTileSize, at.sums += 2 * next_row)
        multiply_run<2, kBlocks>(at, steps, scales ? scales + row : nullptr);
    }
    if (row < count) multiply_run<1, kBlocks>(at, steps, scales ? scales + row : nullptr);
  };
  int64_t block = 0;
  if (count <= kRows)
    for (; block + 4 <= product.blocks(); block += 4) with_blocks(std::integral_constant<int, 4>{}, block);
  for (; block + 2 <= product.blocks(); block += 2) with_blocks(std::integral_constant<int, 2>{}, block);
  for (; block < product.blocks(); ++block) with_blocks(std::integral_constant<int, 1>{}, block);
}

// Prefetches what follows a group of rows, in the order of the rows: of both bits and values a part with each step.
class RowsAhead {
 public:
  // A group whose values are at begin to before end, and are read in this number of steps. bits: those after it.
  RowsAhead(const uint8_t* bits, uintptr_t begin, uintptr_t end, int64_t steps)
      : bits_{reinterpret_cast<uintptr_t>(bits), kPanelWords * 8},
        values_{end, std::clamp<int64_t>((static_cast<int64_t>(end - begin) + steps - 1) / std::max<int64_t>(1, steps),
                                         0, kMost)} {}
  ACE_HD void prefetch() {
    bits_.next();
    values_.next();
  }

 private:
  static constexpr int64_t kMost = kPanelWords * kBitmapColumns * 2;  // bytes
  BytesAhead bits_, values_;
};

// All tokens, rows begin to end. A row's sums do not depend on how rows are divided.
template <class Rows>
void tile_product(const TileProduct<Rows>& product, int64_t begin, int64_t end, const TileSpace& space) {
  constexpr int64_t kMostRows = 8 * kRows;
  const Tiles configured;
  const Rows& matrix = product.matrix;
  for (int64_t first = begin; first < end; first += space.rows) {
    const int64_t count = std::min(space.rows, end - first);
    alignas(64) float factors[kMostRows] = {};
    int64_t places[kMostRows];
    for (int64_t r = 0; r < count; ++r) places[r] = matrix.begin(first + r);
    std::fill_n(space.sums, space.rows / kRows * product.blocks() * kSums, 0.0f);
    const int64_t panels = (matrix.words() + kPanelWords - 1) / kPanelWords, after = first + count;
    RowsAhead ahead(matrix.matrix.bitmap + 8 * after * matrix.words(), matrix.next(first, matrix.begin(first)),
                    matrix.next(after, matrix.begin(after)), count * panels);
    for (int64_t word = 0; word < matrix.words(); word += kPanelWords) {
      const int64_t words = std::min(kPanelWords, matrix.words() - word), width = words * kBitmapColumns;
      for (int64_t r = 0; r < count; ++r) {
        matrix.expand(first + r, 1, word, words, places + r, {words, kColumns, kTileSize},
                      space.tiles + r / kRows * kTilesOfPanel * kTileSize + r % kRows * kColumns);
        ahead.prefetch();
      }
      for (int64_t column = 0, cols = 0; column < width; column += cols) {
        const int64_t from = word * kBitmapColumns + column;
        cols = std::min(matrix.run(from, width), width - column);
        multiply_panel(product, count, cols / kColumns, space.tiles + column / kColumns * kTileSize,
                       product.pairs + from / kColumns * kTileSize, matrix.scales(first, count, from, factors),
                       space.sums);
      }
    }
    store_tiles(product, space.sums, first, count);
  }
}

}  // namespace ace::cpu::amx
#pragma GCC pop_options
#endif
