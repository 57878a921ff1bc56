// The product with a packed matrix for ARM's NEON, which every 64-bit ARM processor has. A table of 256 byte shuffles
// moves eight values to their columns; then they are widened to float.
#pragma once

#include "cpu/packed_matrix.h"

#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__ARM_BIG_ENDIAN)
#include <arm_neon.h>

#include <array>
#include <type_traits>

namespace ace::cpu::neon {

// Shuffles of kLanes numbers of 16 / kLanes bytes: entry `bits` takes the next number for each set bit, and for the
// others an out-of-range byte index, which gives 0.
template <unsigned kLanes>
constexpr std::array<std::array<uint8_t, 16>, size_t{1} << kLanes> make_shuffles() {
  constexpr unsigned kBytes = 16 / kLanes;
  std::array<std::array<uint8_t, 16>, size_t{1} << kLanes> table{};
  for (unsigned bits = 0; bits < table.size(); ++bits) {
    unsigned place = 0;
    for (unsigned c = 0; c < kLanes; ++c) {
      const bool stored = bits >> c & 1u;
      for (unsigned b = 0; b < kBytes; ++b)
        table[bits][c * kBytes + b] = static_cast<uint8_t>(stored ? place * kBytes + b : 255);
      place += stored;
    }
  }
  return table;
}
alignas(64) inline constexpr auto kShuffles = make_shuffles<8>();      // of 16-bit numbers
alignas(64) inline constexpr auto kWideShuffles = make_shuffles<4>();  // of float

template <class Value>
struct Neon {
  using T = Value;
  using X = float;
  static constexpr int kWidth = 8;
  static constexpr int far_rows(int) { return 1; }
  struct Lanes {
    float32x4_t low, high;
  };
  using Weights = Lanes;
  using Sums = Lanes;

  static ACE_HD Sums zero() { return {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}; }
  static ACE_HD Weights expand(const T* values, uint64_t bits) {
    if constexpr (std::is_same_v<T, float>) {
      const float* next = values + __builtin_popcountll(bits & 15u);
      return {placed(values, bits & 15u), placed(next, bits >> 4)};
    } else {
      const uint8x16_t stored = vld1q_u8(reinterpret_cast<const uint8_t*>(values));
      const uint16x8_t halves = vreinterpretq_u16_u8(vqtbl1q_u8(stored, vld1q_u8(kShuffles[bits].data())));
      return {widen(vget_low_u16(halves)), widen(vget_high_u16(halves))};
    }
  }
  static ACE_HD Sums add(Sums sums, const Weights& weights, const float* x) {
    return {vfmaq_f32(sums.low, weights.low, vld1q_f32(x)), vfmaq_f32(sums.high, weights.high, vld1q_f32(x + 4))};
  }
  static ACE_HD void store(T* out, const Weights& weights) {
    if constexpr (std::is_same_v<T, float>) {
      vst1q_f32(out, weights.low);
      vst1q_f32(out + 4, weights.high);
    } else {
      vst1q_u16(reinterpret_cast<uint16_t*>(out), vcombine_u16(narrow(weights.low), narrow(weights.high)));
    }
  }
  static ACE_HD float total(const Sums& sums) { return vaddvq_f32(vaddq_f32(sums.low, sums.high)); }

 private:
  static ACE_HD float32x4_t placed(const float* values, uint64_t bits) {
    const uint8x16_t stored = vld1q_u8(reinterpret_cast<const uint8_t*>(values));
    return vreinterpretq_f32_u8(vqtbl1q_u8(stored, vld1q_u8(kWideShuffles[bits].data())));
  }
  static ACE_HD float32x4_t widen(uint16x4_t halves) {
    if constexpr (std::is_same_v<T, Half>) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
  }
  static ACE_HD uint16x4_t narrow(float32x4_t wide) {
    if constexpr (std::is_same_v<T, Half>) return vreinterpret_u16_f16(vcvt_f16_f32(wide));
    return vshrn_n_u32(vreinterpretq_u32_f32(wide), 16);
  }
};

#include "cpu/packed_loop.inc"

}  // namespace ace::cpu::neon
#endif
