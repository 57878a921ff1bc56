// Counts of key digits over a whole matrix: the passes of a radix selection whose group is larger than a row.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "core/radix_select.h"
#include "cpu/score_rows.h"

namespace ace::cpu {

// counts[d]: keys that agree with `prefix` above this pass's digit and have the digit d. Raises where a score is not
// finite. Counts are integers, so the order in which threads add theirs does not matter.
template <class Matrix>
std::vector<int64_t> matrix_histogram(const Matrix& matrix, uint32_t prefix, int pass) {
  std::vector<int64_t> total(static_cast<size_t>(radix_bins(pass)));
  std::mutex mutex;
  struct Local {  // a thread's own counts, added to the total when it has done its rows
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
      for (const uint32_t key : local->keys) {
        if (radix_matches(key, prefix, pass)) ++local->counts[radix_bin(key, pass)];
      }
      return finite;
    };
  });
  return total;
}

}  // namespace ace::cpu
