// Selections within one row, in plain loops that the compiler vectorises. Results equal those of core/radix_select.h
// and core/nm_select.h; only the algorithm differs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/nm_select.h"
#include "core/radix_select.h"
#include "cpu/multiversion.h"
#include "cpu/outcome.h"
#include "cpu/search.h"

namespace ace::cpu {

// The number of keys that are not below `lowest`.
inline int64_t ACE_MULTIVERSION count_from(const uint32_t* keys, int64_t n, uint32_t lowest) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += 1 << 20) {  // 32-bit counts within a stretch: twice as many lanes
    const int64_t end = std::min<int64_t>(n, begin + (1 << 20));
    uint32_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += keys[i] >= lowest;
    total += count;
  }
  return total;
}

// The smallest key that is not below `lowest`; there must be one. Keys below wrap around to large distances.
inline uint32_t ACE_MULTIVERSION smallest_from(const uint32_t* keys, int64_t n, uint32_t lowest) {
  uint32_t nearest = 0xffffffffu;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t distance = keys[i] - lowest;
    nearest = distance < nearest ? distance : nearest;
  }
  return lowest + nearest;
}

// Outward steps of search_kth: four times as far each time, at most half of the remaining range.
struct KeySteps {
  int64_t step = int64_t{1} << 16;

  int64_t outward(int64_t ranks, int64_t room) {
    const int64_t move = std::min(step, std::max<int64_t>(room / 2, 1));
    step = std::min(step * 4, int64_t{1} << 30);
    return ranks > 0 ? move : -move;
  }
  void bracketed(double) {}
};

// The cut that keeps exactly keep_k of keys[0..n), by a search over the values of the keys. It starts at `hint`, the
// last row's cut, because rows of a weight resemble each other. Rows whose scales differ by a fifth took about twelve
// passes, half the time of a histogram's dependent increments.
inline Cut search_kth(const uint32_t* keys, int64_t n, int64_t keep_k, uint32_t* hint) {
  if (keep_k <= 0) return kKeepNone;
  if (keep_k >= n) return keep_from(smallest_from(keys, n, 0u));
  const auto count = [&](int64_t key) { return count_from(keys, n, static_cast<uint32_t>(key)); };
  // No finite score has a key of 0 or 0xffffffff.
  const Bracket found = search_cut(count, {0, 0xffffffff, n, 0}, keep_k, 0, *hint, KeySteps{});
  *hint = static_cast<uint32_t>(found.low);
  if (found.from_low == keep_k) return keep_from(smallest_from(keys, n, *hint));
  return {*hint, keep_k - found.from_high};
}

template <class Out>
ACE_MULTIVERSION void keep_reaching(Out out, const uint32_t* keys, int64_t cols, uint32_t lowest_kept) {
  for (int64_t j = 0; j < cols; ++j) out.put(j, keys[j] >= lowest_kept);
}

inline int64_t ACE_MULTIVERSION count_equal(const uint32_t* keys, int64_t cols, uint32_t key) {
  int64_t count = 0;
  for (int64_t j = 0; j < cols; ++j) count += keys[j] == key;
  return count;
}

// The index after the first `ties` keys that equal `key`.
inline int64_t end_of_ties(const uint32_t* keys, int64_t cols, uint32_t key, int64_t ties) {
  int64_t j = 0;
  for (; j < cols && ties > 0; ++j) ties -= keys[j] == key;
  return j;
}

// Applies the cut.
template <class Out>
void apply_cut(Out out, const uint32_t* keys, int64_t cols, Cut cut) {
  const int64_t split = end_of_ties(keys, cols, cut.key, cut.ties);
  keep_reaching(out, keys, split, cut.key);
  if (cut.key == kKeepNone.key) {
    for (int64_t j = split; j < cols; ++j) out.put(j, false);
  } else {
    keep_reaching(out.from(split), keys + split, cols - split, cut.key + 1u);
  }
}

#if defined(__GNUC__) && !defined(__clang__)  // clang has another shuffle builtin
#define ACE_KEY_VECTORS

constexpr int kLanes = 16;
typedef uint32_t KeyVector __attribute__((vector_size(kLanes * sizeof(uint32_t))));

// Marks with all ones those of 16 keys, in whole groups of kGroup, that are among the best keep_n of their group. A
// key's rank is counted by rotating every group by one, two, ... places and comparing lane by lane. A key from a lower
// column wins a tie: 1 is added to it, which cannot overflow, because no finite score has the highest key.
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
    rank -= static_cast<KeyVector>(other > keys);  // true is all ones, which is -1
  }
  kept = static_cast<KeyVector>(rank < keep_n);
}

// Applies `kept` to 16 columns: all ones where a column is kept.
template <class T>
ACE_HD void put_lanes(const PruneRow<T>& out, int64_t j, const KeyVector& kept) {
  typedef Bits<T> WeightVector __attribute__((vector_size(kLanes * sizeof(Bits<T>))));
  WeightVector weight;
  std::memcpy(&weight, out.weight + j, sizeof weight);
  weight &= __builtin_convertvector(kept, WeightVector);
  std::memcpy(out.weight + j, &weight, sizeof weight);
}

ACE_HD void put_lanes(const MaskRow& out, int64_t j, const KeyVector& kept) {
  typedef uint8_t MaskVector __attribute__((vector_size(kLanes)));
  const MaskVector mask = __builtin_convertvector(kept, MaskVector) & 1;
  std::memcpy(out.mask + j, &mask, sizeof mask);
}

// Keeps the best keep_n of each group, 16 columns at a time; returns how many columns are done.
template <int kGroup, class Out>
ACE_MULTIVERSION int64_t keep_best_by_vector(Out out, const uint32_t* keys, int64_t cols, int keep_n) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) {
    KeyVector key, kept;
    std::memcpy(&key, keys + j, sizeof key);
    best_of_groups<kGroup>(key, static_cast<uint32_t>(keep_n), kept);
    put_lanes(out, j, kept);
  }
  return j;
}

#endif

// Keeps the best keep_n of each group of group_m keys, one group at a time.
template <class Out>
ACE_MULTIVERSION void keep_best_of_each(Out out, const uint32_t* keys, int64_t cols, int group_m, int keep_n) {
  for (int64_t j = 0; j < cols; j += group_m) {
    const uint32_t kept = keep_best<0>(keys + j, group_m, keep_n);
    for (int g = 0; g < group_m; ++g) out.put(j + g, (kept >> g & 1u) != 0);
  }
}

// For any group size; the sizes of cpu/nm_rows.h are faster there.
template <class Out>
void keep_best_of_groups(Out out, const uint32_t* keys, int64_t cols, int group_m, int keep_n) {
  int64_t done = 0;
#if defined(ACE_KEY_VECTORS)
  if (group_m == 16) done = keep_best_by_vector<16>(out, keys, cols, keep_n);
#endif
  keep_best_of_each(out.from(done), keys + done, cols - done, group_m, keep_n);
}

}  // namespace ace::cpu
