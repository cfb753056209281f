// Token-separable objectives: the weight that multiplies d(logp) of a token is known from the token alone, as
//
//   p^alpha (1 - p)^gamma 2 sigmoid(beta logp - floor)        (no sigmoid without a floor)
//
// held constant: ga and gd (all 0), wga (alpha), satimp (alpha, gamma), tnpo and wtnpo (floor = beta logp of the reference).
#pragma once
#include "../tensor/call.h"
#include "token_gradient.h"

namespace pu {
inline namespace PU_ISA {

// saved: of the row, as `finish` gave them.
template <class A> PU_FN A rule_weight(const Rule<A>& rule, const A* saved, bool has_floor, A floor) {
  const A log_odds = saved[kLogOdds], logp = -softplus(log_odds), log_other = -softplus(-log_odds);
  const A weight = exp(times(rule.alpha, logp) + times(rule.gamma, log_other));
  return has_floor ? weight * 2 / (1 + exp(floor - rule.beta * logp)) : weight;
}

}  // namespace PU_ISA
}  // namespace pu
