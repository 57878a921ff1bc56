// The search for a cut by counts alone: how many entries are at or above a value.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ace::cpu {

// A range [low, high) of values that contains the cut.
struct Bracket {
  int64_t low, high;
  int64_t from_low;   // entries at or above `low`: at least keep_k
  int64_t from_high;  // entries at or above `high`: fewer than keep_k
};

// Narrows `bracket` until it holds one value, or exactly keep_k entries are at or above its lower end, or at most
// `enough` entries lie in it. count(value) returns the number of entries at or above the value; `at` is the first value
// to count.
//
// A count is a pass over a row in the cache or over the matrix, so few counts should suffice. Until counted values
// bracket the cut, steps.outward(ranks, room) returns how far to go: `ranks` is the surplus (> 0) or shortage of
// entries at or above the value, `room` the remaining range on that side. Then the search interpolates between the
// counts at both ends, and bisects if the last interpolation did not halve the bracket.
// steps.bracketed(values_per_rank) receives the density found.
template <class Count, class Steps>
Bracket search_cut(Count&& count, Bracket bracket, int64_t keep_k, int64_t enough, int64_t at, Steps&& steps) {
  const Bracket all = bracket;
  auto& [low, high, from_low, from_high] = bracket;
  bool halve = false;
  while (true) {
    at = std::min(std::max(at, low + 1), high - 1);
    const int64_t width = high - low, reached = count(at);
    (reached >= keep_k ? low : high) = at;
    (reached >= keep_k ? from_low : from_high) = reached;
    if (from_low == keep_k || high - low == 1 || from_low - from_high <= enough) return bracket;
    if (low == all.low || high == all.high) {
      at += steps.outward(reached - keep_k, reached >= keep_k ? high - at : at - low);
      continue;
    }
    const double values_per_rank = static_cast<double>(high - low) / static_cast<double>(from_low - from_high);
    steps.bracketed(values_per_rank);
    at = low +
         (halve ? (high - low) / 2 : static_cast<int64_t>(static_cast<double>(from_low - keep_k) * values_per_rank));
    halve = !halve && high - low > width / 2;
  }
}

}  // namespace ace::cpu
