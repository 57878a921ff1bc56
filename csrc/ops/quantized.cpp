#include "ops/quantized.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"
#include "ops/packed.h"

namespace ace {

constexpr int64_t kLargestGroup = int64_t{1} << 48;  // so that sums of a group and a number of columns cannot overflow

void check_quantized(std::string_view op, const at::Tensor& bitmap, const at::Tensor& codes, const at::Tensor& scales,
                     int64_t bits, int64_t group, const OptionalTensor& row_start, int64_t cols) {
  check_bitmap(op, bitmap, cols);
  ACE_CHECK(bits == 8 || bits == 4, op, ": bits must be 8 or 4 (got ", bits, ")");
  ACE_CHECK(group >= 64 && group <= kLargestGroup && group % 64 == 0, op,
            ": group must be a multiple of 64, from 64 to ", kLargestGroup, " (got ", group, ")");
  check_plain(op, "codes", codes);
  ACE_CHECK(codes.scalar_type() == at::kByte, op, ": codes must be uint8 (got ", codes.scalar_type(), ")");
  check_survivors(op, "codes", codes, bitmap, row_start);
  check_plain(op, "scales", scales);
  const at::ScalarType dtype = scales.scalar_type();
  ACE_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
            ": scales must be float32, float16 or bfloat16 (got ", dtype, ")");
  check_same_device(op, "scales", scales, bitmap);
  check_dense(op, "scales", scales, dtype, {bitmap.size(0), (cols + group - 1) / group});
}

void check_quantized_linear(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& codes,
                            const at::Tensor& scales, int64_t bits, int64_t group, const OptionalTensor& row_start,
                            const OptionalTensor& bias) {
  constexpr std::string_view op = "quantized_linear";
  check_tokens(op, x);
  check_same_device(op, "bitmap", bitmap, x);
  check_quantized(op, bitmap, codes, scales, bits, group, row_start, columns_of(x));
  ACE_CHECK(scales.scalar_type() == x.scalar_type(), op, ": scales must have the dtype of x, ", x.scalar_type(),
            " (got ", scales.scalar_type(), ")");
  if (bias) {
    check_same_device(op, "bias", *bias, x);
    check_dense(op, "bias", *bias, x.scalar_type(), {bitmap.size(0)});
  }
}

namespace {

at::Tensor quantized_linear_meta(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& codes,
                                 const at::Tensor& scales, int64_t bits, int64_t group, const OptionalTensor& row_start,
                                 const OptionalTensor& bias) {
  check_quantized_linear(x, bitmap, codes, scales, bits, group, row_start, bias);
  return at::empty_symint({x.sym_size(0), bitmap.sym_size(0)}, x.options());
}

at::Tensor unpack_quantized_meta(const at::Tensor& bitmap, const at::Tensor& codes, const at::Tensor& scales,
                                 int64_t bits, int64_t group, const OptionalTensor& row_start, int64_t cols) {
  check_quantized("unpack_quantized", bitmap, codes, scales, bits, group, row_start, cols);
  return at::empty_symint({bitmap.sym_size(0), cols}, scales.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def(
      "quantized_linear(Tensor x, Tensor bitmap, Tensor codes, Tensor scales, int bits, int group, "
      "Tensor? row_start=None, Tensor? bias=None) -> Tensor");
  m.def(
      "unpack_quantized(Tensor bitmap, Tensor codes, Tensor scales, int bits, int group, Tensor? row_start, int cols) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) {
  m.impl("quantized_linear", &quantized_linear_meta);
  m.impl("unpack_quantized", &unpack_quantized_meta);
}

}  // namespace ace
