// balance_mean_ on the CPU. Rows are independent and divided among the threads.
#include "ops/balance.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/balance_row.h"
#include "cpu/dispatch.h"

namespace ace::cpu {
namespace {

void check_moments(const at::Tensor& variance, const at::Tensor& mean) {
  refuse_not_finite("balance_mean_", "variance", variance);
  refuse_not_finite("balance_mean_", "mean", mean);
  for (int64_t j = 0; j < variance.size(0); ++j) {
    const float value = data<float>(variance)[j];
    TORCH_CHECK_VALUE(value >= 0.0f, "balance_mean_: variance must not be negative (got ", value, " at index [", j,
                      "])");
  }
}

at::Tensor balance_mean(at::Tensor mask, const at::Tensor& weight, const at::Tensor& variance, const at::Tensor& mean,
                        int64_t group_m, int64_t rounds) {
  check_balance_mean(mask, weight, variance, mean, group_m, rounds);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  at::Tensor swaps = at::zeros({rows}, weight.options().dtype(at::kLong));
  if (rows == 0 || cols == 0) return swaps;
  check_moments(variance, mean);
  int64_t* made = mutable_data<int64_t>(swaps);
  std::vector<BalanceState> start(static_cast<size_t>(rows));
  std::atomic<bool> finite{true};
  with_scalar(weight.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    const auto row_at = [&](int64_t i) {
      return BalanceRow<T>{data<T>(weight) + i * weight.stride(0), data<float>(variance), data<float>(mean),
                           mutable_data<bool>(mask) + i * mask.stride(0), cols};
    };
    const RowBalancer<T> balancer(data<float>(variance), data<float>(mean), cols, static_cast<int>(group_m));
    at::parallel_for(0, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        BalanceState& state = start[static_cast<size_t>(i)];
        state = balancer.start(row_at(i));
        if (!std::isfinite(state.shifts)) finite = false;
      }
    });
    if (!finite) refuse_not_finite("balance_mean_", "weight", weight);
    at::parallel_for(0, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        made[i] = balancer.balance(row_at(i), start[static_cast<size_t>(i)], rounds);
    });
  });
  return swaps;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) { m.impl("balance_mean_", &balance_mean); }

}  // namespace ace::cpu
