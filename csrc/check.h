// Checks that several ops share. Each op has its own check_x() (ops/STEM.h), which every back end calls first.
// Messages: "op: argument must be ... (got ...)", as ValueError. Checks of shapes, dtypes, strides and devices do not
// look at values: a back end reports values that are not finite while it reads.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "ops.h"

#define ACE_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, __VA_ARGS__)

namespace ace {

// A tensor whose memory holds its values: strided, not quantized, not a negative or conjugate view, and within its
// storage. Back ends read memory directly and would misread anything else.
void check_plain(std::string_view op, std::string_view argument, const at::Tensor& t);

// Each of the checks below begins with check_plain.
void check_2d(std::string_view op, std::string_view argument, const at::Tensor& t);

// [rows, cols] float32, float16 or bfloat16, contiguous columns, rows that do not overlap.
void check_matrix(std::string_view op, std::string_view argument, const at::Tensor& t);

void check_same_device(std::string_view op, std::string_view argument, const at::Tensor& t, const at::Tensor& like);

// Contiguous, of this dtype and shape.
void check_dense(std::string_view op, std::string_view argument, const at::Tensor& t, at::ScalarType dtype,
                 at::IntArrayRef shape);

// Of this dtype and shape and on the device of `weight`; contiguous columns, any row stride.
void check_like(std::string_view op, std::string_view argument, const at::Tensor& t, at::ScalarType dtype,
                at::IntArrayRef shape, const at::Tensor& weight);

struct Named {
  std::string_view argument;
  const at::Tensor* tensor;  // null if an optional tensor is not given
};

inline Named named(std::string_view argument, const at::Tensor& t) { return {argument, &t}; }
inline Named named(std::string_view argument, const OptionalTensor& t) { return {argument, t ? &*t : nullptr}; }

// Whether both are views of the same elements in the same order.
bool is_same_view(const at::Tensor& a, const at::Tensor& b);

// No tensor in `written`, which the op writes, overlaps any other tensor of the two lists. Disjoint column slices of
// one matrix do not overlap. All tensors have been checked before.
void check_apart(std::string_view op, std::initializer_list<Named> written, std::initializer_list<Named> read);

// keep_n of group_m columns of the weight.
void check_nm(std::string_view op, const at::Tensor& weight, int64_t keep_n, int64_t group_m);

// As check_nm, or both are 0: no pattern.
void check_optional_nm(std::string_view op, const at::Tensor& weight, int64_t keep_n, int64_t group_m);

// Raises ValueError for the first entry of t that is not finite; returns if there is none. Slow: called only after a
// fast pass has found one.
void refuse_not_finite(std::string_view op, std::string_view argument, const at::Tensor& t);

// As refuse_not_finite for weight, column and moment, in this order. If all of them are finite, the score at (row, col)
// overflowed.
[[noreturn]] void report_not_finite(std::string_view op, const at::Tensor& weight, const OptionalTensor& column,
                                    const OptionalTensor& moment, int64_t row, int64_t col);

}  // namespace ace
