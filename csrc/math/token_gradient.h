// d(logits) of one row from the gradients that autograd computed for its statistics. With upstream gradients a (logp),
// n (log_nll), aH (entropy), aK (kl_pq), aF (kl_qp), aU (uniform_ce), aT (topk):
//
//   j != t:  dz_j = p_j (c0 - aH logp_j + aK (logp_j - logq_j)) - aF q_j - aU / V      (+ aT b_j on the top-k lanes)
//            c0   = -a + n / nll - aH H - aK KL + aF + aU - aT
//   j == t:  a and n act through 1 - p_t = sigmoid(log-odds), never through the difference of two nearly equal numbers.
//
// It is not rewritten as A + B z_j: that cancels when |z| is large.
#pragma once
#include "row_state.h"

namespace pu {
inline namespace PU_ISA {

template <class A> struct RowCoefficients {
  A max, log_sum, log_scale;  // P_j = exp(z_j - max - log_sum - log_scale)
  A ref_max, ref_log_sum;
  // dz_j = P_j (on_p + on_logp logp_j + on_logq logq_j) + on_q q_j + constant
  A constant, on_p, on_logp, on_logq, on_q;
  A on_belief;               // times b_j, on the top-k lanes
  A at_target, at_target_p;  // dz_t = at_target + p_t (at_target_p + on_logp logp_t + on_logq logq_t) + ...
  A target_p, target_logp;
};

// `up` and `value` are indexed by Output (zero where an output was not asked for), `saved` by Saved.
template <class A>
PU_FN RowCoefficients<A> row_coefficients(const A* up, const A* value, const A* saved, int64_t vocabulary) {
  const A u = saved[kLogOdds], nll = softplus(u);
  const A p_other = u > 0 ? 1 / (1 + exp(-u)) : exp(u) / (1 + exp(u));  // 1 - p_t
  // On a memorised token p_j and nll both underflow while their ratio does not: move 1 / nll into the exponent.
  const bool rescale = up[kLogNll] != 0 && u < -30;
  const A log_scale = rescale ? log_softplus(u) : A(0), unscale = exp(log_scale);
  const A shared =
      up[kUniformCe] + up[kKlQp] - up[kTopk] - times(up[kEntropy], value[kEntropy]) - times(up[kKlPq], value[kKlPq]);
  RowCoefficients<A> c;
  c.max = saved[kMax], c.log_sum = saved[kLogSum], c.log_scale = log_scale;
  c.ref_max = saved[kRefMax], c.ref_log_sum = saved[kRefLogSum];
  c.constant = -up[kUniformCe] / A(vocabulary);
  const A per_nll = rescale ? up[kLogNll] : times(up[kLogNll], 1 / nll);
  c.on_p = (shared - up[kLogp]) * unscale + per_nll;
  c.on_logp = rescale ? A(0) : up[kKlPq] - up[kEntropy];  // p_j < 1e-13 beside the log_nll term
  c.on_logq = rescale ? A(0) : -up[kKlPq];
  c.on_q = -up[kKlQp];
  c.on_belief = up[kTopk];
  c.at_target = up[kLogp] * p_other - (rescale ? up[kLogNll] : times(up[kLogNll], p_other / nll));
  c.at_target_p = shared;
  c.target_p = exp(-nll), c.target_logp = -nll;
  return c;
}

// The coefficients of scale * dz.
template <class A> PU_FN RowCoefficients<A> scaled(RowCoefficients<A> c, A scale) {
  for (A* factor : {&c.constant, &c.on_p, &c.on_logp, &c.on_logq, &c.on_q, &c.on_belief, &c.at_target, &c.at_target_p})
    *factor *= scale;
  return c;
}

// Lanes that are neither the target nor in the top k. kCoarse: good enough for a gradient in 16 bits.
template <bool kLogs, bool kReference, bool kCoarse = false, class F, class A>
PU_FN F lane_gradient(F z, F r, const RowCoefficients<A>& c) {
  const F shifted = z - c.max, logp = shifted - c.log_sum;
  const F exponent = kLogs ? logp - c.log_scale : shifted - (c.log_sum + c.log_scale);
  const F p = kCoarse ? exp_coarse(exponent) : exp_lanes(exponent);
  F weight = broadcast(c.on_p, z), dz = broadcast(c.constant, z);
  if (kLogs) weight += c.on_logp * logp;
  if (kReference) {
    const F logq = (r - c.ref_max) - c.ref_log_sum;
    weight += c.on_logq != 0 ? c.on_logq * logq : F{};  // logq may be -inf
    dz += c.on_q * (kCoarse ? exp_coarse(logq) : exp_lanes(logq));
  }
  return dz + (kLogs || kReference ? select(p > 0, p * weight, F{}) : p * weight);
}

template <bool kReference, class A> PU_FN A target_gradient(A r, const RowCoefficients<A>& c) {
  A weight = c.at_target_p, dz = c.constant + c.at_target;
  weight += times(c.on_logp, c.target_logp);
  if (kReference) {
    const A logq = (r - c.ref_max) - c.ref_log_sum;
    weight += times(c.on_logq, logq);
    dz += c.on_q * exp(logq);
  }
  return dz + (c.target_p > 0 ? c.target_p * weight : A(0));
}

}  // namespace PU_ISA
}  // namespace pu
