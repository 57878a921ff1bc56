#include "check.h"

#include <ATen/ops/isfinite.h>
#include <c10/util/Exception.h>

#include "core/nm_select.h"
#include "core/radix_select.h"

namespace ace {
namespace {

#define ACE_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, __VA_ARGS__)

bool is_weight_dtype(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16;
}

void check_2d(std::string_view op, std::string_view argument, const at::Tensor& t) {
  ACE_CHECK(t.dim() == 2, op, ": ", argument, " must have 2 dimensions (got ", t.dim(), ")");
}

// Contiguous columns, rows that do not overlap.
void check_rows(std::string_view op, std::string_view argument, const at::Tensor& t) {
  ACE_CHECK(t.size(1) <= 1 || t.stride(1) == 1, op, ": ", argument,
            " must have contiguous columns, stride(1) == 1 (got strides ", t.strides(), ")");
  ACE_CHECK(t.size(0) <= 1 || t.size(1) == 0 || t.stride(0) >= t.size(1), op, ": ", argument,
            " must have rows that do not overlap, stride(0) >= ", t.size(1), " (got strides ", t.strides(), ")");
}

// [rows, cols], one of the three dtypes.
void check_matrix(std::string_view op, std::string_view argument, const at::Tensor& t) {
  check_2d(op, argument, t);
  ACE_CHECK(is_weight_dtype(t), op, ": ", argument, " must be float32, float16 or bfloat16 (got ", t.scalar_type(),
            ")");
  check_rows(op, argument, t);
}

void check_same_device(std::string_view op, std::string_view argument, const at::Tensor& t, const at::Tensor& like) {
  ACE_CHECK(t.device() == like.device(), op, ": ", argument, " must be on ", like.device(),
            " like the first argument (got ", t.device(), ")");
}

void check_kind(std::string_view op, std::string_view argument, const at::Tensor& t, at::ScalarType dtype,
                at::IntArrayRef shape) {
  ACE_CHECK(t.scalar_type() == dtype, op, ": ", argument, " must be ", dtype, " (got ", t.scalar_type(), ")");
  ACE_CHECK(t.sizes() == shape, op, ": ", argument, " must have shape ", shape, " (got ", t.sizes(), ")");
}

// A matrix like `weight`, of any row stride.
void check_like(std::string_view op, std::string_view argument, const at::Tensor& t, at::ScalarType dtype,
                at::IntArrayRef shape, const at::Tensor& weight) {
  check_same_device(op, argument, t, weight);
  check_kind(op, argument, t, dtype, shape);
  check_rows(op, argument, t);
}

void check_dense(std::string_view op, std::string_view argument, const at::Tensor& t, at::ScalarType dtype,
                 at::IntArrayRef shape) {
  check_kind(op, argument, t, dtype, shape);
  ACE_CHECK(t.is_contiguous(), op, ": ", argument, " must be contiguous (got strides ", t.strides(), ")");
}

void check_optional(std::string_view op, std::string_view argument, const OptionalTensor& t, bool needed,
                    std::string_view metric, at::IntArrayRef shape, const at::Tensor& weight) {
  ACE_CHECK(t.has_value() == needed, op, ": ", argument, " must ", needed ? "be given" : "be None", " for the metric '",
            metric, "' (got ", needed ? "None" : "a tensor", ")");
  if (!needed) return;
  check_same_device(op, argument, *t, weight);
  check_dense(op, argument, *t, at::kFloat, shape);
}

std::string known_metrics() {
  std::string names;
  for (const MetricName& metric : kMetrics) names += (names.empty() ? "" : ", ") + std::string(metric.name);
  return names;
}

}  // namespace

void check_update_moments(const at::Tensor& x, const OptionalTensor& token_weight, const at::Tensor& weight_sum,
                          const at::Tensor& mean, const at::Tensor& m2) {
  constexpr std::string_view op = "update_moments_";
  check_matrix(op, "x", x);
  if (token_weight) {
    check_same_device(op, "token_weight", *token_weight, x);
    check_dense(op, "token_weight", *token_weight, at::kFloat, {x.size(0)});
  }
  const at::ScalarType dtype = mean.scalar_type();
  ACE_CHECK(dtype == at::kFloat || dtype == at::kDouble, op, ": mean must be float32 or float64 (got ", dtype, ")");
  check_same_device(op, "weight_sum", weight_sum, x);
  check_same_device(op, "mean", mean, x);
  check_same_device(op, "m2", m2, x);
  check_dense(op, "weight_sum", weight_sum, dtype, {});
  check_dense(op, "mean", mean, dtype, {x.size(1)});
  check_dense(op, "m2", m2, dtype, {x.size(1)});
}

void check_inverse_square_norm(const at::Tensor& a) { check_matrix("inverse_square_norm", "a", a); }

void check_update_cosine_moment(const at::Tensor& x, const at::Tensor& a, const at::Tensor& moment) {
  constexpr std::string_view op = "update_cosine_moment_";
  check_matrix(op, "x", x);
  check_matrix(op, "a", a);
  check_same_device(op, "a", a, x);
  ACE_CHECK(a.scalar_type() == x.scalar_type(), op, ": a must have the dtype of x, ", x.scalar_type(), " (got ",
            a.scalar_type(), ")");
  ACE_CHECK(a.size(0) == x.size(0), op, ": a must have the ", x.size(0), " tokens of x (got ", a.size(0), ")");
  check_same_device(op, "moment", moment, x);
  check_dense(op, "moment", moment, at::kFloat, {a.size(1), x.size(1)});
}

Formula check_scored(std::string_view op, const at::Tensor& weight, std::string_view metric,
                     const OptionalTensor& column, const OptionalTensor& moment) {
  check_matrix(op, "weight", weight);
  const MetricName* known = nullptr;
  for (const MetricName& entry : kMetrics) {
    if (metric == entry.name) known = &entry;
  }
  ACE_CHECK(known != nullptr, op, ": metric must be one of ", known_metrics(), " (got '", metric, "')");
  with_formula(known->formula, [&](auto formula) {
    check_optional(op, "column", column, formula.kColumn, metric, {weight.size(1)}, weight);
    check_optional(op, "moment", moment, formula.kMoment, metric, weight.sizes(), weight);
  });
  return known->formula;
}

Group check_topk(std::string_view op, const at::Tensor& weight, int64_t keep_k, std::string_view group) {
  ACE_CHECK(group == "row" || group == "matrix", op, ": group must be 'row' or 'matrix' (got '", group, "')");
  const int64_t size = group == "row" ? weight.size(1) : weight.size(0) * weight.size(1);
  ACE_CHECK(keep_k >= 0 && keep_k <= size, op, ": keep_k must be from 0 to ", size, " (got ", keep_k, ")");
  return group == "row" ? Group::row : Group::matrix;
}

void check_nm(std::string_view op, const at::Tensor& weight, int64_t keep_n, int64_t group_m) {
  ACE_CHECK(group_m >= 1 && group_m <= kMaxGroup, op, ": group_m must be from 1 to ", kMaxGroup, " (got ", group_m,
            ")");
  ACE_CHECK(keep_n >= 0 && keep_n <= group_m, op, ": keep_n must be from 0 to ", group_m, " (got ", keep_n, ")");
  ACE_CHECK(weight.size(1) % group_m == 0, op, ": group_m must divide the ", weight.size(1), " columns of weight (got ",
            group_m, ")");
}

void check_given_score(std::string_view op, const at::Tensor& weight, const at::Tensor& score) {
  check_matrix(op, "weight", weight);
  check_same_device(op, "score", score, weight);
  ACE_CHECK(score.sizes() == weight.sizes(), op, ": score must have the shape of weight, ", weight.sizes(), " (got ",
            score.sizes(), ")");
  ACE_CHECK(is_weight_dtype(score), op, ": score must be float32, float16 or bfloat16 (got ", score.scalar_type(), ")");
}

void check_level(std::string_view op, int64_t prefix, int64_t level) {
  ACE_CHECK(level >= 0 && level < kRadixPasses, op, ": level must be from 0 to ", kRadixPasses - 1, " (got ", level,
            ")");
  ACE_CHECK(prefix >= 0 && prefix <= 0xffffffffLL, op, ": prefix must be an unsigned 32-bit number (got ", prefix, ")");
}

void check_cut(std::string_view op, int64_t key, int64_t ties) {
  ACE_CHECK(key >= 0 && key <= 0xffffffffLL, op, ": key must be an unsigned 32-bit number (got ", key, ")");
  ACE_CHECK(ties >= 0, op, ": ties must not be negative (got ", ties, ")");
}

// N:M, or both 0 for none.
void check_optional_nm(std::string_view op, const at::Tensor& weight, int64_t keep_n, int64_t group_m) {
  if (keep_n != 0 || group_m != 0) check_nm(op, weight, keep_n, group_m);
}

void check_refine_swaps(const at::Tensor& mask, const at::Tensor& weight, const at::Tensor& gram, int64_t keep_n,
                        int64_t group_m, int64_t max_swaps) {
  constexpr std::string_view op = "refine_swaps_";
  check_matrix(op, "weight", weight);
  check_like(op, "mask", mask, at::kBool, weight.sizes(), weight);
  check_same_device(op, "gram", gram, weight);
  check_dense(op, "gram", gram, at::kFloat, {weight.size(1), weight.size(1)});
  check_optional_nm(op, weight, keep_n, group_m);
  ACE_CHECK(max_swaps >= 0, op, ": max_swaps must not be negative (got ", max_swaps, ")");
}

void check_obs_block(const at::Tensor& weight, const at::Tensor& error, const at::Tensor& mask,
                     const at::Tensor& factor, int64_t keep_n, int64_t group_m) {
  constexpr std::string_view op = "obs_block_";
  check_2d(op, "weight", weight);
  check_like(op, "weight", weight, at::kFloat, weight.sizes(), weight);
  check_like(op, "error", error, at::kFloat, weight.sizes(), weight);
  check_like(op, "mask", mask, at::kBool, weight.sizes(), weight);
  check_like(op, "factor", factor, at::kFloat, {weight.size(1), weight.size(1)}, weight);
  check_optional_nm(op, weight, keep_n, group_m);
}

void refuse_not_finite(std::string_view op, std::string_view argument, const at::Tensor& t) {
  const at::Tensor bad = at::isfinite(t).logical_not().nonzero();
  if (bad.size(0) == 0) return;
  const at::Tensor index = bad[0];
  std::string place;
  at::Tensor value = t;
  for (int64_t d = 0; d < t.dim(); ++d) {
    const int64_t at = index[d].item<int64_t>();
    place += (d ? ", " : "") + std::to_string(at);
    value = value[at];
  }
  ACE_CHECK(false, op, ": ", argument, " must be finite (got ", value.item<double>(), " at index [", place, "])");
}

void report_not_finite(std::string_view op, const at::Tensor& weight, const OptionalTensor& column,
                       const OptionalTensor& moment, int64_t row, int64_t col) {
  refuse_not_finite(op, "weight", weight);
  if (column) refuse_not_finite(op, "column", *column);
  if (moment) refuse_not_finite(op, op.find("by_score") == op.npos ? "moment" : "score", *moment);
  TORCH_CHECK_VALUE(false, op, ": score must be finite (got an overflow, or the root of a negative moment, at index [",
                    row, ", ", col, "]; check the scale of column and moment)");
}

}  // namespace ace
