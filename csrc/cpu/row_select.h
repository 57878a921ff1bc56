// Selections within one row, by vector instructions that the compiler makes of plain loops. The results are those of
// core/radix_select.h and core/nm_select.h; only the way there differs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/nm_select.h"
#include "core/radix_select.h"
#include "cpu/multiversion.h"

namespace ace {

// How many keys are not below `lowest`.
inline int64_t ACE_MULTIVERSION count_from(const uint32_t* keys, int64_t n, uint32_t lowest) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += 1 << 20) {  // 32-bit counts within a stretch: twice the lanes
    const int64_t end = std::min<int64_t>(n, begin + (1 << 20));
    uint32_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += keys[i] >= lowest;
    total += count;
  }
  return total;
}

// The smallest key that is not below `lowest`; there must be one. Keys below wrap round to distances that are too
// large.
inline uint32_t ACE_MULTIVERSION smallest_from(const uint32_t* keys, int64_t n, uint32_t lowest) {
  uint32_t nearest = 0xffffffffu;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t distance = keys[i] - lowest;
    nearest = distance < nearest ? distance : nearest;
  }
  return lowest + nearest;
}

// The cut that keeps exactly keep_k of keys[0..n): what select_kth finds, by a search over the values of the keys.
//
// A count of the keys above a value is one fast pass over a row that lies in the cache, so the search makes as few as
// it can: it starts at `hint`, the last row's cut, since rows of a weight resemble each other; steps outward until the
// cut is bracketed; then interpolates between the counts at both ends, halving the bracket wherever that did not. Rows
// whose scales differ by a fifth took some twelve passes, half the time of a histogram's dependent increments.
inline Cut search_kth(const uint32_t* keys, int64_t n, int64_t keep_k, uint32_t* hint) {
  if (keep_k <= 0) return kKeepNone;
  if (keep_k >= n) return keep_from(smallest_from(keys, n, 0u));
  // At least keep_k keys are >= low, fewer are >= high: no finite score has a key of 0 or 0xffffffff.
  uint32_t low = 0u, high = 0xffffffffu;
  int64_t from_low = n, from_high = 0;
  uint32_t at = std::min(std::max(*hint, 1u), 0xfffffffeu);
  uint32_t step = 1u << 16;
  bool halve = false;
  while (high - low > 1) {
    const int64_t count = count_from(keys, n, at);
    if (count == keep_k) {
      *hint = at;
      return keep_from(smallest_from(keys, n, at));
    }
    const uint32_t width = high - low;
    (count > keep_k ? low : high) = at;
    (count > keep_k ? from_low : from_high) = count;
    if (low == 0u || high == 0xffffffffu) {  // not bracketed yet
      const uint32_t room = count > keep_k ? high - at : at - low;
      const uint32_t move = std::min(step, room > 1 ? room / 2 : 1);
      at = count > keep_k ? at + move : at - move;
      step = step > (1u << 28) ? step : step * 4;
    } else if (halve) {
      at = low + (high - low) / 2;
      halve = false;
    } else {
      const double share = static_cast<double>(from_low - keep_k) / static_cast<double>(from_low - from_high);
      at = low + static_cast<uint32_t>(share * static_cast<double>(high - low));
      halve = high - low > width / 2;
    }
    if (high - low > 1) at = std::min(std::max(at, low + 1), high - 1);
  }
  *hint = low;
  return {low, keep_k - from_high};
}

template <class B>
ACE_MULTIVERSION void zero_below(B* weight, const uint32_t* keys, int64_t cols, uint32_t lowest_kept) {
  for (int64_t j = 0; j < cols; ++j) weight[j] = keys[j] >= lowest_kept ? weight[j] : B{0};
}

inline int64_t ACE_MULTIVERSION count_equal(const uint32_t* keys, int64_t cols, uint32_t key) {
  int64_t count = 0;
  for (int64_t j = 0; j < cols; ++j) count += keys[j] == key;
  return count;
}

// Where the first `ties` keys equal to `key` end.
inline int64_t end_of_ties(const uint32_t* keys, int64_t cols, uint32_t key, int64_t ties) {
  int64_t j = 0;
  for (; j < cols && ties > 0; ++j) ties -= keys[j] == key;
  return j;
}

// Zeroes what the cut does not keep.
template <class B>
void apply_cut(B* weight, const uint32_t* keys, int64_t cols, Cut cut) {
  const int64_t split = end_of_ties(keys, cols, cut.key, cut.ties);
  zero_below(weight, keys, split, cut.key);
  if (cut.key == kKeepNone.key) {
    std::fill(weight + split, weight + cols, B{0});
  } else {
    zero_below(weight + split, keys + split, cols - split, cut.key + 1u);
  }
}

#if defined(__GNUC__) && !defined(__clang__)  // clang shuffles by other means
#define ACE_KEY_VECTORS

constexpr int kLanes = 16;
typedef uint32_t KeyVector __attribute__((vector_size(kLanes * sizeof(uint32_t))));

// Marks (all ones) which of 16 keys, whole groups of kGroup side by side, are among the best keep_n of their group. A
// key's rank is counted by turning every group round by one, two, ... places and comparing lane by lane. A key that
// comes from a lower column wins a tie: one is added to it, which cannot overflow, as no finite score has the highest
// key.
template <int kGroup>
ACE_HD void best_of_groups(const KeyVector& keys, uint32_t keep_n, KeyVector& kept) {
  KeyVector rank = {};
#pragma GCC unroll 16
  for (int turn = 1; turn < kGroup; ++turn) {
    KeyVector from, wins_tie;
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) {
      const int place = lane % kGroup, source = (place + turn) % kGroup;
      from[lane] = static_cast<uint32_t>(lane - place + source);
      wins_tie[lane] = source < place;
    }
    const KeyVector other = __builtin_shuffle(keys, from) + wins_tie;
    rank -= static_cast<KeyVector>(other > keys);  // true is all ones, minus one
  }
  kept = static_cast<KeyVector>(rank < keep_n);
}

// Zeroes all but the best keep_n of each group, 16 columns at a time; returns how many columns are done.
template <int kGroup, class Bits>
ACE_MULTIVERSION int64_t keep_best_by_vector(Bits* weight, const uint32_t* keys, int64_t cols, int keep_n) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) {
    KeyVector key, kept;
    std::memcpy(&key, keys + j, sizeof key);
    best_of_groups<kGroup>(key, static_cast<uint32_t>(keep_n), kept);
    typedef Bits WeightVector __attribute__((vector_size(kLanes * sizeof(Bits))));
    WeightVector kept_weight;
    std::memcpy(&kept_weight, weight + j, sizeof kept_weight);
    kept_weight &= __builtin_convertvector(kept, WeightVector);
    std::memcpy(weight + j, &kept_weight, sizeof kept_weight);
  }
  return j;
}

#endif

// Zeroes all but the best keep_n of each group of group_m keys, one group at a time.
template <class Bits>
ACE_MULTIVERSION void keep_best_of_each(Bits* weight, const uint32_t* keys, int64_t cols, int group_m, int keep_n) {
  for (int64_t j = 0; j < cols; j += group_m) {
    const uint32_t kept = keep_best<0>(keys + j, group_m, keep_n);
    for (int g = 0; g < group_m; ++g) weight[j + g] = (kept >> g & 1u) != 0 ? weight[j + g] : Bits{0};
  }
}

// For any size of group; the sizes that cpu/nm_rows.h is made for are faster there.
template <class Bits>
void keep_best_of_groups(Bits* weight, const uint32_t* keys, int64_t cols, int group_m, int keep_n) {
  int64_t done = 0;
#if defined(ACE_KEY_VECTORS)
  if (group_m == 16) done = keep_best_by_vector<16>(weight, keys, cols, keep_n);
#endif
  keep_best_of_each(weight + done, keys + done, cols - done, group_m, keep_n);
}

}  // namespace ace
