// An upper triangular factor with a positive diagonal, as the column-by-column updates read it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/triu.h>

#include "core/obs_block.h"
#include "cpu/finite.h"
#include "cpu/multiversion.h"

namespace ace::cpu {

struct Triangular {
  const float* data;  // [width, width] upper triangular, rows `stride` apart
  int64_t width, stride;

  explicit Triangular(const at::Tensor& factor)
      : data(ace::cpu::data<float>(factor)), width(factor.size(0)), stride(factor.stride(0)) {}

  const float* row(int64_t c) const { return data + c * stride; }
  float diagonal(int64_t c) const { return row(c)[c]; }
};

// Corrects the n weights after a column for its error. weight and factor begin at the first of them.
ACE_MULTIVERSION static void correct_later(float* ACE_RESTRICT weight, float error, const float* ACE_RESTRICT factor,
                                           int64_t n) {
  for (int64_t k = 0; k < n; ++k) weight[k] = obs_correct(weight[k], error, factor[k]);
}

// Checks only the entries that are read: the diagonal and above.
inline void check_triangular(std::string_view op, const at::Tensor& factor) {
  const Triangular u(factor);
  for (int64_t c = 0; c < u.width; ++c) {
    if (!all_finite(u.row(c) + c, u.width - c)) refuse_not_finite(op, "factor", at::triu(factor));
    TORCH_CHECK_VALUE(u.diagonal(c) > 0.0f, op, ": factor must have a positive diagonal (got ", u.diagonal(c),
                      " at index [", c, ", ", c, "])");
  }
}

}  // namespace ace::cpu
