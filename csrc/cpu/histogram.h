// Counts of key digits over a whole matrix: the passes of a radix selection of a group larger than a row.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "core/radix_select.h"
#include "cpu/score_rows.h"

namespace ace::cpu {

// counts[d] += keys[0..n) that agree with `prefix` above this pass's digit and have the digit d. One function for all
// formulas and dtypes: when it was inlined in each, some of GCC's loops were half as fast as others.
inline void ACE_MULTIVERSION count_digits(const uint32_t* keys, int64_t n, uint32_t prefix, int pass, int64_t* counts) {
  const RadixDigit digit = radix_digit(pass);
  if (pass == 0) {
    for (int64_t i = 0; i < n; ++i) ++counts[keys[i] >> digit.shift];
    return;
  }
  // Keys that agree with the prefix form a range, [low, low + span]. Stretches without any are common.
  const uint32_t span = (1u << (digit.shift + digit.bits)) - 1u, low = prefix & ~span;
  constexpr int64_t kStretch = 32;
  int64_t i = 0;
  for (; i + kStretch <= n; i += kStretch) {
    uint32_t found = 0;
    for (int64_t j = i; j < i + kStretch; ++j) found |= static_cast<uint32_t>(keys[j] - low <= span);
    if (found == 0) continue;
    for (int64_t j = i; j < i + kStretch; ++j) {
      if (keys[j] - low <= span) ++counts[(keys[j] - low) >> digit.shift];
    }
  }
  for (; i < n; ++i) {
    if (keys[i] - low <= span) ++counts[(keys[i] - low) >> digit.shift];
  }
}

// counts[d]: keys that agree with `prefix` above this pass's digit and have the digit d. Raises if a score is not
// finite. Counts are integers, so the order in which threads add theirs does not matter.
template <class Matrix>
std::vector<int64_t> matrix_histogram(const Matrix& matrix, uint32_t prefix, int pass) {
  std::vector<int64_t> total(static_cast<size_t>(radix_bins(pass)));
  std::mutex mutex;
  struct Local {  // a thread's own counts, added to the total after its rows
    std::vector<int64_t>& total;
    std::mutex& mutex;
    std::vector<uint32_t> keys;
    std::vector<int64_t> counts;
    ~Local() {
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t d = 0; d < counts.size(); ++d) total[d] += counts[d];
    }
  };
  matrix.for_rows_or_report([&] {
    std::unique_ptr<Local> local(new Local{total, mutex, std::vector<uint32_t>(static_cast<size_t>(matrix.cols())),
                                           std::vector<int64_t>(total.size())});
    return [&matrix, prefix, pass, local = std::move(local)](int64_t i) {
      const bool finite = row_keys<typename Matrix::Formula>(matrix.row(i), local->keys.data());
      count_digits(local->keys.data(), matrix.cols(), prefix, pass, local->counts.data());
      return finite;
    };
  });
  return total;
}

}  // namespace ace::cpu
