// A row's scores quantised to 16-bit bins ("places") on a linear scale, and the search for a cut among them. Places are
// half the size of keys: twice the lanes for each vector instruction, and a row of 11008 columns stays in the
// first-level cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/outcome.h"
#include "cpu/search.h"

namespace ace::cpu {

constexpr int64_t kPlaces = 1 << 16;

// Scores from `low` to `high` map evenly to the places 0 to 65535; scores outside are clamped. A higher score never
// gets a lower place, because each step of the formula rounds monotonically: places have the order of scores, with more
// ties.
struct PlaceScale {
  float low, high, places_per_score;
};

// low < high, both finite.
inline PlaceScale place_scale(float low, float high) {
  constexpr float kSteepest = 1e30f;  // avoids 0 * infinity if high - low is tiny
  return {low, high, std::min(static_cast<float>(kPlaces - 1) / (high - low), kSteepest)};
}

ACE_HD uint16_t place_of(float score, PlaceScale scale) {
  const float raised = score > scale.low ? score : scale.low;
  const float clamped = raised < scale.high ? raised : scale.high;
  // Converts through a signed integer, for which all instruction sets have a vector conversion.
  return static_cast<uint16_t>(static_cast<int32_t>((clamped - scale.low) * scale.places_per_score));
}

template <class F, class T>
ACE_MULTIVERSION void row_places(ScoredRow<T> row, PlaceScale scale, uint16_t* places) {
  for (int64_t j = 0; j < row.cols; ++j) places[j] = place_of(score_at<F>(row, j), scale);
}

// The number of places that are not below `lowest`.
inline int64_t ACE_MULTIVERSION count_places(const uint16_t* places, int64_t n, uint16_t lowest) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += 1 << 15) {  // a stretch whose count fits 16 bits
    const int64_t end = std::min<int64_t>(n, begin + (1 << 15));
    uint16_t count = 0;
    for (int64_t j = begin; j < end; ++j) count = static_cast<uint16_t>(count + (places[j] >= lowest));
    total += count;
  }
  return total;
}

// The index of the next place in [low, high), from `begin` on; n if there is none.
inline int64_t ACE_MULTIVERSION next_within(const uint16_t* places, int64_t begin, int64_t n, int64_t low,
                                            int64_t high) {
  const uint16_t lowest = static_cast<uint16_t>(low), span = static_cast<uint16_t>(high - 1 - low);
  constexpr int64_t kStretch = 128;
  for (; begin + kStretch <= n; begin += kStretch) {
    uint16_t found = 0;
    for (int64_t j = begin; j < begin + kStretch; ++j) {
      found |= static_cast<uint16_t>(static_cast<uint16_t>(places[j] - lowest) <= span);
    }
    if (found != 0) break;
  }
  for (; begin < n; ++begin) {
    if (static_cast<uint16_t>(places[begin] - lowest) <= span) break;
  }
  return begin;
}

// Keeps columns whose place is not below `lowest`; returns the smallest kept place. There must be one.
template <class Out>
ACE_MULTIVERSION uint16_t keep_from_place(Out out, const uint16_t* places, int64_t n, uint16_t lowest) {
  uint16_t nearest = 0xffffu;  // of the distances; places below wrap around to large distances
  for (int64_t j = 0; j < n; ++j) {
    const uint16_t distance = static_cast<uint16_t>(places[j] - lowest);
    nearest = distance < nearest ? distance : nearest;
    out.put(j, places[j] >= lowest);
  }
  return static_cast<uint16_t>(lowest + nearest);
}

// Where a search starts, and what it learns for the next row: rows of a weight resemble each other.
struct PlaceHint {
  int64_t place = kPlaces / 2;   // of the last cut
  double places_per_rank = 1.0;  // there
};

// Outward steps by the hint's density, doubled each time; learns the density from the first bracket.
struct PlaceSteps {
  PlaceHint* hint;
  double stretch = 1.0;
  bool learned = false;

  int64_t outward(int64_t ranks, int64_t) {
    const double move = static_cast<double>(ranks) * hint->places_per_rank * stretch;
    stretch *= 2;
    return static_cast<int64_t>(std::min(std::max(move, -65536.0), 65536.0)) + (ranks > 0 ? 1 : -1);
  }
  void bracketed(double places_per_rank) {
    if (!learned) hint->places_per_rank += (places_per_rank - hint->places_per_rank) / 4;
    learned = true;
  }
};

// A bracket of places around the cut that keeps keep_k of n, 0 < keep_k < n. The search starts at the hint.
template <class Count>
Bracket search_places(Count&& count, int64_t n, int64_t keep_k, int64_t enough, PlaceHint* hint) {
  const Bracket found = search_cut(count, {0, kPlaces, n, 0}, keep_k, enough, hint->place, PlaceSteps{hint});
  hint->place = found.low;
  return found;
}

}  // namespace ace::cpu
