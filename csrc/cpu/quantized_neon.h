// The product with a packed matrix of quantized survivors for ARM's NEON. Two table look-ups move eight codes to the
// highest bytes of the integers of their columns; the conversion to float divides by 2^24.
#pragma once

#include "cpu/packed_neon.h"
#include "cpu/quantized_matrix.h"

#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__ARM_BIG_ENDIAN)

namespace ace::cpu::neon {

// Entry `bits` has at column c the byte index of its code in the last of four bytes if there is one, else 255: 0.
constexpr std::array<std::array<uint8_t, 32>, 256> make_code_bytes() {
  std::array<std::array<uint8_t, 32>, 256> table{};
  for (unsigned bits = 0; bits < 256; ++bits) {
    uint8_t place = 0;
    for (auto& byte : table[bits]) byte = 255;
    for (unsigned c = 0; c < 8; ++c)
      if (bits >> c & 1u) table[bits][4 * c + 3] = place++;
  }
  return table;
}
alignas(64) inline constexpr auto kCodeBytes = make_code_bytes();

struct Quantized : Neon<float> {
  using T = int8_t;
  static constexpr float kUnit = 1.0f;
  static constexpr int kDecoded = 32;

  template <int kBits>
  static ACE_HD void decode(const uint8_t* codes, T* out) {
    if constexpr (kBits == 8) {
      std::memcpy(out, codes, kDecoded);
    } else {
      const int8x16_t both = vreinterpretq_s8_u8(vld1q_u8(codes));
      const int8x16_t low = vshrq_n_s8(vshlq_n_s8(both, 4), 4), high = vshrq_n_s8(both, 4);
      vst1q_s8(out, vzip1q_s8(low, high));
      vst1q_s8(out + 16, vzip2q_s8(low, high));
    }
  }
  static ACE_HD Weights expand(const T* values, uint64_t bits) {
    const uint8x8_t eight = vld1_u8(reinterpret_cast<const uint8_t*>(values));
    const uint8x16_t stored = vcombine_u8(eight, eight);
    const uint8_t* bytes = kCodeBytes[bits].data();
    return {widen_codes(vqtbl1q_u8(stored, vld1q_u8(bytes))), widen_codes(vqtbl1q_u8(stored, vld1q_u8(bytes + 16)))};
  }
  static ACE_HD Sums plus(const Sums& a, const Sums& b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static ACE_HD Sums add_scaled(Sums sums, float scale, const Sums& part) {
    return {vfmaq_n_f32(sums.low, part.low, scale), vfmaq_n_f32(sums.high, part.high, scale)};
  }
  static ACE_HD void store_scaled(float* out, float scale, const Weights& weights) {
    const float32x4_t zero = vdupq_n_f32(0.0f);
    vst1q_f32(out, vfmaq_n_f32(zero, weights.low, scale));
    vst1q_f32(out + 4, vfmaq_n_f32(zero, weights.high, scale));
  }

 private:
  static ACE_HD float32x4_t widen_codes(uint8x16_t bytes) { return vcvtq_n_f32_s32(vreinterpretq_s32_u8(bytes), 24); }
};

#include "cpu/quantized_loop.inc"

}  // namespace ace::cpu::neon
#endif
