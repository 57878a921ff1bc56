// Scores as unsigned integers of the same order, so that selections compare and count integers only.
#pragma once

#include "core/scalar.h"

namespace ace {

// a < b as floats exactly where order_key(a) < order_key(b) as unsigned. -0.0 and +0.0 get the same key, since they are
// equal scores. 16-bit types widen exactly, so one kind of key serves all types. NaN has no key: callers refuse scores
// that are not finite.
ACE_HD uint32_t order_key(float score) {
#if defined(__CUDA_ARCH__)  // the same in fewer instructions; not on a host, which may flush subnormal numbers to zero
  const uint32_t own = float_bits(score + 0.0f);  // -0 becomes +0
  const uint32_t sign = static_cast<uint32_t>(static_cast<int32_t>(own) >> 31);
  uint32_t key;  // own ^ (sign | 0x80000000)
  asm("lop3.b32 %0, %1, %2, 0x80000000, 0x1e;" : "=r"(key) : "r"(own), "r"(sign));
  return key;
#else
  uint32_t bits = float_bits(score);
  bits = bits == 0x80000000u ? 0u : bits;
  const uint32_t flip = (bits >> 31) != 0 ? 0xffffffffu : 0x80000000u;
  return bits ^ flip;
#endif
}

// The score of this key (+0.0 for both zeros).
ACE_HD float key_score(uint32_t key) {
  const uint32_t flip = (key >> 31) != 0 ? 0x80000000u : 0xffffffffu;
  return bits_float(key ^ flip);
}

}  // namespace ace
