// Statistics of activations on the CPU.
#include "ops/moments.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/moments.h"
#include "cpu/dispatch.h"
#include "cpu/multiversion.h"

namespace ace::cpu {
namespace {

// Tokens of a block, and the most columns of a strip: one strip of a block stays in the cache between its two passes.
constexpr int64_t kBlockTokens = 64;
constexpr int64_t kStripColumns = 512;

// The width of strips of about equal size, enough of them for all threads. Columns are independent: any width gives the
// same bits.
int64_t strip_columns(int64_t cols) {
  if (cols == 0) return 1;
  constexpr int64_t kLine = 64;
  const int64_t threads = at::get_num_threads();
  const int64_t strips = ((cols + kStripColumns - 1) / kStripColumns + threads - 1) / threads * threads;
  const int64_t width = (cols + strips - 1) / strips;
  return (width + kLine - 1) / kLine * kLine;
}

// The tokens of a block with a weight above 0, for one strip of columns.
template <class T>
struct Block {
  int64_t tokens = 0;
  const T* row[kBlockTokens];
  float weight[kBlockTokens];
};

// Tokens added in one pass, so that each sum is loaded and stored once for all of them. Additions stay in token order
// for any value.
constexpr int kTogether = 8;

// mean[j] += sum of share_t x_tj over tokens [begin, begin + kCount).
template <int kCount, class T>
ACE_HD void add_to_mean(const Block<T>& block, int64_t begin, float weight_sum, int64_t cols,
                        float* ACE_RESTRICT mean) {
  float share[kCount];
  for (int t = 0; t < kCount; ++t) share[t] = block.weight[begin + t] / weight_sum;
  const T* const* row = block.row + begin;
  for (int64_t j = 0; j < cols; ++j) {
    float sum = mean[j];
    ACE_UNROLL
    for (int t = 0; t < kCount; ++t) sum += share[t] * to_float(row[t][j]);
    mean[j] = sum;
  }
}

// deviation[j] += sum of w_t d_tj, m2[j] += sum of w_t d_tj^2 with d_tj = x_tj - mean_j, over the same.
template <int kCount, class T>
ACE_HD void add_deviations(const Block<T>& block, int64_t begin, int64_t cols, const float* ACE_RESTRICT mean,
                           float* ACE_RESTRICT deviation, float* ACE_RESTRICT m2) {
  float weight[kCount];
  for (int t = 0; t < kCount; ++t) weight[t] = block.weight[begin + t];
  const T* const* row = block.row + begin;
  for (int64_t j = 0; j < cols; ++j) {
    float sum = deviation[j], square_sum = m2[j];
    ACE_UNROLL
    for (int t = 0; t < kCount; ++t) {
      const float d = to_float(row[t][j]) - mean[j];
      sum += weight[t] * d;
      square_sum += weight[t] * d * d;
    }
    deviation[j] = sum;
    m2[j] = square_sum;
  }
}

// Weighted mean and sum of squared deviations of a strip of one block by the corrected two-pass rule: deviations from a
// first mean are small, so their float32 sums are precise enough even if a column's mean is a thousand times its
// spread, and the sum of the deviations corrects the first mean's rounding error.
template <class T>
ACE_MULTIVERSION void block_moments(const Block<T>& block, float weight_sum, int64_t cols, float* mean,
                                    float* deviation, float* m2) {
  for (int64_t j = 0; j < cols; ++j) mean[j] = deviation[j] = m2[j] = 0.0f;
  int64_t t = 0;
  for (; t + kTogether <= block.tokens; t += kTogether) add_to_mean<kTogether>(block, t, weight_sum, cols, mean);
  for (; t < block.tokens; ++t) add_to_mean<1>(block, t, weight_sum, cols, mean);
  t = 0;
  for (; t + kTogether <= block.tokens; t += kTogether) {
    add_deviations<kTogether>(block, t, cols, mean, deviation, m2);
  }
  for (; t < block.tokens; ++t) add_deviations<1>(block, t, cols, mean, deviation, m2);
}

template <class Real>
ACE_MULTIVERSION void merge_strip(double weight_before, double weight_block, const float* mean, const float* deviation,
                                  const float* m2, int64_t cols, Real* state_mean, Real* state_m2) {
  for (int64_t j = 0; j < cols; ++j) {
    const double shift = static_cast<double>(deviation[j]) / weight_block;
    const double block_mean = static_cast<double>(mean[j]) + shift;
    const double corrected = static_cast<double>(m2[j]) - shift * shift * weight_block;
    double merged_mean = static_cast<double>(state_mean[j]), merged_m2 = static_cast<double>(state_m2[j]);
    merge_moments(weight_before, merged_mean, merged_m2, weight_block, block_mean, corrected > 0.0 ? corrected : 0.0);
    state_mean[j] = static_cast<Real>(merged_mean);
    state_m2[j] = static_cast<Real>(merged_m2);
  }
}

// Updates one strip of columns with all tokens, one block at a time.
template <class T, class Real>
void update_strip(const T* x, int64_t stride, int64_t tokens, const float* token_weight, double weight_before,
                  int64_t cols, Real* state_mean, Real* state_m2) {
  float mean[kStripColumns], deviation[kStripColumns], m2[kStripColumns];
  for (int64_t t = 0; t < tokens; t += kBlockTokens) {
    const int64_t count = std::min(kBlockTokens, tokens - t);
    double weight_block = 0.0;
    Block<T> block;
    for (int64_t i = t; i < t + count; ++i) {
      if (token_weight[i] == 0.0f) continue;  // padding may hold anything
      block.row[block.tokens] = x + i * stride;
      block.weight[block.tokens++] = token_weight[i];
      weight_block += static_cast<double>(token_weight[i]);
    }
    if (block.tokens == 0) continue;
    block_moments(block, static_cast<float>(weight_block), cols, mean, deviation, m2);
    merge_strip(weight_before, weight_block, mean, deviation, m2, cols, state_mean, state_m2);
    weight_before += weight_block;
  }
}

// The token weights, or 1 for each token. The caller's values are checked here.
std::vector<float> token_weights(const OptionalTensor& token_weight, int64_t tokens) {
  if (!token_weight) return std::vector<float>(static_cast<size_t>(tokens), 1.0f);
  const float* weights = data<float>(*token_weight);
  for (int64_t t = 0; t < tokens; ++t) {
    TORCH_CHECK_VALUE(weights[t] >= 0.0f && is_finite(weights[t]),
                      "update_moments_: token_weight must be finite and not negative (got ", weights[t], " at index [",
                      t, "])");
  }
  return {weights, weights + tokens};
}

template <class T, class Real>
void update_state(const at::Tensor& weight_sum, const at::Tensor& mean, const at::Tensor& m2, const at::Tensor& x,
                  const std::vector<float>& weights) {
  const int64_t tokens = x.size(0), cols = x.size(1);
  Real* state_weight = mutable_data<Real>(weight_sum);
  const double weight_before = static_cast<double>(*state_weight);
  const int64_t width = strip_columns(cols);
  at::parallel_for(0, (cols + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t j = s * width;
      update_strip(data<T>(x) + j, x.stride(0), tokens, weights.data(), weight_before, std::min(width, cols - j),
                   mutable_data<Real>(mean) + j, mutable_data<Real>(m2) + j);
    }
  });
  double total = weight_before;
  for (const float weight : weights) total += static_cast<double>(weight);
  *state_weight = static_cast<Real>(total);
}

template <class T>
ACE_MULTIVERSION double square_sum(const T* row, int64_t cols) {
  constexpr int64_t kLanes = 32;  // independent sums; 16 would be unrolled instead of vectorised
  double lane[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const double value = to_float(row[j + l]);
      lane[l] += value * value;
    }
  }
  double sum = 0.0;
  for (; j < cols; ++j) sum += static_cast<double>(to_float(row[j])) * static_cast<double>(to_float(row[j]));
  for (const double part : lane) sum += part;
  return sum;
}

// [rows, cols] float32: (scale_t row_tj)^2; scale null for 1.
template <class T>
ACE_MULTIVERSION void scaled_squares(const T* row, float scale, int64_t cols, float* out) {
  for (int64_t j = 0; j < cols; ++j) {
    const float value = scale * to_float(row[j]);
    out[j] = value * value;
  }
}

at::Tensor squares(const at::Tensor& a, const float* scale) {
  at::Tensor out = at::empty(a.sizes(), a.options().dtype(at::kFloat));
  const int64_t cols = a.size(1);
  with_scalar(a.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    at::parallel_for(0, a.size(0), row_grain(cols), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        scaled_squares(data<T>(a) + t * a.stride(0), scale ? scale[t] : 1.0f, cols,
                       mutable_data<float>(out) + t * cols);
      }
    });
  });
  return out;
}

void update_moments(at::Tensor weight_sum, at::Tensor mean, at::Tensor m2, const at::Tensor& x,
                    const OptionalTensor& token_weight) {
  check_update_moments(weight_sum, mean, m2, x, token_weight);
  const std::vector<float> weights = token_weights(token_weight, x.size(0));
  with_scalar(x.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    if (mean.scalar_type() == at::kDouble) {
      update_state<T, double>(weight_sum, mean, m2, x, weights);
    } else {
      update_state<T, float>(weight_sum, mean, m2, x, weights);
    }
  });
}

at::Tensor inverse_square_norm(const at::Tensor& a) {
  check_inverse_square_norm(a);
  const int64_t tokens = a.size(0), cols = a.size(1);
  at::Tensor out = at::empty({tokens}, a.options().dtype(at::kFloat));
  float* r = mutable_data<float>(out);
  with_scalar(a.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    at::parallel_for(0, tokens, row_grain(cols), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const double sum = square_sum(data<T>(a) + t * a.stride(0), cols);
        r[t] = sum == 0.0 ? 0.0f : static_cast<float>(1.0 / sum);
      }
    });
  });
  return out;
}

void update_cosine_moment(at::Tensor moment, const at::Tensor& x, const at::Tensor& a) {
  check_update_cosine_moment(moment, x, a);
  // Processed in parts, which bounds the memory of the float32 squares.
  constexpr int64_t kTokens = 2048;
  for (int64_t t = 0; t < x.size(0); t += kTokens) {
    const int64_t count = std::min(kTokens, x.size(0) - t);
    const at::Tensor a_part = a.narrow(0, t, count);
    const at::Tensor r = inverse_square_norm(a_part);
    moment.addmm_(squares(a_part, data<float>(r)).t(), squares(x.narrow(0, t, count), nullptr));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) {
  m.impl("update_moments_", &update_moments);
  m.impl("inverse_square_norm", &inverse_square_norm);
  m.impl("update_cosine_moment_", &update_cosine_moment);
}

}  // namespace ace::cpu
