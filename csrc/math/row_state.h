// The streaming state of one row: one read of the logits z (and reference logits r) leaves a handful of sums, mergeable
// in any split of the row. The target's own lane is kept apart, so that -log p_t = softplus(log-odds) is exact however
// close p_t is to 1.
//
//   max = m    sum + low = S = sum e^(z-m)    shifted = U = sum e^(z-m)(z-m)    squared = sum e^(z-m)(z-m)^2
//   gap = W = sum e^(z-m)((z-r) - offset)           ref_gap = sum e^(r-mq)((z-r) - offset)     total = sum (z - origin)
//
// S is kept in two floats where entropy is wanted: on a peaked row S = 1 + s, and H lives in s.
// On a new max m' with d = m - m':  S <- e^d S,  U <- e^d (U + d S),  squared <- e^d (squared + 2 d U + d^2 S),  W <- e^d W.
#pragma once
#include "lanes.h"

namespace pu {
inline namespace PU_ISA {

template <class F> struct RowState {
  F max, sum, low, shifted, squared;
  F total, origin, count;                     // for uniform_ce, free of a common shift of z
  F gap, ref_max, ref_sum, ref_gap, offset;   // with a reference
  F before;                                   // the largest z left of the target, for greedy (lowest index wins a tie)
  F target, ref_target;                       // z_t and r_t; NaN until the lane is met

  static PU_FN RowState empty(F like) {
    using S = typename Lane<F>::Scalar;
    const F zero = broadcast(S(0), like), low = broadcast(std::numeric_limits<S>::lowest(), like);
    const F nan = broadcast(std::numeric_limits<S>::quiet_NaN(), like);
    const F nothing = broadcast(-std::numeric_limits<S>::infinity(), like);
    return {low, zero, zero, zero, zero, zero, zero, zero, zero, low, zero, zero, zero, nothing, nan, nan};
  }
};

// Moves the sums to the new maximum m >= s.max. An empty state (max = lowest) moves to zero sums.
template <bool kMoments, bool kReference, class F> PU_FN void raise_max(RowState<F>& s, F m) {
  F d = s.max - m;
  const F e = exp_lanes(d);
  d = select(e > 0, d, F{});
  if (kMoments) {
    s.squared = e * (s.squared + d * (s.shifted + s.shifted + d * s.sum));
    s.shifted = e * (s.shifted + d * s.sum);
    s.low = e * s.low;
  }
  if (kReference) s.gap = e * s.gap;
  s.sum = e * s.sum;
  s.max = m;
}

template <class F> PU_FN void raise_ref_max(RowState<F>& s, F m) {
  const F e = exp_lanes(s.ref_max - m);
  s.ref_sum = e * s.ref_sum;
  s.ref_gap = e * s.ref_gap;
  s.ref_max = m;
}

// S += e, with what the addition rounds away kept in `low`.
template <class F> PU_FN void add_sum(RowState<F>& s, F e) {
  const F sum = s.sum + e, added = sum - s.sum;
  s.low += (s.sum - (sum - added)) + (e - added);
  s.sum = sum;
}

// Adds n groups of lanes with z <= s.max (and r <= s.ref_max). A lane at -inf has p = 0 and adds nothing but to `total`.
// The group's sums start at zero: two levels of summation keep the rounding of a long row small.
template <bool kMoments, bool kReference, class F> PU_FN void push(RowState<F>& s, const F* z, const F* r, int n) {
  F sum{}, shifted{}, squared{}, total{}, gap{}, ref_sum{}, ref_gap{};
  for (int i = 0; i < n; ++i) {
    const F d = z[i] - s.max;
    const F e = exp_lanes(d);
    if (kMoments) {
      const F ed = select(e > 0, e * d, F{});
      add_sum(s, e);
      shifted += ed;
      squared += select(e > 0, ed * d, F{});
      total += z[i] - s.origin;
    } else {
      sum += e;
    }
    if (kReference) {
      const F q = exp_lanes(r[i] - s.ref_max);
      const F difference = (z[i] - r[i]) - s.offset;
      ref_sum += q;
      gap += select(e > 0, e * difference, F{});
      ref_gap += select(q > 0, q * difference, F{});
    }
  }
  if (kMoments) s.shifted += shifted, s.squared += squared, s.total += total;
  else s.sum += sum;
  if (kReference) s.gap += gap, s.ref_sum += ref_sum, s.ref_gap += ref_gap;
}

// Joins two scalar states of the same row.
template <class A> PU_FN void merge(RowState<A>& into, RowState<A> other) {
  const A m = max_lanes(other.max, into.max), mq = max_lanes(other.ref_max, into.ref_max);
  raise_max<true, true>(into, m);
  raise_max<true, true>(other, m);
  raise_ref_max(into, mq);
  raise_ref_max(other, mq);
  if (into.count == 0) into.offset = other.offset, into.origin = other.origin;
  const A rebase = other.offset - into.offset;
  into.gap += other.gap + (other.sum > 0 ? other.sum * rebase : A(0));
  into.ref_gap += other.ref_gap + (other.ref_sum > 0 ? other.ref_sum * rebase : A(0));
  if (other.sum > into.sum) {  // the smaller one is added to the larger: nothing is lost
    const A sum = into.sum;
    into.sum = other.sum;
    add_sum(into, sum);
  } else {
    add_sum(into, other.sum);
  }
  into.low += other.low;
  into.shifted += other.shifted;
  into.squared += other.squared;
  into.total += other.total + other.count * (other.origin - into.origin);
  into.count += other.count;
  into.ref_sum += other.ref_sum;
  into.before = max_lanes(other.before, into.before);
  if (other.target == other.target) into.target = other.target, into.ref_target = other.ref_target;
}

// What backward needs besides the row itself: at most five scalars.
enum Saved { kMax, kLogSum, kLogOdds, kRefMax, kRefLogSum, kSavedCount };

// Bit i is pyunlearn.ops.OUTPUTS[i].
enum Output { kLogp, kLogNll, kEntropy, kVariance, kKlPq, kKlQp, kUniformCe, kGreedy, kTopk, kOutputCount };

template <class A> PU_FN A softplus(A u) { return u > 0 ? u + log1p(exp(-u)) : log1p(exp(u)); }
template <class A> PU_FN A log_softplus(A u) { return u < -15 ? u - exp(u) / 2 : log(softplus(u)); }

// The finished statistics of a row: value[Output] (all but kTopk) and saved[Saved].
template <class A> PU_FN void finish(RowState<A> s, int64_t vocabulary, bool has_reference, A* value, A* saved) {
  const A infinity = std::numeric_limits<A>::infinity();
  const A log_odds = s.sum == 0 ? -infinity : log(s.sum) + (s.max - s.target);
  const bool peaked = s.target >= s.max;
  const bool masked = !(s.target > -infinity);  // p_t = 0: the target lane adds nothing
  const bool bad = s.target != s.target || (masked && s.sum == 0);
  RowState<A> all = RowState<A>::empty(A(0));
  const A ref_target = has_reference ? s.ref_target : A(0);
  all.max = s.target, all.ref_max = ref_target, all.offset = s.offset, all.origin = s.origin, all.count = 1;
  push<true, true>(all, &s.target, &ref_target, 1);
  if (masked) all.max = std::numeric_limits<A>::lowest(), all.sum = all.low = all.shifted = all.squared = all.gap = 0;
  if (!(ref_target > -infinity)) all.ref_max = std::numeric_limits<A>::lowest(), all.ref_sum = all.ref_gap = 0;
  merge(all, s);
  const A log_sum = log1p((all.sum - 1) + all.low);
  const A mean = all.shifted / all.sum, ref_log_sum = log(all.ref_sum);
  // logsumexp(z) - logsumexp(r) - offset, in the order that keeps a common shift of z and r out of the rounding
  const A excess = ((all.max - all.ref_max) - all.offset) + (log_sum - ref_log_sum);
  value[kLogp] = -softplus(log_odds);
  value[kLogNll] = log_softplus(log_odds);
  value[kEntropy] = log_sum - mean;
  value[kVariance] = all.squared / all.sum - mean * mean;
  value[kKlPq] = all.gap / all.sum - excess;
  value[kKlQp] = excess - all.ref_gap / all.ref_sum;
  for (int i = kEntropy; i <= kKlQp; ++i)
    if (value[i] < 0) value[i] = 0;
  value[kUniformCe] = ((all.max - all.origin) + log_sum) - all.total / A(vocabulary);
  value[kGreedy] = peaked && s.target > s.before ? A(1) : A(0);
  if (bad)
    for (int i = 0; i < kTopk; ++i) value[i] = std::numeric_limits<A>::quiet_NaN();
  saved[kMax] = all.max;
  saved[kLogSum] = bad ? value[kLogp] : log_sum;
  saved[kLogOdds] = log_odds;
  saved[kRefMax] = has_reference ? all.ref_max : A(0);
  saved[kRefLogSum] = has_reference ? ref_log_sum : A(0);
}

}  // namespace PU_ISA
}  // namespace pu
