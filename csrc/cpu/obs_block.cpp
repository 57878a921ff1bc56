// obs_block_ on the CPU: each row's recursion runs to its end, rows in parallel.
#include "ops/obs_block.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "core/nm_select.h"
#include "core/obs_block.h"
#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/triangular.h"

namespace ace::cpu {
namespace {

void choose_group(const Triangular& u, const float* weight, bool* mask, int64_t first, int group_m, int keep_n) {
  uint32_t keys[kMaxGroup];
  for (int g = 0; g < group_m; ++g) keys[g] = obs_key(weight[first + g], u.diagonal(first + g));
  const uint32_t kept = keep_best<0>(keys, group_m, keep_n);
  for (int g = 0; g < group_m; ++g) mask[first + g] = (kept >> g & 1u) != 0;
}

void solve_row(const Triangular& u, float* weight, float* error, bool* mask, int keep_n, int group_m) {
  for (int64_t c = 0; c < u.width; ++c) {
    if (group_m > 0 && c % group_m == 0) choose_group(u, weight, mask, c, group_m, keep_n);
    error[c] = mask[c] ? 0.0f : obs_error(weight[c], u.diagonal(c));
    if (mask[c]) continue;
    weight[c] = 0.0f;
    if (error[c] != 0.0f) correct_later(weight + c + 1, error[c], u.row(c) + c + 1, u.width - c - 1);
  }
}

void obs_block(at::Tensor weight, at::Tensor error, at::Tensor mask, const at::Tensor& factor, int64_t keep_n,
               int64_t group_m) {
  check_obs_block(weight, error, mask, factor, keep_n, group_m);
  const int64_t rows = weight.size(0), width = weight.size(1);
  if (rows == 0 || width == 0) return;
  check_finite_rows("obs_block_", "weight", weight);
  check_triangular("obs_block_", factor);
  const Triangular u(factor);
  at::parallel_for(0, rows, row_grain(width * width / 4), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      solve_row(u, mutable_data<float>(weight) + i * weight.stride(0), mutable_data<float>(error) + i * error.stride(0),
                mutable_data<bool>(mask) + i * mask.stride(0), static_cast<int>(keep_n), static_cast<int>(group_m));
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) { m.impl("obs_block_", &obs_block); }

}  // namespace ace::cpu
