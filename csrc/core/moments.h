// Weighted Welford state of one column: total weight, weighted mean, weighted sum of squared deviations.
#pragma once

#include "core/scalar.h"

namespace ace {

// Merges (weight_b, mean_b, m2_b) into (weight_a, mean_a, m2_a) by Chan, Golub and LeVeque (1983):
//   w = w_a + w_b;  d = m_b - m_a;  m = m_a + d w_b / w;  M2 = M2_a + M2_b + d^2 w_a w_b / w
// The caller adds the weights: columns of one state share them. A side of weight 0 changes nothing.
template <class Real>
ACE_HD void merge_moments(Real weight_a, Real& mean_a, Real& m2_a, Real weight_b, Real mean_b, Real m2_b) {
  const Real weight = weight_a + weight_b;
  const Real share = weight > Real(0) ? weight_b / weight : Real(0);  // also avoids 0/0
  const Real delta = mean_b - mean_a;
  m2_a += weight_b > Real(0) ? m2_b + delta * delta * (weight_a * share) : Real(0);
  mean_a += delta * share;
}

template <class Real>
struct Welford {
  Real weight = 0;
  Real mean = 0;
  Real m2 = 0;

  ACE_HD void merge(const Welford& other) {
    merge_moments(weight, mean, m2, other.weight, other.mean, other.m2);
    weight += other.weight;
  }
};

}  // namespace ace
