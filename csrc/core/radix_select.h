// Radix selection of the k-th largest of n keys, in three passes over digits of 11, 11 and 10 bits from the top. Each
// pass counts, by the next digit, the keys that have the digits found so far. The selection stops early if all
// remaining keys are kept.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/order_key.h"

namespace ace {

struct RadixDigit {
  int shift;
  int bits;
};

constexpr int kRadixPasses = 3;
constexpr int kRadixBins = 2048;  // of the widest digit

ACE_HD constexpr RadixDigit radix_digit(int pass) {
  return pass == 0 ? RadixDigit{21, 11} : pass == 1 ? RadixDigit{10, 11} : RadixDigit{0, 10};
}

ACE_HD constexpr int radix_bins(int pass) { return 1 << radix_digit(pass).bits; }

ACE_HD constexpr uint32_t radix_bin(uint32_t key, int pass) {
  return (key >> radix_digit(pass).shift) & (static_cast<uint32_t>(radix_bins(pass)) - 1u);
}

// Whether the key has the digits of `prefix` above this pass's digit.
ACE_HD constexpr bool radix_matches(uint32_t key, uint32_t prefix, int pass) {
  return pass == 0 || ((key ^ prefix) >> (radix_digit(pass).shift + radix_digit(pass).bits)) == 0;
}

// The threshold of a selection: keeps every key above `key`, and the first `ties` in index order of those equal to it.
struct Cut {
  uint32_t key;
  int64_t ties;
};

constexpr Cut kKeepNone{0xffffffffu, 0};

// The cut that keeps every key >= `key`. No finite score has key 0, so this cannot wrap.
ACE_HD constexpr Cut keep_from(uint32_t key) { return {key - 1u, 0}; }

// The smallest kept score; +inf if none is kept. Assumes a cut of this file, where some key equals the lower end.
ACE_HD float cut_threshold(Cut cut) {
  if (cut.ties > 0) return key_score(cut.key);
  return cut.key == kKeepNone.key ? bits_float(0x7f800000u) : key_score(cut.key + 1u);
}

struct RadixBin {
  uint32_t bin;
  int64_t above;  // keys in higher bins
  int64_t count;  // keys in this one
};

// The bin of the want-th largest key, want in [1, sum of counts].
template <class Count>
ACE_HD RadixBin find_bin(const Count* counts, int bins, int64_t want) {
  int64_t above = 0;
  int bin = bins - 1;
  while (bin > 0 && above + static_cast<int64_t>(counts[bin]) < want) above += static_cast<int64_t>(counts[bin--]);
  return {static_cast<uint32_t>(bin), above, static_cast<int64_t>(counts[bin])};
}

}  // namespace ace
