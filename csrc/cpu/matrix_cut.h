// The cut (selection threshold) of a whole matrix, found in a few counting passes.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <mutex>
#include <vector>

#include "cpu/histogram.h"
#include "cpu/row_places.h"

namespace ace::cpu {

constexpr int64_t kSmallMatrix = 1 << 16;   // entries; for fewer, the radix passes cost less than sampling
constexpr int64_t kEntriesPerSample = 256;  // keeps samples and candidates below 1 % of a 16-bit weight's bytes
constexpr int64_t kMostSamples = 1 << 16;
constexpr int64_t kEntriesPerCandidate = 512;

struct MatrixScale {
  PlaceScale scale;
  PlaceHint hint;
  bool valid;
};

// A scale that most likely contains the cut: from a sample of one entry in each stretch of the matrix, five standard
// errors to either side. The entry is random, because a fixed stride would sample the same columns in every row.
template <class Matrix>
MatrixScale sampled_scale(const Matrix& matrix, int64_t keep_k) {
  const int64_t total = matrix.rows() * matrix.cols();
  const int64_t stretch = std::max(kEntriesPerSample, total / kMostSamples), count = total / stretch;
  std::vector<float> sample(static_cast<size_t>(count));
  for (int64_t s = 0; s < count; ++s) {
    const int64_t at = s * stretch + static_cast<int64_t>(static_cast<uint32_t>(s) * 2654435761u >> 8) % stretch;
    sample[static_cast<size_t>(s)] =
        score_at<typename Matrix::Formula>(matrix.row(at / matrix.cols()), at % matrix.cols());
  }
  const double share = static_cast<double>(keep_k) / static_cast<double>(total);
  const auto margin = 1 + static_cast<int64_t>(5.0 * std::sqrt(share * (1.0 - share) * static_cast<double>(count)));
  const auto score_of_rank = [&](int64_t rank) {
    const auto nth = sample.begin() + std::min(std::max<int64_t>(rank, 0), count - 1);
    std::nth_element(sample.begin(), nth, sample.end(), std::greater<float>());
    return *nth;
  };
  const auto rank = static_cast<int64_t>(share * static_cast<double>(count));
  const float low = score_of_rank(rank + margin), middle = score_of_rank(rank), high = score_of_rank(rank - margin);
  if (!(low < high) || !is_finite(high - low)) return {{}, {}, false};
  const PlaceScale scale = place_scale(low, high);
  const double places_per_rank = static_cast<double>(kPlaces) / static_cast<double>(2 * margin * stretch);
  return {scale, {place_of(middle, scale), places_per_rank}, true};
}

// Calls body(places of row i, i, result of the thread) for every row; combine(result) for every thread's result.
template <class Result, class Matrix, class Body, class Combine>
void for_places(const Matrix& matrix, PlaceScale scale, Body&& body, Combine&& combine) {
  std::mutex mutex;
  matrix.for_rows([&](int64_t begin, int64_t end) {
    std::vector<uint16_t> places(static_cast<size_t>(matrix.cols()));
    Result result{};
    for (int64_t i = begin; i < end; ++i) {
      row_places<typename Matrix::Formula>(matrix.row(i), scale, places.data());
      body(places.data(), i, result);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    combine(result);
  });
}

// The number of entries at or above `place`.
template <class Matrix>
int64_t count_matrix_places(const Matrix& matrix, PlaceScale scale, int64_t place) {
  int64_t total = 0;
  for_places<int64_t>(
      matrix, scale,
      [&](const uint16_t* places, int64_t, int64_t& count) {
        count += count_places(places, matrix.cols(), static_cast<uint16_t>(place));
      },
      [&](int64_t count) { total += count; });
  return total;
}

// The keys of the entries in the cut's bracket, in no particular order.
template <class Matrix>
std::vector<uint32_t> keys_within(const Matrix& matrix, PlaceScale scale, const Bracket& cut) {
  std::vector<uint32_t> all;
  all.reserve(static_cast<size_t>(cut.from_low - cut.from_high));
  const int64_t cols = matrix.cols();
  for_places<std::vector<uint32_t>>(
      matrix, scale,
      [&](const uint16_t* places, int64_t i, std::vector<uint32_t>& keys) {
        for (int64_t j = 0; (j = next_within(places, j, cols, cut.low, cut.high)) < cols; ++j) {
          keys.push_back(order_key(score_at<typename Matrix::Formula>(matrix.row(i), j)));
        }
      },
      [&](const std::vector<uint32_t>& keys) { all.insert(all.end(), keys.begin(), keys.end()); });
  return all;
}

// The cut by core/radix_select.h's passes, whatever the scores are.
template <class Matrix>
Cut radix_matrix_cut(const Matrix& matrix, int64_t keep_k) {
  Cut cut{0u, keep_k};
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    const std::vector<int64_t> counts = matrix_histogram(matrix, cut.key, pass);
    const RadixBin found = find_bin(counts.data(), radix_bins(pass), cut.ties);
    cut.key |= found.bin << radix_digit(pass).shift;
    cut.ties -= found.above;
  }
  return cut;
}

// The cut that keeps exactly keep_k entries of the matrix, 0 <= keep_k <= rows * cols. Scores must be finite.
//
// On a sampled scale, counts of places narrow the cut to a few thousand entries, whose keys are gathered and decide it.
// Radix passes handle small matrices, cuts outside the scale and cuts among very many ties.
template <class Matrix>
Cut find_matrix_cut(const Matrix& matrix, int64_t keep_k) {
  const int64_t total = matrix.rows() * matrix.cols();
  if (keep_k == 0) return kKeepNone;
  if (total < kSmallMatrix || keep_k == total) return radix_matrix_cut(matrix, keep_k);
  MatrixScale sampled = sampled_scale(matrix, keep_k);
  if (!sampled.valid) return radix_matrix_cut(matrix, keep_k);
  const int64_t enough = total / kEntriesPerCandidate;
  const Bracket found = search_places([&](int64_t at) { return count_matrix_places(matrix, sampled.scale, at); }, total,
                                      keep_k, enough, &sampled.hint);
  if (found.from_low - found.from_high > enough) return radix_matrix_cut(matrix, keep_k);
  std::vector<uint32_t> keys = keys_within(matrix, sampled.scale, found);
  const auto last = keys.begin() + (keep_k - found.from_high - 1);
  std::nth_element(keys.begin(), last, keys.end(), std::greater<uint32_t>());
  const uint32_t key = *last;
  const auto above = std::count_if(keys.begin(), keys.end(), [&](uint32_t other) { return other > key; });
  const auto equal = std::count(keys.begin(), keys.end(), key);
  const int64_t ties = keep_k - found.from_high - above;
  return ties == equal ? keep_from(key) : Cut{key, ties};
}

}  // namespace ace::cpu
