// The k-th largest of n keys by the passes of core/radix_select.h, in one thread: the reference for the back ends'
// searches.
#pragma once

#include <cstring>

#include "core/radix_select.h"

namespace ace {

inline uint32_t smallest_key(const uint32_t* keys, int64_t n) {
  uint32_t smallest = 0xffffffffu;
  for (int64_t i = 0; i < n; ++i) smallest = keys[i] < smallest ? keys[i] : smallest;
  return smallest;
}

// The cut that keeps exactly keep_k of keys[0..n). `scratch` has room for n keys: the candidates of a pass's bin are
// gathered there, so that later passes read few. `counts` has kRadixBins entries.
inline Cut select_kth(const uint32_t* keys, int64_t n, int64_t keep_k, uint32_t* scratch, uint32_t* counts) {
  if (keep_k <= 0) return kKeepNone;
  if (keep_k >= n) return keep_from(smallest_key(keys, n));
  const uint32_t* from = keys;
  uint32_t prefix = 0;
  int64_t left = n, want = keep_k;
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    std::memset(counts, 0, sizeof(uint32_t) * static_cast<size_t>(radix_bins(pass)));
    for (int64_t i = 0; i < left; ++i) ++counts[radix_bin(from[i], pass)];
    const RadixBin found = find_bin(counts, radix_bins(pass), want);
    prefix |= found.bin << radix_digit(pass).shift;
    want -= found.above;
    if (pass == kRadixPasses - 1) break;
    int64_t gathered = 0;
    for (int64_t i = 0; i < left; ++i) {
      const uint32_t key = from[i];
      scratch[gathered] = key;  // gathered <= i: safe in place when `from` is the scratch itself
      gathered += radix_bin(key, pass) == found.bin;
    }
    from = scratch;
    left = gathered;
    if (want == left) return keep_from(smallest_key(from, left));
  }
  return {prefix, want};
}

}  // namespace ace
