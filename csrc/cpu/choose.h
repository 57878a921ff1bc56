// Selection by a mask in loops that the compiler vectorises.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace ace::cpu {

// Zeros and ones as bytes: GCC does not vectorise loads of bool.
inline const uint8_t* bytes(const bool* mask) { return reinterpret_cast<const uint8_t*>(mask); }

// `if_true` or `if_false` without a branch, which would prevent vectorisation.
ACE_HD float choose(uint32_t all_bits_if_true, float if_true, float if_false) {
  return bits_float((float_bits(if_true) & all_bits_if_true) | (float_bits(if_false) & ~all_bits_if_true));
}

ACE_HD uint32_t all_bits(uint32_t zero_or_one) { return 0u - zero_or_one; }

}  // namespace ace::cpu
