#include "ops/packed.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"

namespace ace {

constexpr int64_t kMostColumns = int64_t{1} << 48;  // so that a row's size in bytes cannot overflow

int64_t columns_of(const at::Tensor& x) { return x.sym_size(1).guard_int(__FILE__, __LINE__); }

void check_tokens(std::string_view op, const at::Tensor& x) {
  if (!x.is_meta()) return check_matrix(op, "x", x);
  check_2d(op, "x", x);
  const at::ScalarType dtype = x.scalar_type();
  ACE_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
            ": x must be float32, float16 or bfloat16 (got ", dtype, ")");
}

void check_bitmap(std::string_view op, const at::Tensor& bitmap, int64_t cols) {
  check_2d(op, "bitmap", bitmap);
  ACE_CHECK(cols >= 0 && cols <= kMostColumns, op, ": cols must be from 0 to ", kMostColumns, " (got ", cols, ")");
  check_dense(op, "bitmap", bitmap, at::kByte, {bitmap.size(0), 8 * ((cols + 63) / 64)});
}

void check_survivors(std::string_view op, std::string_view argument, const at::Tensor& survivors,
                     const at::Tensor& bitmap, const OptionalTensor& row_start) {
  check_same_device(op, argument, survivors, bitmap);
  ACE_CHECK(survivors.is_contiguous(), op, ": ", argument, " must be contiguous (got strides ", survivors.strides(),
            ")");
  if (row_start) {
    ACE_CHECK(survivors.dim() == 1, op, ": ", argument, " must have 1 dimension with row_start (got ", survivors.dim(),
              ")");
    check_same_device(op, "row_start", *row_start, bitmap);
    check_dense(op, "row_start", *row_start, at::kLong, {bitmap.size(0) + 1});
  } else {
    ACE_CHECK(survivors.dim() == 2 && survivors.size(0) == bitmap.size(0), op, ": ", argument,
              " must be [rows, k] with the rows of bitmap, ", bitmap.size(0), ", without row_start (got ",
              survivors.sizes(), ")");
  }
}

void check_packed(std::string_view op, const at::Tensor& bitmap, const at::Tensor& values,
                  const OptionalTensor& row_start, int64_t cols) {
  check_bitmap(op, bitmap, cols);
  check_plain(op, "values", values);
  const at::ScalarType dtype = values.scalar_type();
  ACE_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
            ": values must be float32, float16 or bfloat16 (got ", dtype, ")");
  check_survivors(op, "values", values, bitmap, row_start);
}

void check_packed_linear(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& values,
                         const OptionalTensor& row_start, const OptionalTensor& bias) {
  constexpr std::string_view op = "packed_linear";
  check_tokens(op, x);
  check_same_device(op, "bitmap", bitmap, x);
  check_packed(op, bitmap, values, row_start, columns_of(x));
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
