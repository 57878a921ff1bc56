// Logic on whole words that the compiler does not find by itself. Each decision is the sign bit of a word, because the
// sign of a difference of floats is their comparison.
#pragma once

#include "cuda/platform.cuh"

namespace ace::cuda {

// The truth table that the instruction takes for a function f of three bits: f applied to these.
constexpr unsigned kBitA = 0xf0, kBitB = 0xcc, kBitC = 0xaa;

// f of each bit of three words, in one instruction.
template <unsigned kTable>
ACE_DEVICE uint32_t bitwise(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return result;
#else
  uint32_t result = 0;
  for (unsigned n = 0; n < 8; ++n) {
    if ((kTable >> n & 1u) != 0) result |= (n & 4u ? a : ~a) & (n & 2u ? b : ~b) & (n & 1u ? c : ~c);
  }
  return result;
#endif
}

// Selects four bytes of two words. The selector has four bits for each: 0 to 3 for `low`, 4 to 7 for `high`; plus 8 for
// the byte's sign. Its upper half is ignored.
ACE_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#else
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (unsigned n = 0; n < 4; ++n) {
    const unsigned choice = selector >> 4 * n & 15u;
    const auto byte = static_cast<uint32_t>(both >> 8 * (choice & 7u) & 255u);
    result |= ((choice & 8u) == 0 ? byte : byte >= 128u ? 255u : 0u) << 8 * n;
  }
  return result;
#endif
}

// The same by a selector that is known to the compiler.
template <unsigned kSelector>
ACE_DEVICE uint32_t bytes_of(uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__)
  if constexpr ((kSelector & 0x8888u) == 0) return __byte_perm(low, high, kSelector);
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "n"(kSelector));
  return result;
#else
  return select_bytes(low, high, kSelector);
#endif
}

constexpr uint32_t kSign = 0x80000000u;

// All ones in the lower half if `low` has its sign bit, and in the upper half if `high` has.
ACE_DEVICE uint32_t halves_of_signs(uint32_t low, uint32_t high) { return bytes_of<0xffbb>(low, high); }

// Whether first < second, as the sign bit. Equal numbers are not less, nor are equal zeros unless `first` is -0.
ACE_DEVICE uint32_t less(float first, float second) { return float_bits(first - second); }

}  // namespace ace::cuda
