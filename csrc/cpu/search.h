// The search for a cut among values that can only be counted: how many entries reach a value.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ace::cpu {

// A range [low, high) of values with the cut in it.
struct Bracket {
  int64_t low, high;
  int64_t from_low;   // how many entries reach `low`: at least keep_k
  int64_t from_high;  // how many reach `high`: fewer than keep_k
};

// Narrows `bracket` down until it holds one value, or exactly keep_k entries reach its lower end, or at most `enough`
// entries lie in it. count(value) says how many entries reach the value; `at` is the value to ask for first.
//
// A count is a pass over a row in the cache or over the matrix, so few should do. Until the cut is bracketed by counted
// values, steps.outward(ranks, room) says how far to go: `ranks` is how many entries too many (> 0) or too few reach
// the value, `room` what is left on that side. Then the search interpolates between the counts at both ends and halves
// the bracket wherever that did not. steps.bracketed(values_per_rank) is told the density found.
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
