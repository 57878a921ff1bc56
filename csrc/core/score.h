// Scores of single weights: one functor for each formula. Higher = keep. Float32 products in the order written, so that
// all back ends and a NumPy float32 reference give the same bits. docs/methods.md lists the metrics that use them.
#pragma once

#include <cmath>

#include "core/scalar.h"

namespace ace {

// What a formula may read besides the weight. Each formula declares what it needs; the rest is left at 0.
struct ScoreTerms {
  float column;      // c_j, the factor of column j
  float moment;      // entry (i, j) of a [rows, cols] matrix: the cross moment, or a score given by the caller
  float row_sum;     // sum over j of |W_ij|, rounded once from float64
  float column_sum;  // sum over i of |W_ij|, rounded once from float64
};

// |W_ij|
struct MagnitudeScore {
  static constexpr bool kColumn = false, kMoment = false, kSums = false;
  static ACE_HD float value(float weight, const ScoreTerms&) { return absolute(weight); }
};

// |W_ij| c_j: every metric that is a column factor, such as ||X_j|| or sigma_j
struct ScaledScore {
  static constexpr bool kColumn = true, kMoment = false, kSums = false;
  static ACE_HD float value(float weight, const ScoreTerms& terms) { return absolute(weight) * terms.column; }
};

// (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) c_j, c = ||X_j||^a: relative importance (RIA, arXiv 2402.17946)
struct RiaScore {
  static constexpr bool kColumn = true, kMoment = false, kSums = true;
  static ACE_HD float value(float weight, const ScoreTerms& terms) {
    const float size = absolute(weight);
    if (size == 0.0f) return 0.0f * terms.column;  // a row or column of zeros has sum 0; avoids 0/0
    return (size / terms.column_sum + size / terms.row_sum) * terms.column;
  }
};

// (|W_ij| c_j) (|W_ij| sqrt(q_ij)), q = sum_t r_t^2 A_ti^2 X_tj^2; c = ||X_j|| or ||X_j|| sigma_j
struct CospScore {
  static constexpr bool kColumn = true, kMoment = true, kSums = false;
  static ACE_HD float value(float weight, const ScoreTerms& terms) {
    const float size = absolute(weight);
    return (size * terms.column) * (size * sqrtf(terms.moment));
  }
};

// |W_ij| sqrt((c_j - q_ij) / 2), c_j = sum_t r_t X_tj^2: the second-order cosine loss of removing W_ij. The difference
// is negative only by rounding, because A_ti^2 r_t <= 1.
struct CospExactScore {
  static constexpr bool kColumn = true, kMoment = true, kSums = false;
  static ACE_HD float value(float weight, const ScoreTerms& terms) {
    const float loss = terms.column - terms.moment;
    const bool rounding = loss < 0.0f && is_finite(loss);  // an infinite moment must not give a loss of 0
    return absolute(weight) * sqrtf(0.5f * (rounding ? 0.0f : loss));
  }
};

// The caller's own score, passed as `moment`; may be negative
struct GivenScore {
  static constexpr bool kColumn = false, kMoment = true, kSums = false;
  static ACE_HD float value(float weight, const ScoreTerms& terms) {
    return is_finite(weight) ? terms.moment : weight;  // a weight that is not finite must be detected
  }
};

enum class Formula { magnitude, scaled, ria, cosp, cosp_exact, given };

struct FormulaName {
  const char* name;
  Formula formula;
};

// The values of the ops' argument `formula`.
constexpr FormulaName kFormulas[] = {
    {"magnitude", Formula::magnitude}, {"scaled", Formula::scaled},         {"ria", Formula::ria},
    {"cosp", Formula::cosp},           {"cosp_exact", Formula::cosp_exact}, {"score", Formula::given},
};

// Calls action(functor) with the functor of the formula.
template <class Action>
inline decltype(auto) with_formula(Formula formula, Action&& action) {
  switch (formula) {
    case Formula::magnitude: return action(MagnitudeScore{});
    case Formula::scaled: return action(ScaledScore{});
    case Formula::ria: return action(RiaScore{});
    case Formula::cosp: return action(CospScore{});
    case Formula::cosp_exact: return action(CospExactScore{});
    default: return action(GivenScore{});
  }
}

}  // namespace ace
