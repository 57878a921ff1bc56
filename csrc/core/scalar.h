// Number types of weights, as bits. Includes neither torch nor the CUDA runtime.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ACE_HD __host__ __device__ __forceinline__
#else
#define ACE_HD inline __attribute__((always_inline))
#endif

namespace ace {

struct Half {  // IEEE binary16
  uint16_t bits;
};

struct BFloat16 {  // the upper half of a binary32
  uint16_t bits;
};

ACE_HD uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

ACE_HD float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Widening is exact for every input, subnormal numbers included.
ACE_HD float to_float(float value) { return value; }

ACE_HD float to_float(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

ACE_HD float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  float wide;  // one instruction
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t exponent = value.bits & 0x7c00u;
  const uint32_t mantissa = value.bits & 0x03ffu;
  // Rebias the exponent from 15 to 127; infinity and NaN keep an all-ones exponent.
  const uint32_t rebias = exponent == 0x7c00u ? 224u << 23 : 112u << 23;
  const float normal = bits_float((static_cast<uint32_t>(value.bits & 0x7fffu) << 13) + rebias);
  // A mantissa step is 2^-24. Converted from an integer, because flush-to-zero modes would lose a subnormal float.
  const float subnormal = static_cast<float>(static_cast<int32_t>(mantissa)) * 5.9604644775390625e-8f;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  return bits_float(float_bits(exponent == 0 ? subnormal : normal) | sign);
#endif
}

// Rounds to nearest, ties to even; every NaN becomes 0x7fff, as on a GPU.
ACE_HD BFloat16 to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow) : "f"(value));
  return {narrow};
#else
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fffu};  // the carry below would make it a zero
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

// Rounds to nearest, ties to even; overflow gives infinity, NaN stays NaN.
ACE_HD Half to_half(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(value));
  return {narrow};
#else
  const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return {0x7fffu};
  if (size >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // from 65520 on
  if (size < 0x38800000u) {                                                 // below 2^-14: steps of 2^-24
    const float steps = bits_float(size) * 16777216.0f + 8388608.0f;        // 2^23, where a step is 1: rounds
    return {static_cast<uint16_t>(sign | (float_bits(steps) - 0x4b000000u))};
  }
  const uint32_t rounded = size - (112u << 23) + 0xfffu + (size >> 13 & 1u);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

ACE_HD void round_to(float value, float* out) { *out = value; }
ACE_HD void round_to(float value, Half* out) { *out = to_half(value); }
ACE_HD void round_to(float value, BFloat16* out) { *out = to_bfloat16(value); }

ACE_HD float absolute(float value) { return bits_float(float_bits(value) & 0x7fffffffu); }

ACE_HD bool is_finite(float value) { return (float_bits(value) & 0x7f800000u) != 0x7f800000u; }

}  // namespace ace
