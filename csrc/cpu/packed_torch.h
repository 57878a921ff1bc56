// What packed_linear and quantized_linear share on the CPU besides loops: inputs, results, and panels that torch
// multiplies with.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/packed_level.h"
#include "ops.h"

namespace ace::cpu {

constexpr int64_t kPanelBytes = int64_t{1} << 20;
constexpr int64_t kWideTokens = 1024;  // tokens of x converted to float32 at a time
constexpr int64_t kTileTokens = 256;   // tokens multiplied with AMX's tiles at a time: they stay in the second cache

// The processor's level, or a lower one if ATEN_CPU_CAPABILITY restricts torch to it.
inline PackedLevel packed_level() {
  static const PackedLevel level = [] {
    const std::string torch = at::get_cpu_capability();
    if (ACE_PACKED_X86 && torch == "DEFAULT") return PackedLevel::portable;
    if (ACE_PACKED_X86 && torch == "AVX2") return std::min(PackedLevel::avx2, highest_packed_level());
    return highest_packed_level();
  }();
  return level;
}

template <class T>
using Torch = std::conditional_t<std::is_same_v<T, Half>, c10::Half,
                                 std::conditional_t<std::is_same_v<T, BFloat16>, c10::BFloat16, float>>;

// x [tokens, 64 words + 32] of the core type X, zero beyond the columns. The 32 avoids conflicts in the first-level
// cache if the number of columns is a power of two.
template <class X>
at::Tensor padded(const at::Tensor& x, int64_t words) {
  const at::ScalarType dtype = std::is_same_v<X, float> ? at::kFloat : at::kBFloat16;
  at::Tensor wide = at::empty({x.size(0), words * kBitmapColumns + 32}, x.options().dtype(dtype));
  wide.narrow(1, 0, x.size(1)).copy_(x);
  wide.narrow(1, x.size(1), wide.size(1) - x.size(1)).zero_();
  return wide;
}

// Writes rows begin to end of out [tokens, rows]: sums + bias, rounded once.
template <class T>
void finish(const float* sums, const OptionalTensor& bias, int64_t begin, int64_t end, at::Tensor& out) {
  const int64_t rows = out.size(1);
  const Torch<T>* shift = bias ? data<Torch<T>>(*bias) : nullptr;
  Torch<T>* result = mutable_data<Torch<T>>(out);
  for (int64_t t = 0; t < out.size(0); ++t)
    for (int64_t i = begin; i < end; ++i)
      result[t * rows + i] = static_cast<Torch<T>>(sums[t * rows + i] + (shift ? static_cast<float>(shift[i]) : 0.0f));
}

inline int64_t panel_height(int64_t rows, int64_t cols, int64_t itemsize) {
  return std::min(rows, 64 + kPanelBytes / std::max<int64_t>(1, cols * itemsize) / 64 * 64);
}

// out = x W^T + bias in float32, rounded once, with panels of rows for each thread: a parallel loop for each step of
// each panel would wake sleeping threads too often. unpacker(height) returns, for one thread, an unpack(begin, count,
// panel) that writes so many rows of W, at most `height`, to panel [count, cols] float32. Threads access the caller's
// tensors by pointers, because the caller's inference mode does not apply to them.
template <class T, class Unpacker>
void wide_panels(const at::Tensor& x, const OptionalTensor& bias, at::Tensor out, Unpacker&& unpacker) {
  const int64_t tokens = x.size(0), rows = out.size(1), cols = x.size(1);
  const int64_t share = std::max<int64_t>(16, rows / (2 * at::get_num_threads()));  // so that each thread has a panel
  const int64_t height = std::min(share, panel_height(rows, cols, sizeof(float)));
  const at::TensorOptions wide = at::TensorOptions().dtype(at::kFloat);
  const at::Tensor given = x.to(at::kFloat).contiguous(), sums = at::empty({tokens, rows}, wide);
  float* input = mutable_data<float>(given);
  float* found = mutable_data<float>(sums);
  at::parallel_for(0, (rows + height - 1) / height, 1, [&](int64_t first, int64_t last) {
    at::Tensor panel = at::empty({height, cols}, wide);
    auto&& unpack = unpacker(height);
    for (int64_t begin = first * height; begin < std::min(rows, last * height); begin += height) {
      const int64_t count = std::min(height, rows - begin);
      at::Tensor part = panel.narrow(0, 0, count);
      unpack(begin, count, part);
      at::Tensor target = at::from_blob(found + begin, {tokens, count}, {rows, 1}, wide);
      at::mm_out(target, at::from_blob(input, {tokens, cols}, wide), part.t());
      finish<T>(found, bias, begin, begin + count, out);
    }
  });
}

// As above, kWideTokens at a time.
template <class T, class Unpacker>
void many_wide_tokens(const at::Tensor& x, const OptionalTensor& bias, at::Tensor& out, Unpacker&& unpacker) {
  for (int64_t begin = 0; begin < x.size(0); begin += kWideTokens) {
    const int64_t count = std::min(kWideTokens, x.size(0) - begin);
    wide_panels<T>(x.narrow(0, begin, count), bias, out.narrow(0, begin, count), unpacker);
  }
}

#if ACE_PACKED_X86
// Tokens of bfloat16 with AVX-512's bf16 instructions. rows_of(words) returns the rows for one thread, for parts of so
// many words.
template <class RowsOf>
void panel_tokens(const at::Tensor& x, const OptionalTensor& bias, at::Tensor& out, RowsOf&& rows_of) {
  const int64_t words = (x.size(1) + kBitmapColumns - 1) / kBitmapColumns;
  const at::Tensor wide = padded<BFloat16>(x, words);
  const avx512bf16::PanelShape shape = avx512bf16::panel_shape(words);
  const BFloat16* input = data<BFloat16>(wide);
  const BFloat16* shift = bias ? data<BFloat16>(*bias) : nullptr;
  at::parallel_for(0, out.size(1), row_grain(x.numel()), [&](int64_t begin, int64_t end) {
    // Not cleared: the last tile also multiplies rows that do not exist, but their sums are not stored.
    at::Tensor panel = at::empty({avx512bf16::kPanelRows * shape.stride}, x.options());
    at::Tensor pairs = at::empty({avx512bf16::kPanelRows * avx512bf16::kLongRun}, x.options());
    at::Tensor sums = at::empty({x.size(0), avx512bf16::kPanelRows}, x.options().dtype(at::kFloat));
    const avx512bf16::PanelProduct<decltype(rows_of(shape.words))> product{
        rows_of(shape.words),        x.size(1),  input, wide.size(1), x.size(0), shift,
        mutable_data<BFloat16>(out), out.size(1)};
    avx512bf16::panel_product(
        product, begin, end, shape,
        {mutable_data<BFloat16>(panel), mutable_data<BFloat16>(pairs), mutable_data<float>(sums)});
  });
}

// x in pairs of columns, [blocks of 16 tokens, 32 words, 16, 2]: zero beyond the tokens and columns.
inline at::Tensor pairs_of(const at::Tensor& x, int64_t words) {
  const int64_t blocks = (x.size(0) + amx::kRows - 1) / amx::kRows, cols = words * kBitmapColumns;
  const at::Tensor wide = at::zeros({blocks * amx::kRows, cols + amx::kColumns}, x.options());
  wide.narrow(0, 0, x.size(0)).narrow(1, 0, x.size(1)).copy_(x);
  const at::Tensor pairs = at::empty({blocks, amx::kRows * cols}, x.options());
  const int64_t stride = wide.size(1);
  const BFloat16* from = data<BFloat16>(wide);
  BFloat16* to = mutable_data<BFloat16>(pairs);
  at::parallel_for(0, blocks, row_grain(amx::kRows * cols), [&](int64_t first, int64_t last) {
    for (; first < last; ++first)
      amx::write_pairs(from + first * amx::kRows * stride, stride, words, to + first * amx::kRows * cols);
  });
  return pairs;
}

// Tokens of bfloat16 with AMX, so many at a time. rows_of(words) as above.
template <class RowsOf>
void tile_tokens(const at::Tensor& x, const OptionalTensor& bias, at::Tensor& out, RowsOf&& rows_of) {
  const int64_t words = (x.size(1) + kBitmapColumns - 1) / kBitmapColumns, rows = out.size(1);
  for (int64_t token = 0; token < x.size(0); token += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, x.size(0) - token);
    const at::Tensor pairs = pairs_of(x.narrow(0, token, tokens), words);
    const BFloat16* input = data<BFloat16>(pairs);
    const BFloat16* shift = bias ? data<BFloat16>(*bias) : nullptr;
    BFloat16* result = mutable_data<BFloat16>(out) + token * rows;
    at::parallel_for(0, rows, row_grain(tokens * x.size(1)), [&](int64_t begin, int64_t end) {
      // Not cleared: tiles may have rows that do not exist, but their sums are not stored.
      const int64_t height = amx::panel_rows(tokens);
      const at::Tensor tiles = at::empty({height * amx::kPanelWords * kBitmapColumns}, x.options());
      const at::Tensor sums = at::empty({height * pairs.size(0) * amx::kRows}, x.options().dtype(at::kFloat));
      const amx::TileProduct<decltype(rows_of(words))> product{
          rows_of(amx::kPanelWords), input, tokens, shift, result, rows};
      amx::tile_product(product, begin, end, {height, mutable_data<BFloat16>(tiles), mutable_data<float>(sums)});
    });
  }
}
#endif

}  // namespace ace::cpu
