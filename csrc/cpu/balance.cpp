// balance_mean_ on the CPU. Rows are independent, so they are shared among the threads.
#include "ops/balance.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/balance_search.h"
#include "cpu/dispatch.h"
#include "cpu/nm_rows.h"

namespace ace::cpu {
namespace {

// Scans and swaps until a round swaps nothing.
template <class T>
class RowBalancer {
 public:
  RowBalancer(const float* variance, const float* mean, int64_t cols, int group_m)
      : group_m_(group_m),
        variance_(group_m > 0 ? by_place(variance, cols, group_m) : std::vector<float>{}),
        mean_(group_m > 0 ? by_place(mean, cols, group_m) : std::vector<float>{}) {}

  int64_t balance(const BalanceRow<T>& row, BalanceState state, int64_t rounds) const {
    for (int64_t made = -1; rounds > 0 && state.swaps > made; --rounds) {
      made = state.swaps;
      const float twice_shift = static_cast<float>(2.0 * state.shift);
      if (group_m_ > 0) {
        swap_in_groups(row, twice_shift, &state);
      } else {
        swap_in_row(row, twice_shift, &state);
      }
      if (state.swaps == made) break;
    }
    return state.swaps;
  }

 private:
  void swap_in_row(const BalanceRow<T>& row, float twice_shift, BalanceState* state) const {
    LaneBest back, out;
    scan_columns(row, twice_shift, &back, &out);
    Offers restored, removed;
    for (int l = 0; l < kLanes; ++l) {
      const int64_t j = int64_t{back.stretch[l]} * kLanes + l, i = int64_t{out.stretch[l]} * kLanes + l;
      restored.drop(l), removed.drop(l);
      if (back.change[l] < kNoChange) restored.put(l, exchange({0.0, 0.0}, row.at(j)), j);
      if (out.change[l] < kNoChange) removed.put(l, row.at(i), i);
    }
    swap_offers(row, restored, removed, state);
  }

  void swap_in_groups(const BalanceRow<T>& row, float twice_shift, BalanceState* state) const {
    const PlacedMoments moments{variance_.data(), mean_.data()};
    LaneBest best;
    int32_t places[kLanes];
    switch (group_m_) {
      case 4: scan_groups<4>(row, moments, group_m_, twice_shift, &best, places); break;
      case 8: scan_groups<8>(row, moments, group_m_, twice_shift, &best, places); break;
      default: scan_groups<0>(row, moments, group_m_, twice_shift, &best, places);
    }
    Offers pairs;
    double spreads[kLanes];
    int64_t removed[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t first = (int64_t{best.stretch[l]} * kLanes + l) * group_m_;
      pairs.drop(l);
      if (!(best.change[l] < kNoChange)) continue;
      removed[l] = first + places[l] % kMaxGroup;
      const Removal out = row.at(removed[l]), back = row.at(first + places[l] / kMaxGroup);
      pairs.put(l, exchange(out, back), first + places[l] / kMaxGroup);
      spreads[l] = out.spread + back.spread;
    }
    swap_pairs(row, pairs, spreads, removed, state);
  }

  int group_m_;
  std::vector<float> variance_, mean_;  // by_place; empty without groups
};

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
  const std::vector<double> wide_mean(data<float>(mean), data<float>(mean) + cols);
  std::atomic<bool> finite{true};
  with_scalar(weight.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    const auto row_at = [&](int64_t i) {
      return BalanceRow<T>{data<T>(weight) + i * weight.stride(0), data<float>(variance), data<float>(mean),
                           mutable_data<bool>(mask) + i * mask.stride(0), cols};
    };
    at::parallel_for(0, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        BalanceState& state = start[static_cast<size_t>(i)];
        state = start_balance(row_at(i), wide_mean.data());
        if (!std::isfinite(state.shifts)) finite = false;
      }
    });
    if (!finite) refuse_not_finite("balance_mean_", "weight", weight);
    const RowBalancer<T> balancer(data<float>(variance), data<float>(mean), cols, static_cast<int>(group_m));
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
