// quantized_linear and unpack_quantized on the CPU.
#include "ops/quantized.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/quantized_portable.h"
#include "ops/packed.h"

namespace ace::cpu {
namespace {

template <class T>
QuantizedMatrix<T> matrix_of(const at::Tensor& bitmap, const at::Tensor& codes, const at::Tensor& scales, int64_t group,
                             const OptionalTensor& row_start) {
  return {data<uint8_t>(bitmap),
          bitmap.size(1) / 8,
          data<uint8_t>(codes),
          codes.numel(),
          row_start ? data<int64_t>(*row_start) : nullptr,
          codes.size(-1),
          data<T>(scales),
          scales.size(1),
          group / kBitmapColumns};
}

template <int kBits, class T>
void multiply(const QuantizedMatrix<T>& matrix, const at::Tensor& x, const OptionalTensor& bias, at::Tensor& out) {
  const int64_t tokens = x.size(0), rows = out.size(1);
  at::Tensor wide = at::empty({tokens, matrix.words * kBitmapColumns}, x.options().dtype(at::kFloat)).zero_();
  wide.narrow(1, 0, x.size(1)).copy_(x);
  at::Tensor sums = at::empty({tokens, rows}, wide.options());
  const QuantizedProduct<T, float> product{matrix, data<float>(wide), wide.size(1), mutable_data<float>(sums), rows};
  at::parallel_for(0, rows, row_grain(x.numel()), [&](int64_t begin, int64_t end) {
    portable::quantized_product<kBits>(product, tokens, begin, end);
  });
  if (bias) sums.add_(*bias);
  out.copy_(sums);
}

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& codes,
                            const at::Tensor& scales, int64_t bits, int64_t group, const OptionalTensor& row_start,
                            const OptionalTensor& bias) {
  check_quantized_linear(x, bitmap, codes, scales, bits, group, row_start, bias);
  at::Tensor out = at::empty({x.size(0), bitmap.size(0)}, x.options());
  if (out.numel() == 0) return out;
  with_scalar(x.scalar_type(), [&](auto type) {
    const auto matrix = matrix_of<decltype(type)>(bitmap, codes, scales, group, row_start);
    bits == 8 ? multiply<8>(matrix, x, bias, out) : multiply<4>(matrix, x, bias, out);
  });
  return out;
}

at::Tensor unpack_quantized(const at::Tensor& bitmap, const at::Tensor& codes, const at::Tensor& scales, int64_t bits,
                            int64_t group, const OptionalTensor& row_start, int64_t cols) {
  check_quantized("unpack_quantized", bitmap, codes, scales, bits, group, row_start, cols);
  at::Tensor out = at::empty({bitmap.size(0), cols}, scales.options());
  with_scalar(scales.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto matrix = matrix_of<T>(bitmap, codes, scales, group, row_start);
    auto* unpack = bits == 8 ? &portable::quantized_unpack<8, T> : &portable::quantized_unpack<4, T>;
    at::parallel_for(0, out.size(0), row_grain(cols), [&](int64_t begin, int64_t end) {
      unpack(matrix, begin, end, cols, mutable_data<T>(out) + begin * cols);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) {
  m.impl("quantized_linear", &quantized_linear);
  m.impl("unpack_quantized", &unpack_quantized);
}

}  // namespace ace::cpu
