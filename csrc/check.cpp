#include "check.h"

#include <ATen/ops/isfinite.h>

#include <string>

#include "core/nm_select.h"

namespace ace {
namespace {

void check_rows(std::string_view op, std::string_view argument, const at::Tensor& t) {
  ACE_CHECK(t.size(1) <= 1 || t.stride(1) == 1, op, ": ", argument,
            " must have contiguous columns, stride(1) == 1 (got strides ", t.strides(), ")");
  ACE_CHECK(t.size(0) <= 1 || t.size(1) == 0 || t.stride(0) >= t.size(1), op, ": ", argument,
            " must have rows that do not overlap, stride(0) >= ", t.size(1), " (got strides ", t.strides(), ")");
}

void check_kind(std::string_view op, std::string_view argument, const at::Tensor& t, at::ScalarType dtype,
                at::IntArrayRef shape) {
  ACE_CHECK(t.scalar_type() == dtype, op, ": ", argument, " must be ", dtype, " (got ", t.scalar_type(), ")");
  ACE_CHECK(t.sizes() == shape, op, ": ", argument, " must have shape ", shape, " (got ", t.sizes(), ")");
}

}  // namespace

void check_2d(std::string_view op, std::string_view argument, const at::Tensor& t) {
  ACE_CHECK(t.dim() == 2, op, ": ", argument, " must have 2 dimensions (got ", t.dim(), ")");
}

void check_matrix(std::string_view op, std::string_view argument, const at::Tensor& t) {
  check_2d(op, argument, t);
  const at::ScalarType dtype = t.scalar_type();
  ACE_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op, ": ", argument,
            " must be float32, float16 or bfloat16 (got ", dtype, ")");
  check_rows(op, argument, t);
}

void check_same_device(std::string_view op, std::string_view argument, const at::Tensor& t, const at::Tensor& like) {
  ACE_CHECK(t.device() == like.device(), op, ": ", argument, " must be on ", like.device(),
            " like the other tensors (got ", t.device(), ")");
}

void check_dense(std::string_view op, std::string_view argument, const at::Tensor& t, at::ScalarType dtype,
                 at::IntArrayRef shape) {
  check_kind(op, argument, t, dtype, shape);
  ACE_CHECK(t.is_contiguous(), op, ": ", argument, " must be contiguous (got strides ", t.strides(), ")");
}

void check_like(std::string_view op, std::string_view argument, const at::Tensor& t, at::ScalarType dtype,
                at::IntArrayRef shape, const at::Tensor& weight) {
  check_same_device(op, argument, t, weight);
  check_kind(op, argument, t, dtype, shape);
  check_rows(op, argument, t);
}

void check_nm(std::string_view op, const at::Tensor& weight, int64_t keep_n, int64_t group_m) {
  ACE_CHECK(group_m >= 1 && group_m <= kMaxGroup, op, ": group_m must be from 1 to ", kMaxGroup, " (got ", group_m,
            ")");
  ACE_CHECK(keep_n >= 0 && keep_n <= group_m, op, ": keep_n must be from 0 to ", group_m, " (got ", keep_n, ")");
  ACE_CHECK(weight.size(1) % group_m == 0, op, ": group_m must divide the ", weight.size(1), " columns of weight (got ",
            group_m, ")");
}

void check_optional_nm(std::string_view op, const at::Tensor& weight, int64_t keep_n, int64_t group_m) {
  if (keep_n != 0 || group_m != 0) check_nm(op, weight, keep_n, group_m);
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
  if (moment) refuse_not_finite(op, "moment", *moment);
  TORCH_CHECK_VALUE(false, op, ": score must be finite (got an overflow, or the root of a negative moment, at index [",
                    row, ", ", col, "]; check the scale of column and moment)");
}

}  // namespace ace
