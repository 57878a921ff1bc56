// quantize_block_ on the CPU: each row's recursion runs to its end, rows in parallel.
#include "ops/quantize_block.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "core/obs_block.h"
#include "core/quantize_block.h"
#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/triangular.h"

namespace ace::cpu {
namespace {

struct Row {
  float* weight;         // [width]
  float* error;          // [width]
  const bool* mask;      // [width]
  const float* current;  // [width]; null: none
};

template <class T>
void round_row(const Triangular& u, const Row& row, float scale, CodeRange range) {
  for (int64_t c = 0; c < u.width; ++c) {
    const float weight = row.weight[c];
    const float value = row.mask[c] ? grid_value<T>(nearest_code(weight, scale, range), scale) : 0.0f;
    const float change = row.current == nullptr ? weight - value : value - row.current[c];
    const float error = obs_error(change, u.diagonal(c));
    row.weight[c] = value;
    row.error[c] = error;
    if (error != 0.0f) correct_later(row.weight + c + 1, error, u.row(c) + c + 1, u.width - c - 1);
  }
}

template <class T>
void check_scale(const at::Tensor& scale) {
  refuse_not_finite("quantize_block_", "scale", scale);
  for (int64_t i = 0; i < scale.size(0); ++i) {
    const float value = to_float(data<T>(scale)[i]);
    TORCH_CHECK_VALUE(value >= 0.0f, "quantize_block_: scale must be 0 or more (got ", value, " at index [", i, "])");
  }
}

void quantize_block(at::Tensor weight, at::Tensor error, const at::Tensor& mask, const at::Tensor& scale,
                    const at::Tensor& factor, int64_t bits, const OptionalTensor& current) {
  check_quantize_block(weight, error, mask, scale, factor, bits, current);
  const int64_t rows = weight.size(0), width = weight.size(1);
  if (rows == 0 || width == 0) return;
  check_finite_rows("quantize_block_", "weight", weight);
  check_triangular("quantize_block_", factor);
  if (current) check_finite_rows("quantize_block_", "current", *current);
  const CodeRange range(static_cast<int>(bits));
  const Triangular u(factor);
  with_scalar(scale.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    check_scale<T>(scale);
    at::parallel_for(0, rows, row_grain(width * width / 2), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Row row{mutable_data<float>(weight) + i * weight.stride(0),
                      mutable_data<float>(error) + i * error.stride(0), data<bool>(mask) + i * mask.stride(0),
                      current ? data<float>(*current) + i * current->stride(0) : nullptr};
        round_row<T>(u, row, to_float(data<T>(scale)[i]), range);
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) { m.impl("quantize_block_", &quantize_block); }

}  // namespace ace::cpu
