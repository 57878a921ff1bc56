#include "ops/score.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "check.h"

namespace ace {
namespace {

void check_optional(std::string_view op, std::string_view argument, const OptionalTensor& t, bool needed,
                    std::string_view formula, at::IntArrayRef shape, const at::Tensor& weight) {
  ACE_CHECK(t.has_value() == needed, op, ": ", argument, " must ", needed ? "be given" : "be None",
            " for the formula '", formula, "' (got ", needed ? "None" : "a tensor", ")");
  if (!needed) return;
  check_same_device(op, argument, *t, weight);
  check_dense(op, argument, *t, at::kFloat, shape);
}

std::string known_formulas() {
  std::string names;
  for (const FormulaName& known : kFormulas) names += (names.empty() ? "" : ", ") + std::string(known.name);
  return names;
}

}  // namespace

Formula check_scored(std::string_view op, const at::Tensor& weight, std::string_view formula,
                     const OptionalTensor& column, const OptionalTensor& moment) {
  check_matrix(op, "weight", weight);
  const FormulaName* known = nullptr;
  for (const FormulaName& entry : kFormulas) {
    if (formula == entry.name) known = &entry;
  }
  ACE_CHECK(known != nullptr, op, ": formula must be one of ", known_formulas(), " (got '", formula, "')");
  with_formula(known->formula, [&](auto functor) {
    check_optional(op, "column", column, functor.kColumn, formula, {weight.size(1)}, weight);
    check_optional(op, "moment", moment, functor.kMoment, formula, weight.sizes(), weight);
  });
  // An op that writes the weight. The weight may be its own score: each entry is read before it is written.
  if (op.back() == '_') {
    const bool own = moment && is_same_view(*moment, weight);
    check_apart(op, {named("weight", weight)},
                {named("column", column), own ? Named{"moment", nullptr} : named("moment", moment)});
  }
  return known->formula;
}

namespace {

at::Tensor score_meta(const at::Tensor& weight, std::string_view formula, const OptionalTensor& column,
                      const OptionalTensor& moment) {
  check_scored("score", weight, formula, column, moment);
  return at::empty_symint(weight.sym_sizes(), weight.options().dtype(at::kFloat));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def("score(Tensor weight, str formula, Tensor? column=None, Tensor? moment=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) { m.impl("score", &score_meta); }

}  // namespace ace
