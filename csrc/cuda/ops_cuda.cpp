// The ops on CUDA: checks, guard, workspace from torch's allocator, current stream, launch. The only file that sees
// both torch and the launchers; of torch's CUDA side it includes c10/cuda alone. Contracts: ops.h, and where CUDA
// differs:
//
//   not finite      deferred: nothing is raised, since that would have to wait for the device; a flag is raised there
//                   (not_finite.h). A row, a matrix or an N:M group with a score that is not finite stays as it was,
//                   and the threshold of such a row or matrix is NaN.
//                   The solvers leave such a row alone, or all rows where gram or factor is at fault (a mask without
//                   its pattern and a diagonal that is not positive count as well); the swaps of such a row are -1.
//   cosine moment   products on tensor cores: r_t a_ti^2 and r_t x_tj^2 are each rounded to bfloat16, 2^-8 at most,
//                   multiplied exactly and added in float32. All terms are positive, so each call's sum is within
//                   2^-7 + 2^-15 of its value, plus the float32 additions. Float32 input gets no more than that.
//   capture         every op can be captured in a CUDA graph: no allocation but the caching allocator's, no waiting.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "check.h"
#include "cuda/launchers.h"
#include "cuda/not_finite.h"

namespace ace {
namespace {

// Codes of the flag; the index into their names.
enum OpCode {
  kNoOp,
  kUpdateMoments,
  kInverseSquareNorm,
  kUpdateCosineMoment,
  kScore,
  kPruneTopk,
  kPruneNm,
  kPruneByScore,
  kPruneNmByScore,
  kScoreHistogram,
  kPruneAt,
  kRefineSwaps,
  kObsBlock,
  kOpCodes
};

constexpr const char* kOpNames[kOpCodes] = {
    "",          "update_moments_", "inverse_square_norm", "update_cosine_moment_", "score",     "prune_topk_",
    "prune_nm_", "prune_by_score_", "prune_nm_by_score_",  "score_histogram",       "prune_at_", "refine_swaps_",
    "obs_block_"};

Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kHalf: return Dtype::float16;
    case at::kBFloat16: return Dtype::bfloat16;
    default: return Dtype::float32;
  }
}

Activations activations(const at::Tensor& x) {
  return {x.const_data_ptr(), x.size(0), x.size(1), x.stride(0), dtype_of(x)};
}

const float* optional_data(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

ScoredArguments scored_arguments(const at::Tensor& weight, Formula formula, const OptionalTensor& column,
                                 const OptionalTensor& moment) {
  return {weight.mutable_data_ptr(),
          optional_data(column),
          optional_data(moment),
          weight.size(0),
          weight.size(1),
          weight.stride(0),
          dtype_of(weight),
          formula};
}

// Memory that lives until the stream has gone past the op: the caching allocator reuses it in stream order.
at::Tensor workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

at::Tensor sums_workspace(const ScoredArguments& matrix, const at::Tensor& weight) {
  return workspace(score_sums_bytes(matrix), weight);
}

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

at::Tensor prune_topk(OpCode code, const at::Tensor& weight, Formula formula, const OptionalTensor& column,
                      const OptionalTensor& moment, int64_t keep_k, std::string_view group_name) {
  const Group group = check_topk(kOpNames[code], weight, keep_k, group_name);
  const at::TensorOptions options = weight.options().dtype(at::kFloat);
  const int64_t groups = group == Group::row ? weight.size(0) : 1;
  if (weight.numel() == 0) return at::full({groups}, std::numeric_limits<float>::infinity(), options);
  at::Tensor threshold = at::empty({groups}, options);
  const ScoredArguments matrix = scored_arguments(weight, formula, column, moment);
  const at::Tensor sums = sums_workspace(matrix, weight);
  float* out = threshold.mutable_data_ptr<float>();
  if (group == Group::row) {
    C10_CUDA_CHECK(launch_prune_rows(matrix, keep_k, out, sums.mutable_data_ptr(), code, stream()));
  } else {
    const at::Tensor work = workspace(prune_matrix_bytes(matrix), weight);
    C10_CUDA_CHECK(
        launch_prune_matrix(matrix, keep_k, out, work.mutable_data_ptr(), sums.mutable_data_ptr(), code, stream()));
  }
  return threshold;
}

void prune_nm(OpCode code, const at::Tensor& weight, Formula formula, const OptionalTensor& column,
              const OptionalTensor& moment, int64_t keep_n, int64_t group_m) {
  check_nm(kOpNames[code], weight, keep_n, group_m);
  const ScoredArguments matrix = scored_arguments(weight, formula, column, moment);
  const at::Tensor sums = sums_workspace(matrix, weight);
  C10_CUDA_CHECK(launch_prune_nm(matrix, static_cast<int>(keep_n), static_cast<int>(group_m), sums.mutable_data_ptr(),
                                 code, stream()));
}

// The kernels read float32 moments: widening a user's half scores is exact.
OptionalTensor as_moment(const at::Tensor& score) { return score.to(at::kFloat).contiguous(); }

}  // namespace

std::string read_and_clear_not_finite(c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  int* flag = nullptr;
  int code = kNoOp;
  C10_CUDA_CHECK(not_finite_flag(&flag));
  C10_CUDA_CHECK(cudaMemcpyAsync(&code, flag, sizeof code, cudaMemcpyDeviceToHost, stream()));
  C10_CUDA_CHECK(cudaMemsetAsync(flag, 0, sizeof code, stream()));
  C10_CUDA_CHECK(cudaStreamSynchronize(stream()));
  return kOpNames[code > kNoOp && code < kOpCodes ? code : kNoOp];
}

void update_moments_cuda(const at::Tensor& x, const OptionalTensor& token_weight, at::Tensor weight_sum,
                         at::Tensor mean, at::Tensor m2) {
  check_update_moments(x, token_weight, weight_sum, mean, m2);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.size(0) == 0) return;
  size_t bytes = 0;
  C10_CUDA_CHECK(update_moments_bytes(activations(x), &bytes));
  const at::Tensor work = workspace(bytes, x);
  C10_CUDA_CHECK(launch_update_moments(activations(x), optional_data(token_weight), mean.scalar_type() == at::kDouble,
                                       weight_sum.mutable_data_ptr(), mean.mutable_data_ptr(), m2.mutable_data_ptr(),
                                       work.mutable_data_ptr(), kUpdateMoments, stream()));
}

at::Tensor inverse_square_norm_cuda(const at::Tensor& a) {
  check_inverse_square_norm(a);
  const c10::cuda::CUDAGuard guard(a.device());
  at::Tensor r = at::empty({a.size(0)}, a.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_inverse_square_norm(activations(a), r.mutable_data_ptr<float>(), kInverseSquareNorm, stream()));
  return r;
}

void update_cosine_moment_cuda(const at::Tensor& x, const at::Tensor& a, at::Tensor moment) {
  check_update_cosine_moment(x, a, moment);
  const c10::cuda::CUDAGuard guard(x.device());
  constexpr int64_t kTokens = 4096;  // at a time: bounds the memory of the squares, and is long enough for the product
  const auto squares = [](const at::Tensor& v, const at::Tensor& r) {
    at::Tensor out = at::empty(v.sizes(), v.options().dtype(at::kBFloat16));
    C10_CUDA_CHECK(launch_scaled_squares(activations(v), r.const_data_ptr<float>(), out.mutable_data_ptr(), stream()));
    return out;
  };
  if (moment.numel() == 0) return;
  for (int64_t t = 0; t < x.size(0); t += kTokens) {
    const int64_t count = std::min(kTokens, x.size(0) - t);
    const at::Tensor a_part = a.narrow(0, t, count);
    at::Tensor r = at::empty({count}, a.options().dtype(at::kFloat));
    C10_CUDA_CHECK(
        launch_inverse_square_norm(activations(a_part), r.mutable_data_ptr<float>(), kUpdateCosineMoment, stream()));
    at::addmm_out(moment, moment, squares(a_part, r).t(), squares(x.narrow(0, t, count), r), at::kFloat);
  }
}

at::Tensor score_cuda(const at::Tensor& weight, std::string_view metric, const OptionalTensor& column,
                      const OptionalTensor& moment) {
  const Formula formula = check_scored("score", weight, metric, column, moment);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor out = at::empty(weight.sizes(), weight.options().dtype(at::kFloat));
  const ScoredArguments matrix = scored_arguments(weight, formula, column, moment);
  const at::Tensor sums = sums_workspace(matrix, weight);
  C10_CUDA_CHECK(launch_score(matrix, out.mutable_data_ptr<float>(), sums.mutable_data_ptr(), kScore, stream()));
  return out;
}

at::Tensor prune_topk_cuda(at::Tensor weight, std::string_view metric, const OptionalTensor& column,
                           const OptionalTensor& moment, int64_t keep_k, std::string_view group) {
  const Formula formula = check_scored("prune_topk_", weight, metric, column, moment);
  const c10::cuda::CUDAGuard guard(weight.device());
  return prune_topk(kPruneTopk, weight, formula, column, moment, keep_k, group);
}

void prune_nm_cuda(at::Tensor weight, std::string_view metric, const OptionalTensor& column,
                   const OptionalTensor& moment, int64_t keep_n, int64_t group_m) {
  const Formula formula = check_scored("prune_nm_", weight, metric, column, moment);
  const c10::cuda::CUDAGuard guard(weight.device());
  prune_nm(kPruneNm, weight, formula, column, moment, keep_n, group_m);
}

at::Tensor prune_by_score_cuda(at::Tensor weight, const at::Tensor& score, int64_t keep_k, std::string_view group) {
  check_given_score("prune_by_score_", weight, score);
  const c10::cuda::CUDAGuard guard(weight.device());
  return prune_topk(kPruneByScore, weight, Formula::given, std::nullopt, as_moment(score), keep_k, group);
}

void prune_nm_by_score_cuda(at::Tensor weight, const at::Tensor& score, int64_t keep_n, int64_t group_m) {
  check_given_score("prune_nm_by_score_", weight, score);
  const c10::cuda::CUDAGuard guard(weight.device());
  prune_nm(kPruneNmByScore, weight, Formula::given, std::nullopt, as_moment(score), keep_n, group_m);
}

at::Tensor score_histogram_cuda(const at::Tensor& weight, std::string_view metric, const OptionalTensor& column,
                                const OptionalTensor& moment, int64_t prefix, int64_t level) {
  const Formula formula = check_scored("score_histogram", weight, metric, column, moment);
  check_level("score_histogram", prefix, level);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor counts = at::zeros({radix_bins(static_cast<int>(level))}, weight.options().dtype(at::kLong));
  const ScoredArguments matrix = scored_arguments(weight, formula, column, moment);
  const at::Tensor work = workspace(prune_matrix_bytes(matrix), weight), sums = sums_workspace(matrix, weight);
  C10_CUDA_CHECK(launch_score_histogram(matrix, static_cast<uint32_t>(prefix), static_cast<int>(level),
                                        counts.mutable_data_ptr<int64_t>(), work.mutable_data_ptr(),
                                        sums.mutable_data_ptr(), kScoreHistogram, stream()));
  return counts;
}

void prune_at_cuda(at::Tensor weight, std::string_view metric, const OptionalTensor& column,
                   const OptionalTensor& moment, int64_t key, int64_t ties) {
  const Formula formula = check_scored("prune_at_", weight, metric, column, moment);
  check_cut("prune_at_", key, ties);
  const c10::cuda::CUDAGuard guard(weight.device());
  const ScoredArguments matrix = scored_arguments(weight, formula, column, moment);
  const at::Tensor work = workspace(prune_matrix_bytes(matrix), weight), sums = sums_workspace(matrix, weight);
  C10_CUDA_CHECK(launch_prune_at(matrix, {static_cast<uint32_t>(key), ties}, work.mutable_data_ptr(),
                                 sums.mutable_data_ptr(), kPruneAt, stream()));
}

at::Tensor refine_swaps_cuda(at::Tensor mask, const at::Tensor& weight, const at::Tensor& gram, int64_t keep_n,
                             int64_t group_m, int64_t max_swaps) {
  check_refine_swaps(mask, weight, gram, keep_n, group_m, max_swaps);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor swaps = at::zeros({weight.size(0)}, weight.options().dtype(at::kLong));
  const SwapArguments arguments{weight.const_data_ptr(),
                                mask.mutable_data_ptr<bool>(),
                                gram.const_data_ptr<float>(),
                                weight.size(0),
                                weight.size(1),
                                weight.stride(0),
                                mask.stride(0),
                                max_swaps,
                                static_cast<int>(keep_n),
                                static_cast<int>(group_m),
                                dtype_of(weight)};
  size_t bytes = 0;
  C10_CUDA_CHECK(refine_swaps_bytes(arguments, &bytes));
  const at::Tensor work = workspace(bytes, weight);
  C10_CUDA_CHECK(launch_refine_swaps(arguments, swaps.mutable_data_ptr<int64_t>(), work.mutable_data_ptr(),
                                     kRefineSwaps, stream()));
  return swaps;
}

void obs_block_cuda(at::Tensor weight, at::Tensor error, at::Tensor mask, const at::Tensor& factor, int64_t keep_n,
                    int64_t group_m) {
  check_obs_block(weight, error, mask, factor, keep_n, group_m);
  const c10::cuda::CUDAGuard guard(weight.device());
  const ObsArguments arguments{weight.mutable_data_ptr<float>(),
                               error.mutable_data_ptr<float>(),
                               mask.mutable_data_ptr<bool>(),
                               factor.const_data_ptr<float>(),
                               weight.size(0),
                               weight.size(1),
                               weight.stride(0),
                               error.stride(0),
                               mask.stride(0),
                               factor.stride(0),
                               static_cast<int>(keep_n),
                               static_cast<int>(group_m)};
  const at::Tensor work = workspace(obs_block_bytes(), weight);
  C10_CUDA_CHECK(launch_obs_block(arguments, work.mutable_data_ptr(), kObsBlock, stream()));
}

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) {
  m.impl("update_moments_", &update_moments_cuda);
  m.impl("inverse_square_norm", &inverse_square_norm_cuda);
  m.impl("update_cosine_moment_", &update_cosine_moment_cuda);
  m.impl("score", &score_cuda);
  m.impl("prune_topk_", &prune_topk_cuda);
  m.impl("prune_nm_", &prune_nm_cuda);
  m.impl("prune_by_score_", &prune_by_score_cuda);
  m.impl("prune_nm_by_score_", &prune_nm_by_score_cuda);
  m.impl("score_histogram", &score_histogram_cuda);
  m.impl("prune_at_", &prune_at_cuda);
  m.impl("refine_swaps_", &refine_swaps_cuda);
  m.impl("obs_block_", &obs_block_cuda);
}

}  // namespace ace
