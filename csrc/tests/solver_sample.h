// Masks and Gram matrices for the tests of the solvers.
#pragma once

#include <memory>

#include "tests/sample.h"

namespace ace::cuda {

using Mask = std::unique_ptr<bool[]>;

// Rows of a matrix of cols + padding columns.
struct Layout {
  int64_t rows, cols, padding;
  int64_t stride() const { return cols + padding; }
  size_t size() const { return static_cast<size_t>(rows * stride()); }
};

// Keeps keep_n of each group_m, or half of each row, in random order; false in the padding.
inline Mask random_mask(const Layout& layout, int keep_n, int group_m, std::mt19937& random) {
  Mask mask(new bool[layout.size() + 1]());
  const int64_t group = group_m > 0 ? group_m : layout.cols, keep = group_m > 0 ? keep_n : layout.cols / 2;
  for (int64_t i = 0; i < layout.rows; ++i) {
    for (int64_t j = 0; j < layout.cols; j += group) {
      bool* first = mask.get() + i * layout.stride() + j;
      std::fill(first, first + keep, true);
      std::shuffle(first, first + group, random);
    }
  }
  return mask;
}

inline Mask copy_of(const Mask& mask, const Layout& layout) {
  Mask copy(new bool[layout.size() + 1]);
  std::copy(mask.get(), mask.get() + layout.size(), copy.get());
  return copy;
}

inline void expect_same_masks(const Mask& got, const Mask& want, const Layout& layout, const std::string& what) {
  for (size_t n = 0; n < layout.size(); ++n) ASSERT_EQ(got[n], want[n]) << what << ", entry " << n;
}

// X^T X of `tokens` random inputs, exactly symmetric.
inline std::vector<float> random_gram(int64_t cols, int64_t tokens, Values values, std::mt19937& random) {
  std::vector<float> x, gram(static_cast<size_t>(cols * cols));
  for (int64_t n = 0; n < tokens * cols; ++n) x.push_back(random_value<float>(random, values));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < cols; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        gram[static_cast<size_t>(i * cols + j)] +=
            x[static_cast<size_t>(t * cols + i)] * x[static_cast<size_t>(t * cols + j)];
      }
    }
  }
  return gram;
}

}  // namespace ace::cuda
