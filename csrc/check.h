// One check_x() an op, called first by every back end. Messages: "op: argument must be ... (got ...)", as ValueError.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "core/score.h"

namespace ace {

using OptionalTensor = std::optional<at::Tensor>;

enum class Group { row, matrix };

// Shapes, dtypes, strides, devices. Values are not looked at here: a back end reports what is not finite while it
// reads.
void check_update_moments(const at::Tensor& x, const OptionalTensor& token_weight, const at::Tensor& weight_sum,
                          const at::Tensor& mean, const at::Tensor& m2);
void check_inverse_square_norm(const at::Tensor& a);
void check_update_cosine_moment(const at::Tensor& x, const at::Tensor& a, const at::Tensor& moment);

// The weight and what its metric needs. Returns the metric's formula.
Formula check_scored(std::string_view op, const at::Tensor& weight, std::string_view metric,
                     const OptionalTensor& column, const OptionalTensor& moment);
Group check_topk(std::string_view op, const at::Tensor& weight, int64_t keep_k, std::string_view group);
void check_nm(std::string_view op, const at::Tensor& weight, int64_t keep_n, int64_t group_m);
void check_given_score(std::string_view op, const at::Tensor& weight, const at::Tensor& score);
void check_level(std::string_view op, int64_t prefix, int64_t level);
void check_cut(std::string_view op, int64_t key, int64_t ties);
void check_refine_swaps(const at::Tensor& mask, const at::Tensor& weight, const at::Tensor& gram, int64_t keep_n,
                        int64_t group_m, int64_t max_swaps);
void check_obs_block(const at::Tensor& weight, const at::Tensor& error, const at::Tensor& mask,
                     const at::Tensor& factor, int64_t keep_n, int64_t group_m);

// Raises ValueError for the first entry that is not finite, looked for in the weight, the column and the moment, in
// this order; if all of them are finite, the score at (row, col) overflowed. Slow: called once a fast pass has met one.
[[noreturn]] void report_not_finite(std::string_view op, const at::Tensor& weight, const OptionalTensor& column,
                                    const OptionalTensor& moment, int64_t row, int64_t col);

// Raises ValueError for the first entry of t that is not finite; returns if there is none. Slow, like the above.
void refuse_not_finite(std::string_view op, std::string_view argument, const at::Tensor& t);

}  // namespace ace
