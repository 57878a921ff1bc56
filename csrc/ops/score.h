// The scores themselves.
//
//   score(weight, formula, column=None, moment=None) -> [rows, cols] float32, contiguous.
//       For users and tests: the pruning ops recompute scores and never store them.
#pragma once

#include <string_view>

#include "core/score.h"
#include "ops.h"

namespace ace {

// Checks the weight and the other inputs of the formula, for every op that scores. Returns the formula of that name.
Formula check_scored(std::string_view op, const at::Tensor& weight, std::string_view formula,
                     const OptionalTensor& column, const OptionalTensor& moment);

}  // namespace ace
