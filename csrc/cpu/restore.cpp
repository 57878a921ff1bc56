// restore_mean_ on the CPU. Rows are independent and divided among the threads; each is read twice, the second time
// from the cache.
#include "ops/restore.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "core/restore.h"
#include "cpu/choose.h"
#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/multiversion.h"

namespace ace::cpu {
namespace {

ACE_MULTIVERSION void restore_row(float* ACE_RESTRICT weight, const uint8_t* ACE_RESTRICT mask,
                                  const float* ACE_RESTRICT mean, const float* ACE_RESTRICT direction, int64_t cols) {
  double shift[kLanes] = {}, gain[kLanes] = {};
  const auto add = [&](int64_t j, int l) __attribute__((always_inline)) {
    const uint32_t kept = all_bits(mask[j]);
    const RestoreTerms terms = restore_terms(choose(kept, 0.0f, weight[j]), mean[j], choose(kept, direction[j], 0.0f));
    shift[l] += terms.shift;
    gain[l] += terms.gain;
  };
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) add(j + l, l);
  }
  for (int l = 0; j + l < cols; ++l) add(j + l, l);
  const double scale = restore_scale(fold_lanes(shift), fold_lanes(gain));
  for (j = 0; j < cols; ++j) {
    weight[j] = choose(all_bits(mask[j]), restored_weight(weight[j], direction[j], scale), 0.0f);
  }
}

void check_direction(const at::Tensor& mean, const at::Tensor& direction) {
  refuse_not_finite("restore_mean_", "mean", mean);
  refuse_not_finite("restore_mean_", "direction", direction);
  for (int64_t j = 0; j < mean.size(0); ++j) {
    const float m = data<float>(mean)[j], d = data<float>(direction)[j];
    TORCH_CHECK_VALUE(is_restorable(m, d), "restore_mean_: direction must have the sign of mean (got ", d, " for ", m,
                      " at index [", j, "])");
  }
}

void restore_mean(at::Tensor weight, const at::Tensor& mask, const at::Tensor& mean, const at::Tensor& direction) {
  check_restore_mean(weight, mask, mean, direction);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  if (rows == 0 || cols == 0) return;
  check_finite_rows("restore_mean_", "weight", weight);
  check_direction(mean, direction);
  at::parallel_for(0, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      restore_row(mutable_data<float>(weight) + i * weight.stride(0), bytes(data<bool>(mask) + i * mask.stride(0)),
                  data<float>(mean), data<float>(direction), cols);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) { m.impl("restore_mean_", &restore_mean); }

}  // namespace ace::cpu
