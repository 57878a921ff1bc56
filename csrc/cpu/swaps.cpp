// refine_swaps_ on the CPU. Rows are independent and divided among the threads; a row's result does not depend on its
// tile.
#include "ops/swaps.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/swap_search.h"

namespace ace::cpu {
namespace {

constexpr int64_t kTileRows = 16;  // that share one read of G when c is first computed
constexpr int64_t kPartOfC = 512;  // of c, which stay in the first-level cache meanwhile

struct GramMatrix {
  const float* data;            // [cols, cols]
  std::vector<float> diagonal;  // [cols]
  std::vector<double> root;     // [cols], of the diagonal
  std::vector<float> near;      // [cols, group_m], rows of G within the column's group; empty without groups
  int64_t cols;
};

GramMatrix gram_matrix(const at::Tensor& gram, int64_t group_m) {
  GramMatrix g{data<float>(gram), {}, {}, {}, gram.size(0)};
  for (int64_t j = 0; j < g.cols; ++j) {
    g.diagonal.push_back(g.data[j * g.cols + j]);
    g.root.push_back(diagonal_root(static_cast<double>(g.diagonal.back())));
    const float* group = g.data + j * g.cols + (group_m > 0 ? j - j % group_m : 0);
    g.near.insert(g.near.end(), group, group + group_m);
  }
  return g;
}

// Swaps do not change how many weights a group keeps, so a mask that violates the pattern would stay so.
void check_pattern(const at::Tensor& mask, int64_t keep_n, int64_t group_m) {
  for (int64_t i = 0; i < mask.size(0); ++i) {
    const bool* row = data<bool>(mask) + i * mask.stride(0);
    for (int64_t j = 0; j < mask.size(1); j += group_m) {
      const int64_t kept = std::count(row + j, row + j + group_m, true);
      TORCH_CHECK_VALUE(kept == keep_n, "refine_swaps_: mask must keep ", keep_n, " of each ", group_m,
                        " columns (got ", kept, " from index [", i, ", ", j, "] on)");
    }
  }
}

// c[0..n) += the sum over the removed columns, in order, of weight_j G_j; each pass over c adds four rows of G.
ACE_MULTIVERSION void add_removed(double* c, int64_t n, const double* weight, const std::vector<int64_t>& removed,
                                  const float* gram, int64_t cols) {
  size_t r = 0;
  for (; r + 4 <= removed.size(); r += 4) {
    const int64_t j0 = removed[r], j1 = removed[r + 1], j2 = removed[r + 2], j3 = removed[r + 3];
    const double w0 = weight[j0], w1 = weight[j1], w2 = weight[j2], w3 = weight[j3];
    const float *g0 = gram + j0 * cols, *g1 = gram + j1 * cols, *g2 = gram + j2 * cols, *g3 = gram + j3 * cols;
    for (int64_t k = 0; k < n; ++k) c[k] = c[k] + w0 * g0[k] + w1 * g1[k] + w2 * g2[k] + w3 * g3[k];
  }
  for (; r < removed.size(); ++r) {
    const double w = weight[removed[r]];
    const float* g = gram + removed[r] * cols;
    for (int64_t k = 0; k < n; ++k) c[k] += w * g[k];
  }
}

// Processes some rows at a time: their weights in float64, and the state of the search.
class Tile {
 public:
  explicit Tile(const GramMatrix& gram)
      : gram_(gram), weight_(size()), norm_(size()), c_(size()), change_(static_cast<size_t>(gram.cols)) {}

  // Rows of `weight` and `mask`; calls done(row, swaps) for each.
  template <class T, class Done>
  void refine(const T* weight, int64_t weight_stride, bool* mask, int64_t mask_stride, int64_t rows, int64_t group_m,
              int64_t max_swaps, Done&& done) {
    const int64_t cols = gram_.cols;
    std::fill(c_.begin(), c_.end(), 0.0);
    for (int64_t r = 0; r < rows; ++r) read_row(r, weight + r * weight_stride, mask + r * mask_stride);
    for (int64_t k = 0; k < cols; k += kPartOfC) {
      for (int64_t r = 0; r < rows; ++r) {
        add_removed(c_.data() + r * cols + k, std::min(kPartOfC, cols - k), weight_.data() + r * cols, removed_[r],
                    gram_.data + k, cols);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const SwapRow row{weight_.data() + r * cols,
                        norm_.data() + r * cols,
                        c_.data() + r * cols,
                        gram_.diagonal.data(),
                        mask + r * mask_stride,
                        row_norm_[r],
                        cols};
      done(r, refine_row(row, gram_.data, gram_.near.data(), static_cast<int>(group_m), max_swaps, change_.data()));
    }
  }

 private:
  size_t size() const { return static_cast<size_t>(kTileRows * gram_.cols); }

  template <class T>
  void read_row(int64_t r, const T* weight, const bool* mask) {
    double* wide = weight_.data() + r * gram_.cols;
    double* norm = norm_.data() + r * gram_.cols;
    double lane[kNormLanes] = {};
    removed_[r].clear();
    for (int64_t j = 0; j < gram_.cols; ++j) {
      wide[j] = static_cast<double>(to_float(weight[j]));
      norm[j] = output_norm(wide[j], gram_.root[static_cast<size_t>(j)]);
      lane[j % kNormLanes] += norm[j];
      if (!mask[j]) removed_[r].push_back(j);
    }
    row_norm_[r] = fold_norms(lane);
  }

  const GramMatrix& gram_;
  std::vector<double> weight_, norm_, c_;  // [kTileRows, cols]
  std::vector<double> change_;             // [cols]
  std::vector<int64_t> removed_[kTileRows];
  double row_norm_[kTileRows] = {};
};

at::Tensor refine_swaps(at::Tensor mask, const at::Tensor& weight, const at::Tensor& gram, int64_t keep_n,
                        int64_t group_m, int64_t max_swaps) {
  check_refine_swaps(mask, weight, gram, keep_n, group_m, max_swaps);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  at::Tensor swaps = at::zeros({rows}, weight.options().dtype(at::kLong));
  if (rows == 0 || cols == 0) return swaps;
  check_finite_rows("refine_swaps_", "weight", weight);
  check_finite_rows("refine_swaps_", "gram", gram);
  if (group_m > 0) check_pattern(mask, keep_n, group_m);
  const GramMatrix g = gram_matrix(gram, group_m);
  int64_t* made = mutable_data<int64_t>(swaps);
  with_scalar(weight.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    at::parallel_for(0, (rows + kTileRows - 1) / kTileRows, 1, [&](int64_t begin, int64_t end) {
      Tile tile(g);
      for (int64_t i = begin * kTileRows; i < std::min(rows, end * kTileRows); i += kTileRows) {
        tile.refine(data<T>(weight) + i * weight.stride(0), weight.stride(0),
                    mutable_data<bool>(mask) + i * mask.stride(0), mask.stride(0), std::min(kTileRows, rows - i),
                    group_m, max_swaps, [&](int64_t r, int64_t count) { made[i + r] = count; });
      }
    });
  });
  return swaps;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) { m.impl("refine_swaps_", &refine_swaps); }

}  // namespace ace::cpu
