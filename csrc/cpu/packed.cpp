// packed_linear and unpack_bitmap on the CPU. For a few tokens weights are expanded in registers, row by row. For many,
// rows are unpacked in panels that stay in the cache while torch, or for bfloat16 our own loop, multiplies with them.
#include "ops/packed.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "cpu/packed_torch.h"

namespace ace::cpu {
namespace {

// The most tokens that are multiplied in registers, or with AMX in tiles. Measured: docs/payoff.md.
constexpr int64_t kFewTokens = 8, kFewTokensBf16 = 4;
constexpr int64_t kFewTokensSlow = 16;  // for dtypes in which torch is slow: more tokens are multiplied in float32
constexpr int64_t kLeastTileTokens = 3, kMostTileTokens = 512;

template <class T>
PackedMatrix<T> matrix_of(const at::Tensor& bitmap, const at::Tensor& values, const OptionalTensor& row_start) {
  return {data<uint8_t>(bitmap),
          bitmap.size(1) / 8,
          data<T>(values),
          values.numel(),
          row_start ? data<int64_t>(*row_start) : nullptr,
          values.size(-1)};
}

template <class T>
void few_tokens(const PackedMatrix<T>& matrix, const at::Tensor& x, const OptionalTensor& bias, at::Tensor& out) {
  const int64_t tokens = x.size(0), rows = out.size(1);
  const at::Tensor sums = at::empty({tokens, rows}, x.options().dtype(at::kFloat));
  with_packed_loops<T>(packed_level(), [&](auto* loop, auto*, auto input) {
    using X = decltype(input);
    const bool ready = std::is_same_v<X, T> && tokens == 1 && x.size(1) == matrix.words * kBitmapColumns;
    const at::Tensor wide = ready ? x : padded<X>(x, matrix.words);
    const PackedProduct<T, X> product{matrix, data<X>(wide), wide.size(1), mutable_data<float>(sums), rows};
    at::parallel_for(0, rows, row_grain(tokens * x.size(1)), [&](int64_t begin, int64_t end) {
      loop(product, tokens, begin, end);
      finish<T>(product.out, bias, begin, end, out);
    });
  });
}

template <class T>
void unpack(const PackedMatrix<T>& matrix, int64_t begin, int64_t end, at::Tensor& out) {
  const int64_t cols = out.size(1);
  T* target = mutable_data<T>(out);
  with_packed_loops<T>(packed_level(), [&](auto*, auto* loop, auto) {
    at::parallel_for(begin, end, row_grain(cols), [&](int64_t first, int64_t last) {
      loop(matrix, first, last, cols, target + (first - begin) * cols);
    });
  });
}

template <class T>
void many_tokens(const PackedMatrix<T>& matrix, const at::Tensor& x, const OptionalTensor& bias, at::Tensor& out) {
  const int64_t rows = out.size(1), cols = x.size(1), height = panel_height(rows, cols, x.element_size());
  at::Tensor panel = at::empty({height, cols}, x.options());
  for (int64_t begin = 0; begin < rows; begin += height) {
    const int64_t count = std::min(height, rows - begin);
    at::Tensor part = panel.narrow(0, 0, count);
    unpack(matrix, begin, begin + count, part);
    const OptionalTensor shift = bias ? OptionalTensor(bias->narrow(0, begin, count)) : std::nullopt;
    out.narrow(1, begin, count).copy_(at::linear(x, part, shift));
  }
}

// As many_tokens, in float32.
template <class T>
void wide_tokens(const PackedMatrix<T>& matrix, const at::Tensor& x, const OptionalTensor& bias, at::Tensor& out) {
  many_wide_tokens<T>(x, bias, out, [&](int64_t height) {
    const at::Tensor narrow = at::empty({height, x.size(1)}, at::TensorOptions().dtype(out.dtype()));
    return [&matrix, narrow](int64_t begin, int64_t count, at::Tensor& panel) {
      at::Tensor part = narrow.narrow(0, 0, count);
      unpack(matrix, begin, begin + count, part);
      panel.copy_(part);
    };
  });
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& values,
                         const OptionalTensor& row_start, const OptionalTensor& bias) {
  check_packed_linear(x, bitmap, values, row_start, bias);
  const c10::impl::ExcludeDispatchKeyGuard as_given(c10::autocast_dispatch_keyset);  // at::linear keeps the dtypes
  at::Tensor out = at::empty({x.size(0), bitmap.size(0)}, x.options());
  if (out.numel() == 0) return out;
  with_scalar(x.scalar_type(), [&](auto type) {
    const auto matrix = matrix_of<decltype(type)>(bitmap, values, row_start);
#if ACE_PACKED_X86
    if constexpr (std::is_same_v<decltype(type), BFloat16>) {
      if (packed_level() >= PackedLevel::avx512_bf16 && matrix.words > 0) {
        const auto rows_of = [&](int64_t) { return avx512bf16::PackedRows{matrix}; };
        const bool tiles = packed_level() == PackedLevel::avx512_amx;
        if (tiles && x.size(0) >= kLeastTileTokens && x.size(0) <= kMostTileTokens)
          return tile_tokens(x, bias, out, rows_of);
        if (!tiles && x.size(0) > kFewTokensBf16) return panel_tokens(x, bias, out, rows_of);
      }
    }
#endif
    const bool slow = torch_is_slow<decltype(type)>(packed_level());
    if (x.size(0) <= (slow ? kFewTokensSlow : kFewTokens)) return few_tokens(matrix, x, bias, out);
    if (!slow) return many_tokens(matrix, x, bias, out);
    wide_tokens(matrix, x, bias, out);
  });
  return out;
}

at::Tensor unpack_bitmap(const at::Tensor& bitmap, const at::Tensor& values, const OptionalTensor& row_start,
                         int64_t cols) {
  check_packed("unpack_bitmap", bitmap, values, row_start, cols);
  at::Tensor out = at::empty({bitmap.size(0), cols}, values.options());
  with_scalar(values.scalar_type(),
              [&](auto type) { unpack(matrix_of<decltype(type)>(bitmap, values, row_start), 0, out.size(0), out); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) {
  m.impl("packed_linear", &packed_linear);
  m.impl("unpack_bitmap", &unpack_bitmap);
}

}  // namespace ace::cpu
