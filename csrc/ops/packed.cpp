#include "ops/packed.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"

namespace ace {

constexpr int64_t kMostColumns = int64_t{1} << 48;  // so that a row's size in bytes cannot overflow

void check_packed(std::string_view op, const at::Tensor& bitmap, const at::Tensor& values,
                  const OptionalTensor& row_start, int64_t cols) {
  check_2d(op, "bitmap", bitmap);
  ACE_CHECK(cols >= 0 && cols <= kMostColumns, op, ": cols must be from 0 to ", kMostColumns, " (got ", cols, ")");
  check_dense(op, "bitmap", bitmap, at::kByte, {bitmap.size(0), 8 * ((cols + 63) / 64)});
  check_plain(op, "values", values);
  const at::ScalarType dtype = values.scalar_type();
  ACE_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
            ": values must be float32, float16 or bfloat16 (got ", dtype, ")");
  check_same_device(op, "values", values, bitmap);
  ACE_CHECK(values.is_contiguous(), op, ": values must be contiguous (got strides ", values.strides(), ")");
  if (row_start) {
    ACE_CHECK(values.dim() == 1, op, ": values must have 1 dimension with row_start (got ", values.dim(), ")");
    check_same_device(op, "row_start", *row_start, bitmap);
    check_dense(op, "row_start", *row_start, at::kLong, {bitmap.size(0) + 1});
  } else {
    ACE_CHECK(values.dim() == 2 && values.size(0) == bitmap.size(0), op,
              ": values must be [rows, k] with the rows of bitmap, ", bitmap.size(0), ", without row_start (got ",
              values.sizes(), ")");
  }
}

void check_packed_linear(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& values,
                         const OptionalTensor& row_start, const OptionalTensor& bias) {
  constexpr std::string_view op = "packed_linear";
  check_matrix(op, "x", x);
  check_same_device(op, "bitmap", bitmap, x);
  check_packed(op, bitmap, values, row_start, x.size(1));
  ACE_CHECK(values.scalar_type() == x.scalar_type(), op, ": values must have the dtype of x, ", x.scalar_type(),
            " (got ", values.scalar_type(), ")");
  if (bias) {
    check_same_device(op, "bias", *bias, x);
    check_dense(op, "bias", *bias, x.scalar_type(), {bitmap.size(0)});
  }
}

namespace {

at::Tensor packed_linear_meta(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& values,
                              const OptionalTensor& row_start, const OptionalTensor& bias) {
  check_packed_linear(x, bitmap, values, row_start, bias);
  return at::empty_symint({x.sym_size(0), bitmap.sym_size(0)}, x.options());
}

at::Tensor unpack_bitmap_meta(const at::Tensor& bitmap, const at::Tensor& values, const OptionalTensor& row_start,
                              int64_t cols) {
  check_packed("unpack_bitmap", bitmap, values, row_start, cols);
  return at::empty_symint({bitmap.sym_size(0), cols}, values.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def("packed_linear(Tensor x, Tensor bitmap, Tensor values, Tensor? row_start=None, Tensor? bias=None) -> Tensor");
  m.def("unpack_bitmap(Tensor bitmap, Tensor values, Tensor? row_start, int cols) -> Tensor");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) {
  m.impl("packed_linear", &packed_linear_meta);
  m.impl("unpack_bitmap", &unpack_bitmap_meta);
}

}  // namespace ace
