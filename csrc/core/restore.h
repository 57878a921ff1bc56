// Updates a row's remaining weights to compensate for the removed ones' share of the mean output (ops/restore.h).
#pragma once

#include "core/lanes.h"
#include "core/scalar.h"

namespace ace {

// A column's terms in the row's sums. Products of two float32 values are exact in float64.
struct RestoreTerms {
  double shift;  // w m, of a removed weight
  double gain;   // m d, of a kept one
};

// `removed`: the weight, 0 where it is kept; `direction`: 0 where it is removed.
ACE_HD RestoreTerms restore_terms(float removed, float mean, float direction) {
  const double m = static_cast<double>(mean);
  return {static_cast<double>(removed) * m, static_cast<double>(direction) * m};
}

// The factor of the direction, given the sums.
ACE_HD double restore_scale(double shift, double gain) { return shift / (1.0 + gain); }

// A kept weight's new value.
ACE_HD float restored_weight(float weight, float direction, double scale) {
  return static_cast<float>(static_cast<double>(weight) + scale * static_cast<double>(direction));
}

// Whether a column's direction has the sign of its mean (or one is 0). Then no denominator is below 1.
ACE_HD bool is_restorable(float mean, float direction) {
  return is_finite(mean) && is_finite(direction) && static_cast<double>(mean) * static_cast<double>(direction) >= 0.0;
}

}  // namespace ace
