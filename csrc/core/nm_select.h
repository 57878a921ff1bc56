// N:M selection of one group: the best keep_n of group_m keys, a lower column first among equal ones.
#pragma once

#include "core/scalar.h"

namespace ace {

constexpr int kMaxGroup = 32;

// Bit i set where key i is kept. kGroup > 0 fixes the size of the group at compile time, so that all unrolls into
// registers; kGroup = 0 reads group_m (at most kMaxGroup). A key's rank is the number of keys before it in the order.
template <int kGroup>
ACE_HD uint32_t keep_best(const uint32_t* keys, int group_m, int keep_n) {
  const int size = kGroup > 0 ? kGroup : group_m;
  uint32_t kept = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < size; ++i) {
    int rank = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int j = 0; j < size; ++j) rank += j < i ? keys[j] >= keys[i] : keys[j] > keys[i];
    kept |= static_cast<uint32_t>(rank < keep_n) << i;
  }
  return kept;
}

}  // namespace ace
