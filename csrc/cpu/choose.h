// Choosing by a mask in loops that the compiler makes vector code of.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace ace::cpu {

// Zeros and ones: GCC makes no vector code of loads of bool.
inline const uint8_t* bytes(const bool* mask) { return reinterpret_cast<const uint8_t*>(mask); }

// `if_true` or `if_false`, without the branch that would keep a loop from becoming vector code.
ACE_HD float choose(uint32_t all_bits_if_true, float if_true, float if_false) {
  return bits_float((float_bits(if_true) & all_bits_if_true) | (float_bits(if_false) & ~all_bits_if_true));
}

ACE_HD uint32_t all_bits(uint32_t zero_or_one) { return 0u - zero_or_one; }

}  // namespace ace::cpu
