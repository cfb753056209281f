// d(logits) of one row from the gradients that autograd computed for its statistics. With upstream gradients a (logp),
// n (log_nll), aH (entropy), aK (kl_pq), aF (kl_qp), aU (uniform_ce), aL (lse), aT (topk):
//
//   j != t:  dz_j = p_j (c0 - aH logp_j + aK (logp_j - logq_j)) - aF q_j - aU / V      (+ aT b_j on the top-k lanes)
//            c0   = -a + n / nll - aH H - aK KL + aF + aU + aL - aT
//   j == t:  a and n act through 1 - p_t = sigmoid(log-odds), never through the difference of two nearly equal numbers.
//
// It is not rewritten as A + B z_j: that cancels when |z| is large.
#pragma once
#include "row_state.h"

namespace pu {
inline namespace PU_ISA {

template <class A> struct RowCoefficients {
  A max, log_sum;  // P_j = exp(e_j), e_j = z_j - max - log_sum, which is log p_j or less by a constant
  A ref_max, ref_log_sum;
  // dz_j = P_j (on_p + on_logp e_j + on_logq logq_j) + on_q q_j + constant
  A constant, on_p, on_logp, on_logq, on_q;
  A on_belief;  // times b_j, on the top-k lanes
  // dz_t = at_target + p_t (at_target_p + at_target_logq logq_t) + on_q q_t + constant
  A at_target, at_target_p, at_target_logq, target_p;
};

// `up` and `value` are indexed by Output (zero where an output was not asked for), `saved` by Saved.
template <class A>
PU_FN RowCoefficients<A> row_coefficients(const A* up, const A* value, const A* saved, int64_t vocabulary) {
  const A u = saved[kLogOdds], nll = softplus(u);
  const A p_other = u > 0 ? 1 / (1 + exp(-u)) : exp(u) / (1 + exp(u));  // 1 - p_t
  // On a memorised token p_j and nll both underflow while their ratio does not: move 1 / nll into the exponent.
  // The other terms are scaled back; where the target is all there is (u = -inf) nothing is left to scale.
  const bool rescale = up[kLogNll] != 0 && u < -30;
  const A log_scale = rescale && u >= std::numeric_limits<A>::lowest() ? log_softplus(u) : A(0);
  const A unscale = exp(log_scale), on_logp = up[kKlPq] - up[kEntropy];
  const A shared = up[kUniformCe] + up[kLse] + up[kKlQp] - up[kTopk] - times(up[kEntropy], value[kEntropy]) -
                   times(up[kKlPq], value[kKlPq]);
  RowCoefficients<A> c;
  c.max = saved[kMax], c.log_sum = saved[kLogSum] + log_scale;
  c.ref_max = saved[kRefMax], c.ref_log_sum = saved[kRefLogSum];
  c.constant = -up[kUniformCe] / A(vocabulary);
  const A per_nll = rescale ? up[kLogNll] : times(up[kLogNll], 1 / nll);
  c.on_logp = on_logp * unscale;
  c.on_p = (shared - up[kLogp]) * unscale + per_nll + times(c.on_logp, log_scale);
  c.on_logq = -up[kKlPq] * unscale;
  c.on_q = -up[kKlQp];
  c.on_belief = up[kTopk];
  c.at_target = up[kLogp] * p_other - (rescale ? up[kLogNll] : times(up[kLogNll], p_other / nll));
  c.at_target_p = shared - times(on_logp, nll);
  c.at_target_logq = -up[kKlPq];
  c.target_p = exp(-nll);
  return c;
}

// The coefficients of scale * dz.
template <class A> PU_FN RowCoefficients<A> scaled(RowCoefficients<A> c, A scale) {
  for (A* factor : {&c.constant, &c.on_p, &c.on_logp, &c.on_logq, &c.on_q, &c.on_belief, &c.at_target, &c.at_target_p,
                    &c.at_target_logq})
    *factor *= scale;
  return c;
}

// Lanes that are neither the target nor in the top k. kCoarse: good enough for a gradient in 16 bits.
template <bool kLogs, bool kReference, bool kCoarse = false, class F, class A>
PU_FN F lane_gradient(F z, F r, const RowCoefficients<A>& c) {
  const F shifted = z - c.max, exponent = shifted - c.log_sum;
  const F p = kCoarse ? exp_coarse(exponent) : exp_less(shifted, c.log_sum);
  F weight = broadcast(c.on_p, z), dz = broadcast(c.constant, z);
  if (kLogs) weight += c.on_logp * bounded(exponent);
  if (kReference) {
    const F ref_shifted = r - c.ref_max, logq = ref_shifted - c.ref_log_sum;
    if (c.on_logq != 0) weight += c.on_logq * logq;
    if (c.on_q != 0) dz += c.on_q * (kCoarse ? exp_coarse(logq) : exp_less(ref_shifted, c.ref_log_sum));
    weight = select(p == 0, F{}, weight);  // logq may be -inf
  }
  return dz + p * weight;
}

template <bool kReference, class A> PU_FN A target_gradient(A r, const RowCoefficients<A>& c) {
  A weight = c.at_target_p, dz = c.constant + c.at_target;
  if (kReference) {
    const A logq = (r - c.ref_max) - c.ref_log_sum;
    weight += times(c.at_target_logq, logq);
    dz += c.on_q * exp(logq);
  }
  return dz + (c.target_p == 0 ? A(0) : c.target_p * weight);
}

}  // namespace PU_ISA
}  // namespace pu
