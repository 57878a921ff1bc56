// quantized_linear and unpack_quantized on the CPU. As in cpu/packed.cpp, weights are expanded in registers for a few
// tokens, and unpacked in panels for many.
#include "ops/quantized.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "cpu/packed_torch.h"
#include "cpu/quantized_level.h"
#include "cpu/quantized_panel.h"
#include "cpu/row_shares.h"

namespace ace::cpu {
namespace {

// The most tokens for the loops of with_quantized_product; panels or tiles of bfloat16 are faster for more.
template <class S>
int64_t most_few_tokens([[maybe_unused]] PackedLevel level) {
#if ACE_PACKED_X86
  if (std::is_same_v<S, BFloat16> && level == PackedLevel::avx512_amx) return amx::TiledInput::kTogether;
  if (std::is_same_v<S, BFloat16> && level == PackedLevel::avx512_bf16) return 4;
#endif
  return 16;
}

template <class S>
QuantizedMatrix<S> matrix_of(const at::Tensor& bitmap, const at::Tensor& codes, const at::Tensor& scales, int64_t group,
                             const OptionalTensor& row_start) {
  return {data<uint8_t>(bitmap),
          bitmap.size(1) / 8,
          data<uint8_t>(codes),
          codes.numel(),
          row_start ? data<int64_t>(*row_start) : nullptr,
          codes.size(-1),
          data<S>(scales),
          scales.size(1),
          group / kBitmapColumns};
}

// Zeros, so that rows whose counts disagree have finite weights.
at::Tensor space_for(int64_t words) {
  return at::zeros({QuantizedSpace::size(words)}, at::TensorOptions().dtype(at::kByte));
}

// x of the kind Input.
template <class Input, class S>
at::Tensor input_of(const at::Tensor& x, int64_t words, int64_t group_words) {
  if constexpr (std::is_same_v<Input, WideInput>) {
    return padded<float>(x, words);
  } else {
    at::Tensor found = at::empty({Input::size(x.size(0), words, group_words)}, x.options().dtype(at::kByte));
    Input::write(data<S>(x), x.stride(0), x.size(0), x.size(1), words, group_words, mutable_data<uint8_t>(found));
    return found;
  }
}

template <int kBits, class S>
void few_tokens(const QuantizedMatrix<S>& matrix, const at::Tensor& x, const OptionalTensor& bias, at::Tensor& out) {
  const int64_t tokens = x.size(0), rows = out.size(1);
  const at::Tensor sums = at::empty({tokens, rows}, x.options().dtype(at::kFloat));
  with_quantized_product<kBits, S>(packed_level(), tokens, [&](auto* loop, auto input) {
    using Input = decltype(input);
    using X = std::conditional_t<std::is_same_v<Input, WideInput>, float, uint8_t>;
    const at::Tensor given = input_of<Input, S>(x, matrix.words, matrix.group_words);
    const QuantizedProduct<S, X> product{matrix, data<X>(given), given.numel() / tokens, mutable_data<float>(sums),
                                         rows};
    const int64_t threads = at::get_num_threads(), grain = row_grain(tokens * x.size(1));
    RowShares shares(rows, std::clamp<int64_t>(rows / grain, 1, threads));
    at::parallel_for(0, shares.count(), 1, [&](int64_t first, int64_t last) {
      const at::Tensor space = space_for(matrix.words);
      for (; first < last; ++first)
        shares.work(first, [&](int64_t begin, int64_t end) {
          loop(product, tokens, begin, end, space.mutable_data_ptr());
          finish<S>(product.out, bias, begin, end, out);
        });
    });
  });
}

// Rows begin to begin + count in float32.
template <int kBits, class S>
void unpack(const QuantizedMatrix<S>& matrix, int64_t begin, int64_t count, int64_t cols, float* out, void* space) {
  with_quantized_loops<kBits, S>(packed_level(),
                                 [&](auto*, auto* loop) { loop(matrix, begin, begin + count, cols, out, space); });
}

template <int kBits, class S>
void many_tokens(const QuantizedMatrix<S>& matrix, const at::Tensor& x, const OptionalTensor& bias, at::Tensor& out) {
#if ACE_PACKED_X86
  if constexpr (std::is_same_v<S, BFloat16>) {
    using Rows = avx512bf16::QuantizedRows<kBits>;
    if (packed_level() >= PackedLevel::avx512_bf16 && matrix.words > 0) {
      const auto rows_of = [&](int64_t words) {
        return Rows{matrix, std::shared_ptr<BFloat16[]>(new BFloat16[Rows::space_size(words)])};
      };
      return packed_level() == PackedLevel::avx512_amx ? tile_tokens(x, bias, out, rows_of)
                                                       : panel_tokens(x, bias, out, rows_of);
    }
  }
#endif
  many_wide_tokens<S>(x, bias, out, [&](int64_t) {
    return [&matrix, space = space_for(matrix.words)](int64_t begin, int64_t count, at::Tensor& panel) {
      unpack<kBits>(matrix, begin, count, panel.size(1), mutable_data<float>(panel), space.mutable_data_ptr());
    };
  });
}

template <int kBits, class S>
void unpack_rounded(const QuantizedMatrix<S>& matrix, at::Tensor& out) {
  const int64_t cols = out.size(1);
  Torch<S>* result = mutable_data<Torch<S>>(out);
  at::parallel_for(0, out.size(0), row_grain(cols), [&](int64_t begin, int64_t end) {
    const at::Tensor space = space_for(matrix.words);
    const at::Tensor row = at::empty({cols}, at::TensorOptions().dtype(at::kFloat));
    float* wide = mutable_data<float>(row);
    for (int64_t i = begin; i < end; ++i) {
      unpack<kBits>(matrix, i, 1, cols, wide, space.mutable_data_ptr());
      for (int64_t j = 0; j < cols; ++j) result[i * cols + j] = static_cast<Torch<S>>(wide[j]);
    }
  });
}

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& codes,
                            const at::Tensor& scales, int64_t bits, int64_t group, const OptionalTensor& row_start,
                            const OptionalTensor& bias) {
  check_quantized_linear(x, bitmap, codes, scales, bits, group, row_start, bias);
  const c10::impl::ExcludeDispatchKeyGuard as_given(c10::autocast_dispatch_keyset);
  at::Tensor out = at::empty({x.size(0), bitmap.size(0)}, x.options());
  if (out.numel() == 0) return out;
  with_scalar(x.scalar_type(), [&](auto type) {
    using S = decltype(type);
    const auto matrix = matrix_of<S>(bitmap, codes, scales, group, row_start);
    const bool few = x.size(0) <= most_few_tokens<S>(packed_level());
    auto* multiply =
        bits == 8 ? (few ? &few_tokens<8, S> : &many_tokens<8, S>) : (few ? &few_tokens<4, S> : &many_tokens<4, S>);
    multiply(matrix, x, bias, out);
  });
  return out;
}

at::Tensor unpack_quantized(const at::Tensor& bitmap, const at::Tensor& codes, const at::Tensor& scales, int64_t bits,
                            int64_t group, const OptionalTensor& row_start, int64_t cols) {
  check_quantized("unpack_quantized", bitmap, codes, scales, bits, group, row_start, cols);
  at::Tensor out = at::empty({bitmap.size(0), cols}, scales.options());
  with_scalar(scales.scalar_type(), [&](auto type) {
    using S = decltype(type);
    const auto matrix = matrix_of<S>(bitmap, codes, scales, group, row_start);
    bits == 8 ? unpack_rounded<8>(matrix, out) : unpack_rounded<4>(matrix, out);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) {
  m.impl("quantized_linear", &quantized_linear);
  m.impl("unpack_quantized", &unpack_quantized);
}

}  // namespace ace::cpu
