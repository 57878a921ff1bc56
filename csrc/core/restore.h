// A row's remaining weights take over what its removed ones gave to the mean output (ops/restore.h).
#pragma once

#include "core/lanes.h"
#include "core/scalar.h"

namespace ace {

// What a column adds to the row's sums; products of two float32 values are exact in float64.
struct RestoreTerms {
  double shift;  // w m, of a removed weight
  double gain;   // m d, of a kept one
};

ACE_HD RestoreTerms restore_terms(bool kept, float weight, float mean, float direction) {
  const double m = static_cast<double>(mean);
  return {static_cast<double>(kept ? 0.0f : weight) * m, static_cast<double>(kept ? direction : 0.0f) * m};
}

// By what the direction is multiplied, given the sums.
ACE_HD double restore_scale(double shift, double gain) { return shift / (1.0 + gain); }

ACE_HD float restored_weight(bool kept, float weight, float direction, double scale) {
  const double moved = static_cast<double>(weight) + scale * static_cast<double>(direction);
  return kept ? static_cast<float>(moved) : 0.0f;
}

// Whether a column's direction does not point away from its mean: then no denominator is below 1.
ACE_HD bool is_restorable(float mean, float direction) {
  return is_finite(mean) && is_finite(direction) && static_cast<double>(mean) * static_cast<double>(direction) >= 0.0;
}

}  // namespace ace
