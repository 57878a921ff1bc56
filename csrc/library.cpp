// All schemas, and the Meta kernels: checks and output shapes without data. Contracts: ops.h.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"
#include "core/radix_select.h"

namespace ace {
namespace {

using at::Tensor;

void update_moments_meta(const Tensor& x, const OptionalTensor& token_weight, Tensor weight_sum, Tensor mean,
                         Tensor m2) {
  check_update_moments(x, token_weight, weight_sum, mean, m2);
}

Tensor inverse_square_norm_meta(const Tensor& a) {
  check_inverse_square_norm(a);
  return at::empty_symint({a.sym_size(0)}, a.options().dtype(at::kFloat));
}

void update_cosine_moment_meta(const Tensor& x, const Tensor& a, Tensor moment) {
  check_update_cosine_moment(x, a, moment);
}

Tensor score_meta(const Tensor& weight, std::string_view metric, const OptionalTensor& column,
                  const OptionalTensor& moment) {
  check_scored("score", weight, metric, column, moment);
  return at::empty_symint(weight.sym_sizes(), weight.options().dtype(at::kFloat));
}

Tensor empty_threshold(const Tensor& weight, Group group) {
  return at::empty_symint({group == Group::row ? weight.sym_size(0) : c10::SymInt(1)},
                          weight.options().dtype(at::kFloat));
}

Tensor prune_topk_meta(Tensor weight, std::string_view metric, const OptionalTensor& column,
                       const OptionalTensor& moment, int64_t keep_k, std::string_view group) {
  check_scored("prune_topk_", weight, metric, column, moment);
  return empty_threshold(weight, check_topk("prune_topk_", weight, keep_k, group));
}

void prune_nm_meta(Tensor weight, std::string_view metric, const OptionalTensor& column, const OptionalTensor& moment,
                   int64_t keep_n, int64_t group_m) {
  check_scored("prune_nm_", weight, metric, column, moment);
  check_nm("prune_nm_", weight, keep_n, group_m);
}

Tensor prune_by_score_meta(Tensor weight, const Tensor& score, int64_t keep_k, std::string_view group) {
  check_given_score("prune_by_score_", weight, score);
  return empty_threshold(weight, check_topk("prune_by_score_", weight, keep_k, group));
}

void prune_nm_by_score_meta(Tensor weight, const Tensor& score, int64_t keep_n, int64_t group_m) {
  check_given_score("prune_nm_by_score_", weight, score);
  check_nm("prune_nm_by_score_", weight, keep_n, group_m);
}

Tensor score_histogram_meta(const Tensor& weight, std::string_view metric, const OptionalTensor& column,
                            const OptionalTensor& moment, int64_t prefix, int64_t level) {
  check_scored("score_histogram", weight, metric, column, moment);
  check_level("score_histogram", prefix, level);
  return at::empty({radix_bins(static_cast<int>(level))}, weight.options().dtype(at::kLong));
}

void prune_at_meta(Tensor weight, std::string_view metric, const OptionalTensor& column, const OptionalTensor& moment,
                   int64_t key, int64_t ties) {
  check_scored("prune_at_", weight, metric, column, moment);
  check_cut("prune_at_", key, ties);
}

Tensor refine_swaps_meta(Tensor mask, const Tensor& weight, const Tensor& gram, int64_t keep_n, int64_t group_m,
                         int64_t max_swaps) {
  check_refine_swaps(mask, weight, gram, keep_n, group_m, max_swaps);
  return at::empty_symint({weight.sym_size(0)}, weight.options().dtype(at::kLong));
}

void obs_block_meta(Tensor weight, Tensor error, Tensor mask, const Tensor& factor, int64_t keep_n, int64_t group_m) {
  check_obs_block(weight, error, mask, factor, keep_n, group_m);
}

}  // namespace

TORCH_LIBRARY(ace_ext, m) {
  m.def("update_moments_(Tensor x, Tensor? token_weight, Tensor(a!) weight_sum, Tensor(b!) mean, Tensor(c!) m2) -> ()");
  m.def("inverse_square_norm(Tensor a) -> Tensor");
  m.def("update_cosine_moment_(Tensor x, Tensor a, Tensor(a!) moment) -> ()");
  m.def("score(Tensor weight, str metric, Tensor? column, Tensor? moment) -> Tensor");
  m.def("prune_topk_(Tensor(a!) weight, str metric, Tensor? column, Tensor? moment, int keep_k, str group) -> Tensor");
  m.def("prune_nm_(Tensor(a!) weight, str metric, Tensor? column, Tensor? moment, int keep_n, int group_m) -> ()");
  m.def("prune_by_score_(Tensor(a!) weight, Tensor score, int keep_k, str group) -> Tensor");
  m.def("prune_nm_by_score_(Tensor(a!) weight, Tensor score, int keep_n, int group_m) -> ()");
  m.def("score_histogram(Tensor weight, str metric, Tensor? column, Tensor? moment, int prefix, int level) -> Tensor");
  m.def("prune_at_(Tensor(a!) weight, str metric, Tensor? column, Tensor? moment, int key, int ties) -> ()");
  m.def("refine_swaps_(Tensor(a!) mask, Tensor weight, Tensor gram, int keep_n, int group_m, int max_swaps) -> Tensor");
  m.def(
      "obs_block_(Tensor(a!) weight, Tensor(b!) error, Tensor(c!) mask, Tensor factor, int keep_n, int group_m) -> ()");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) {
  m.impl("update_moments_", &update_moments_meta);
  m.impl("inverse_square_norm", &inverse_square_norm_meta);
  m.impl("update_cosine_moment_", &update_cosine_moment_meta);
  m.impl("score", &score_meta);
  m.impl("prune_topk_", &prune_topk_meta);
  m.impl("prune_nm_", &prune_nm_meta);
  m.impl("prune_by_score_", &prune_by_score_meta);
  m.impl("prune_nm_by_score_", &prune_nm_by_score_meta);
  m.impl("score_histogram", &score_histogram_meta);
  m.impl("prune_at_", &prune_at_meta);
  m.impl("refine_swaps_", &refine_swaps_meta);
  m.impl("obs_block_", &obs_block_meta);
}

}  // namespace ace
