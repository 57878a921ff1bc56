// N:M selection of one group: the best keep_n of group_m keys, the lower column first among equal keys.
#pragma once

#include "core/scalar.h"

namespace ace {

constexpr int kMaxGroup = 32;

#if defined(__CUDA_ARCH__)
#define ACE_CORE_UNROLL _Pragma("unroll")
#else
#define ACE_CORE_UNROLL
#endif

// Bit i set where key i is kept; a key's rank is the number of keys before it in the order. Keys are unsigned, or
// floats that are not NaN, whose zeros are equal. kGroup > 0 fixes the group size at compile time: everything unrolls
// into registers, and each pair is compared once. kGroup = 0 reads group_m (at most kMaxGroup).
template <int kGroup, class Key>
ACE_HD uint32_t keep_best(const Key* keys, int group_m, int keep_n) {
  uint32_t kept = 0;
  if constexpr (kGroup > 0) {
    int rank[kGroup];
    ACE_CORE_UNROLL
    for (int i = 0; i < kGroup; ++i) rank[i] = kGroup - 1 - i;  // as if every later key came before it
    ACE_CORE_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      ACE_CORE_UNROLL
      for (int j = i + 1; j < kGroup; ++j) {
        const int first = keys[i] >= keys[j] ? 1 : 0;
        rank[i] -= first;
        rank[j] += first;
      }
    }
    ACE_CORE_UNROLL
    for (int i = 0; i < kGroup; ++i) kept |= static_cast<uint32_t>(rank[i] < keep_n) << i;
  } else {
    for (int i = 0; i < group_m; ++i) {
      int rank = 0;
      for (int j = 0; j < group_m; ++j) rank += j < i ? keys[j] >= keys[i] : keys[j] > keys[i];
      kept |= static_cast<uint32_t>(rank < keep_n) << i;
    }
  }
  return kept;
}

}  // namespace ace
