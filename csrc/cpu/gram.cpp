// update_gram_ on the CPU. The matrix is divided into blocks of columns; only blocks on and below the diagonal are
// computed. With AMX torch's brgemm multiplies bfloat16 as it is and sums in float32. Anything else is converted to
// float32 first, also bfloat16 with AVX-512 BF16, for which torch does not pack.
#include "ops/gram.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/dispatch.h"

namespace ace::cpu {
namespace {

constexpr int64_t kWideBlocks = 8;    // of these a share of 9/16 of all multiplications is left
constexpr int64_t kWideColumns = 96;  // the least width of a block: with fewer columns products are slow

constexpr int64_t kMirrored = 64;  // columns that are copied at a time

// The upper half of a symmetric matrix from its lower half, diagonal blocks included: those of two calls can differ.
void mirror_lower(const at::Tensor& gram) {
  for (int64_t i = 0; i < gram.size(0); i += kMirrored) {
    const int64_t count = std::min(kMirrored, gram.size(0) - i);
    const at::Tensor rows = gram.narrow(0, i, count), diagonal = rows.narrow(1, i, count);
    gram.narrow(0, 0, i).narrow(1, i, count).copy_(rows.narrow(1, 0, i).t());
    diagonal.copy_(diagonal.tril().add_(diagonal.tril(-1).t()));
  }
}

void add_wide(const at::Tensor& gram, const at::Tensor& x) {
  const int64_t d = gram.size(0), width = std::max(kWideColumns, (d + kWideBlocks - 1) / kWideBlocks);
  const at::Tensor rows = x.to(at::kFloat);
  for (int64_t i = 0; i < d; i += width) {
    const int64_t count = std::min(width, d - i);
    gram.narrow(0, i, count).narrow(1, 0, i + count).addmm_(rows.narrow(1, i, count).t(), rows.narrow(1, 0, i + count));
  }
}

#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
namespace blas = at::native::cpublas;

constexpr int64_t kColumns = 64;  // of a block; what pack() supports
constexpr int64_t kTokens = 256;  // multiplied at a time: a block of them is in the cache

bool multiplies_bfloat16() { return blas::could_pack(at::kBFloat16); }

void add_bfloat16(const at::Tensor& gram, const at::Tensor& x) {
  const int64_t d = gram.size(0), blocks = (d + kColumns - 1) / kColumns;
  const at::Tensor across = at::empty({d, kTokens}, x.options());
  const at::Tensor packed = at::empty({blocks, kTokens, kColumns}, x.options());
  const auto* left = data<c10::BFloat16>(across);
  auto* right = mutable_data<c10::BFloat16>(packed);
  float* sums = mutable_data<float>(gram);
  const auto columns = [d](int64_t block) { return std::min(kColumns, d - block * kColumns); };
  for (int64_t t = 0; t < x.size(0); t += kTokens) {
    at::Tensor part = x.narrow(0, t, std::min(kTokens, x.size(0) - t));
    if (part.size(0) % 2) part = at::cat({part, at::zeros({1, d}, x.options())});  // the instructions take pairs
    const int64_t tokens = part.size(0), stride = part.stride(0);
    const auto* rows = data<c10::BFloat16>(part);
    across.narrow(1, 0, tokens).copy_(part.t());
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        blas::pack(tokens, columns(j), stride, kColumns, at::kBFloat16, at::kBFloat16, rows + j * kColumns,
                   right + j * kTokens * kColumns);
    });
    const auto add_row = [&](int64_t i) {
      for (int64_t j = 0; j <= i; ++j)
        blas::brgemm(columns(i), columns(j), tokens, kTokens, kColumns, d, true, left + i * kColumns * kTokens,
                     right + j * kTokens * kColumns, sums + (i * d + j) * kColumns);
    };
    at::parallel_for(0, (blocks + 1) / 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {  // a short and a long row, so that threads have equal shares
        add_row(i);
        if (blocks - 1 - i != i) add_row(blocks - 1 - i);
      }
      blas::brgemm_release();
    });
  }
}
#endif

void add_lower(const at::Tensor& gram, const at::Tensor& x) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  if (x.scalar_type() == at::kBFloat16 && multiplies_bfloat16()) return add_bfloat16(gram, x);
#endif
  add_wide(gram, x);
}

void update_gram(at::Tensor gram, const at::Tensor& x, bool mirror) {
  check_update_gram(gram, x);
  if (gram.numel() == 0) return;
  if (x.size(0) != 0) add_lower(gram, x);
  if (mirror) mirror_lower(gram);
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) { m.impl("update_gram_", &update_gram); }

}  // namespace ace::cpu
