#include "ops/across.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"
#include "core/radix_select.h"
#include "ops/score.h"

namespace ace {
namespace {

void check_key(std::string_view op, std::string_view argument, int64_t key) {
  ACE_CHECK(key >= 0 && key <= 0xffffffffLL, op, ": ", argument, " must be an unsigned 32-bit number (got ", key, ")");
}

}  // namespace

void check_score_histogram(int64_t prefix, int64_t level) {
  ACE_CHECK(level >= 0 && level < kRadixPasses, "score_histogram: level must be from 0 to ", kRadixPasses - 1, " (got ",
            level, ")");
  check_key("score_histogram", "prefix", prefix);
}

void check_prune_at(int64_t key, int64_t ties) {
  check_key("prune_at_", "key", key);
  ACE_CHECK(ties >= 0, "prune_at_: ties must not be negative (got ", ties, ")");
}

namespace {

at::Tensor score_histogram_meta(const at::Tensor& weight, std::string_view formula, int64_t prefix, int64_t level,
                                const OptionalTensor& column, const OptionalTensor& moment) {
  check_scored("score_histogram", weight, formula, column, moment);
  check_score_histogram(prefix, level);
  return at::empty({radix_bins(static_cast<int>(level))}, weight.options().dtype(at::kLong));
}

void prune_at_meta(at::Tensor weight, std::string_view formula, int64_t key, int64_t ties, const OptionalTensor& column,
                   const OptionalTensor& moment) {
  check_scored("prune_at_", weight, formula, column, moment);
  check_prune_at(key, ties);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def(
      "score_histogram(Tensor weight, str formula, int prefix, int level, Tensor? column=None, Tensor? moment=None)"
      " -> Tensor");
  m.def("prune_at_(Tensor(a!) weight, str formula, int key, int ties, Tensor? column=None, Tensor? moment=None) -> ()");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) {
  m.impl("score_histogram", &score_histogram_meta);
  m.impl("prune_at_", &prune_at_meta);
}

}  // namespace ace
