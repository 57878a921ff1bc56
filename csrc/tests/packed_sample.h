// Shared by the tests of packed matrices: a random matrix, dense and packed, and products by panels.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/packed_level.h"

namespace ace::cpu {

// Those of this processor.
inline std::vector<PackedLevel> levels() {
  using Level = PackedLevel;
  const Level highest = highest_packed_level();
  std::vector<Level> found{Level::portable};
  for (const Level level :
       {Level::avx2, Level::avx512, Level::avx512_vnni, Level::avx512_bf16, Level::avx512_amx, Level::neon})
    if (level == highest || (level < highest && highest != Level::neon)) found.push_back(level);
  return found;
}

// A number of magnitude 1/2 to 4 with few digits, exact in every type.
template <class T>
T draw(std::mt19937& random) {
  const uint32_t sign = random() & 1u, step = random() % 3, mantissa = random() % 8;
  if constexpr (std::is_same_v<T, float>) {
    return bits_float(sign << 31 | (126u + step) << 23 | mantissa << 20);
  } else if constexpr (std::is_same_v<T, Half>) {
    return {static_cast<uint16_t>(sign << 15 | (14u + step) << 10 | mantissa << 7)};
  } else {
    return {static_cast<uint16_t>(sign << 15 | (126u + step) << 7 | mantissa << 4)};
  }
}

template <class T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <class T>
struct Sample {
  Sample(int64_t rows, int64_t cols, unsigned share, std::mt19937& random)
      : rows(rows), cols(cols), words((cols + 63) / 64), bitmap(static_cast<size_t>(8 * rows * words)) {
    for (int64_t i = 0; i < rows * cols; ++i) dense.push_back(random() % 100 < share ? draw<T>(random) : T{});
    pack();
  }
  // Bitmap, values and starts of the entries of `dense` that are not +0.
  void pack() {
    std::fill(bitmap.begin(), bitmap.end(), uint8_t{0});
    values.clear();
    row_start.assign(1, 0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < cols; ++column) {
        const T& weight = dense[static_cast<size_t>(row * cols + column)];
        if (same_bits(weight, T{})) continue;
        values.push_back(weight);
        bitmap[static_cast<size_t>(8 * row * words + column / 8)] |= static_cast<uint8_t>(1u << (column % 8));
      }
      row_start.push_back(static_cast<int64_t>(values.size()));
    }
    values.shrink_to_fit();
  }
  PackedMatrix<T> matrix() const {
    return {bitmap.data(), words, values.data(), static_cast<int64_t>(values.size()), row_start.data(), 0};
  }
  int64_t rows, cols, words;
  std::vector<uint8_t> bitmap;
  std::vector<T> dense, values;
  std::vector<int64_t> row_start;
};

#if ACE_PACKED_X86
inline bool has_panels() { return highest_packed_level() >= PackedLevel::avx512_bf16; }

struct FreeAligned {
  void operator()(void* memory) const { std::free(memory); }
};

// A buffer aligned as torch's, with exactly this many entries.
template <class T>
std::unique_ptr<T[], FreeAligned> aligned(int64_t entries) {
  const size_t bytes = (static_cast<size_t>(entries) * sizeof(T) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes);
  std::memset(memory, 0, bytes);
  return std::unique_ptr<T[], FreeAligned>(static_cast<T*>(memory));
}

// out = a product's result; separate calls compute rows 0 to `cut` and the rest.
inline void multiply_panels(const PackedMatrix<BFloat16>& matrix, const BFloat16* x, int64_t tokens,
                            const BFloat16* bias, int64_t rows, int64_t cols, int64_t cut, BFloat16* out) {
  const avx512bf16::PanelShape shape = avx512bf16::panel_shape(matrix.words);
  const auto panel = aligned<BFloat16>(avx512bf16::kPanelRows * shape.stride);
  const auto pairs = aligned<BFloat16>(avx512bf16::kPanelRows * avx512bf16::kLongRun);
  const auto sums = aligned<float>(tokens * avx512bf16::kPanelRows);
  const avx512bf16::PanelSpace space{panel.get(), pairs.get(), sums.get()};
  const avx512bf16::PanelProduct<avx512bf16::PackedRows> product{{matrix}, cols, x,   matrix.words * 64,
                                                                 tokens,   bias, out, rows};
  avx512bf16::panel_product(product, 0, cut, shape, space);
  avx512bf16::panel_product(product, cut, rows, shape, space);
}

// The same by tiles, which need AMX. `source` are the rows of a matrix for parts of amx::kPanelWords words.
template <class Rows>
void multiply_tiles(const Rows& source, const BFloat16* x, int64_t tokens, const BFloat16* bias, int64_t rows,
                    int64_t cut, BFloat16* out) {
  const int64_t blocks = (tokens + 15) / 16, stride = source.words() * 64, height = amx::panel_rows(tokens);
  const auto wide = aligned<BFloat16>(16 * blocks * stride), pairs = aligned<BFloat16>(16 * blocks * stride);
  std::copy_n(x, tokens * stride, wide.get());
  for (int64_t block = 0; block < blocks; ++block)
    amx::write_pairs(wide.get() + 16 * block * stride, stride, source.words(), pairs.get() + 16 * block * stride);
  const auto tiles = aligned<BFloat16>(height * amx::kPanelWords * 64);
  const auto sums = aligned<float>(height * blocks * 16);
  const amx::TileSpace space{height, tiles.get(), sums.get()};
  const amx::TileProduct<Rows> product{source, pairs.get(), tokens, bias, out, rows};
  amx::tile_product(product, 0, cut, space);
  amx::tile_product(product, cut, rows, space);
}
#endif

}  // namespace ace::cpu
