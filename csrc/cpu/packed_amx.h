// The product with a packed bfloat16 matrix for AMX, up to 64 tokens at a time. Sixteen rows are expanded into the
// first-level cache, 512 columns at a time, as tiles of 16 rows and 32 columns. The inputs are the second factor, so
// weights need no transposition.
#pragma once

#include "cpu/packed_avx512.h"
#include "cpu/packed_matrix.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,amx-tile,amx-bf16")
namespace ace::cpu::amx {

constexpr int kRows = 16;     // of a tile
constexpr int kColumns = 32;  // of a tile of weights
// About the bytes of values that one row needs for a panel. Sixteen rows are read in turn, too many streams for the
// hardware prefetcher.
constexpr int kAhead = 640;
constexpr int64_t kPanelWords = 8;  // of the bitmap that are expanded at a time

// Whether the processor has these tiles and the system allows their use, which a process must request.
inline bool available() {
  static const bool granted = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl, from the kernel's documentation
    return __builtin_cpu_supports("amx-tile") != 0 && __builtin_cpu_supports("amx-bf16") != 0 &&
           __builtin_cpu_supports("avx512vbmi2") != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// During its lifetime this thread's tiles all have 16 rows of 64 bytes; afterwards the configuration is restored for
// torch's own kernels.
class Tiles {
 public:
  Tiles() {
    const TileConfig wanted;
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

// Expands rows first to first + count, words first_word to first_word + words, to tiles [2 words, 16, 32], and advances
// `places`.
inline void expand_tiles(const PackedMatrix<BFloat16>& matrix, int64_t first, int64_t count, int64_t first_word,
                         int64_t words, int64_t* places, BFloat16* tiles) {
  for (int64_t r = 0; r < count; ++r) {
    int64_t place = places[r];
    BFloat16* target = tiles + r * kColumns;
    for (int64_t w = 0; w < words; ++w) {
      const uint64_t word = matrix.word(first + r, first_word + w);
      for (int half = 0; half < 2; ++half, target += kRows * kColumns) {
        const uint32_t bits = static_cast<uint32_t>(word >> (32 * half));
        const BFloat16* from = matrix.values + place;
        _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
        BFloat16 last[kColumns];
        if (__builtin_expect(!matrix.whole(place, kColumns), 0)) {
          matrix.copy(place, kColumns, last);
          from = last;
        }
        _mm512_storeu_si512(target, _mm512_mask_expand_epi16(avx512::new_zero(), bits, avx512::in_register(from)));
        place += __builtin_popcount(bits);
      }
    }
    places[r] = place;
  }
}

// One product: pairs [blocks, 32 words, 16 tokens, 2] bfloat16, pairs of neighbouring columns for 16 tokens at a time,
// zero beyond the columns and tokens; out [tokens, rows].
struct Product {
  PackedMatrix<BFloat16> matrix;
  const BFloat16* pairs;
  int64_t tokens, rows;
  float* out;
};

template <int kBlocks>
void multiply(const Product& product, int64_t first_block, int64_t begin, int64_t end) {
  const PackedMatrix<BFloat16>& matrix = product.matrix;
  const int64_t block_size = 2 * matrix.words * kRows * kColumns;  // of pairs
  const BFloat16* pairs = product.pairs + first_block * block_size;
  alignas(64) BFloat16 panel[2 * kPanelWords * kRows * kColumns] = {};
  alignas(64) float sums[kBlocks][kRows][kRows];
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t count = end - first < kRows ? end - first : kRows;
    int64_t places[kRows];
    for (int64_t r = 0; r < count; ++r) places[r] = matrix.start(first + r);
    _tile_zero(0);
    if constexpr (kBlocks > 1) _tile_zero(1);
    if constexpr (kBlocks > 2) _tile_zero(2);
    if constexpr (kBlocks > 3) _tile_zero(3);
    for (int64_t word = 0; word < matrix.words; word += kPanelWords) {
      const int64_t words = matrix.words - word < kPanelWords ? matrix.words - word : kPanelWords;
      expand_tiles(matrix, first, count, word, words, places, panel);
      Tiles::barrier();
      for (int64_t step = 0; step < 2 * words; ++step) {
        const BFloat16* x = pairs + (2 * word + step) * kRows * kColumns;
        _tile_loadd(4, panel + step * kRows * kColumns, 64);
        _tile_loadd(5, x, 64);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (kBlocks > 1) {
          _tile_loadd(6, x + block_size, 64);
          _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (kBlocks > 2) {
          _tile_loadd(5, x + 2 * block_size, 64);
          _tile_dpbf16ps(2, 4, 5);
        }
        if constexpr (kBlocks > 3) {
          _tile_loadd(6, x + 3 * block_size, 64);
          _tile_dpbf16ps(3, 4, 6);
        }
      }
      Tiles::barrier();
    }
    _tile_stored(0, sums[0], 64);
    if constexpr (kBlocks > 1) _tile_stored(1, sums[1], 64);
    if constexpr (kBlocks > 2) _tile_stored(2, sums[2], 64);
    if constexpr (kBlocks > 3) _tile_stored(3, sums[3], 64);
    Tiles::barrier();
    for (int64_t t = 16 * first_block; t < product.tokens && t < 16 * (first_block + kBlocks); ++t)
      for (int64_t r = 0; r < count; ++r)
        product.out[t * product.rows + first + r] = sums[t / 16 - first_block][r][t % 16];
  }
}

// All tokens, rows begin to end. A row's sums do not depend on how rows are divided.
inline void packed_product(const Product& product, int64_t begin, int64_t end) {
  const Tiles tiles;
  const int64_t blocks = (product.tokens + 15) / 16;
  int64_t block = 0;
  for (; block + 4 <= blocks; block += 4) multiply<4>(product, block, begin, end);
  if (blocks - block == 3) multiply<3>(product, block, begin, end);
  if (blocks - block == 2) multiply<2>(product, block, begin, end);
  if (blocks - block == 1) multiply<1>(product, block, begin, end);
}

}  // namespace ace::cpu::amx
#pragma GCC pop_options
#endif
