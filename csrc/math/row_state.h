// The streaming state of one row: one read of the logits z (and reference logits r) leaves a handful of sums, mergeable
// in any split of the row. The target's own lane is kept apart, so that -log p_t = softplus(log-odds) is exact however
// close p_t is to 1.
//
//   max = m    ones + rest = S = sum e^(z-m)    shifted = U = sum e^(z-m)(z-m)    squared = sum e^(z-m)(z-m)^2
//   gap = W = sum e^(z-m)((z-r) - offset)       ref_gap = sum e^(r-mq)((z-r) - offset)     total = sum (z - origin)
//
// S is kept in two parts, the lanes at the maximum (each exactly 1) and the rest: on a peaked row S = 1 + s, and the
// entropy lives in s. On a new max m' with d = m - m':
//   S <- e^d S,  U <- e^d (U + d S),  squared <- e^d (squared + 2 d U + d^2 S),  W <- e^d W.
#pragma once
#include "lanes.h"

namespace pu {
inline namespace PU_ISA {

template <class F> struct RowState {
  F max, ones, rest, shifted, squared;
  F total, origin, count;                    // for uniform_ce, free of a common shift of z
  F gap, ref_max, ref_sum, ref_gap, offset;  // with a reference
  F before;                                  // the largest z left of the target, for greedy (lowest index wins a tie)
  F target, ref_target;                      // z_t and r_t; NaN until the lane is met

  static PU_FN RowState empty(F like) {
    using S = typename Lane<F>::Scalar;
    const F zero = broadcast(S(0), like), low = broadcast(std::numeric_limits<S>::lowest(), like);
    const F nan = broadcast(std::numeric_limits<S>::quiet_NaN(), like);
    const F nothing = broadcast(-std::numeric_limits<S>::infinity(), like);
    return {low, zero, zero, zero, zero, zero, zero, zero, zero, low, zero, zero, zero, nothing, nan, nan};
  }
};

// The sums a pass keeps besides S: the least that the outputs asked for need.
// kCoarse: good enough for logits in 16 bits, where nothing but S and U is kept, which do not cancel.
enum Want : unsigned {
  kShifted = 1,
  kSquared = 2,
  kTotal = 4,
  kReferenceSums = 8,
  kMoments = 7,
  kEverything = 15,
  kCoarse = 16
};

// Moves the sums to the new maximum m >= s.max. An empty state (max = lowest) moves to zero sums.
template <unsigned kWants, class F> PU_FN void raise_max(RowState<F>& s, F m) {
  const F d = s.max - m, e = exp_lanes(d), sum = s.ones + s.rest;
  if (kWants & kSquared) s.squared = e * (s.squared + bounded(d) * (s.shifted + s.shifted + bounded(d) * sum));
  if (kWants & kShifted) s.shifted = e * (s.shifted + bounded(d) * sum);
  if (kWants & kReferenceSums) s.gap = e * s.gap;
  s.rest = select(d < 0, e * sum, s.rest);
  s.ones = select(d < 0, F{}, s.ones);
  s.max = m;
}

template <class F> PU_FN void raise_ref_max(RowState<F>& s, F m) {
  const F e = exp_lanes(s.ref_max - m);
  s.ref_sum = e * s.ref_sum;
  s.ref_gap = e * s.ref_gap;
  s.ref_max = m;
}

// The group's sums start at zero: two levels of summation keep the rounding of a long row small.
template <unsigned kWants, bool kAtMax, int kStep, class F, class Load>
PU_FN void push(RowState<F>& s, const Load& load, int n) {
  F ones{}, rest{}, shifted{}, squared{}, total{}, gap{}, ref_sum{}, ref_gap{};
  for (int i = 0; i < n; i += kStep) {
    F z[kStep], r[kStep];
    load(i, z, r);
    for (int k = 0; k < kStep; ++k) {
      const F d = z[k] - s.max;
      const F e = kWants & kCoarse ? exp_coarse(d) : exp_lanes(d);
      if (kAtMax) {
        ones += select(d == 0, broadcast(typename Lane<F>::Scalar(1), d), F{});
        rest += select(d == 0, F{}, e);
      } else {
        rest += e;
      }
      if (kWants & (kShifted | kSquared)) {
        const F ed = e * bounded(d);
        shifted += ed;
        if (kWants & kSquared) squared += ed * bounded(d);
      }
      if (kWants & kTotal) total += z[k] - s.origin;
      if (kWants & kReferenceSums) {
        const F q = exp_lanes(r[k] - s.ref_max);
        const F difference = (z[k] - r[k]) - s.offset;
        ref_sum += q;
        gap += e * select(e > 0, difference, F{});
        ref_gap += q * select(q > 0, difference, F{});
      }
    }
  }
  s.rest += rest;
  if (kAtMax) s.ones += ones;
  if (kWants & kShifted) s.shifted += shifted;
  if (kWants & kSquared) s.squared += squared;
  if (kWants & kTotal) s.total += total;
  if (kWants & kReferenceSums) s.gap += gap, s.ref_sum += ref_sum, s.ref_gap += ref_gap;
}

template <class F> PU_FN F largest_of_both(F a, F b) { return broadcast(largest_lane(max_lanes(a, b)), b); }

// Takes in n groups of lanes and returns their maximum. A lane at -inf has p = 0 and adds nothing but to `total`; NaN stays.
// load(i, z, r) puts kStep groups there, the first of them number i; each is asked for twice, which costs less than to
// keep them.
template <unsigned kWants, int kStep, class F, class Load> PU_FN F absorb(RowState<F>& s, const Load& load, int n) {
  F top{}, ref_top{};
  for (int i = 0; i < n; i += kStep) {
    F z[kStep], r[kStep];
    load(i, z, r);
    for (int k = 0; k < kStep; ++k) {
      top = i + k > 0 ? max_lanes(z[k], top) : z[k];
      if (kWants & kReferenceSums) ref_top = i + k > 0 ? max_lanes(r[k], ref_top) : r[k];
    }
  }
  if (any(top >= s.max)) {  // seldom, once a row is under way: all lanes move to the largest of them
    raise_max<kWants>(s, largest_of_both(top, s.max));
    if (kWants & kReferenceSums) raise_ref_max(s, largest_of_both(ref_top, s.ref_max));
    push<kWants, true, kStep>(s, load, n);
  } else {
    if ((kWants & kReferenceSums) && any(ref_top > s.ref_max)) raise_ref_max(s, largest_of_both(ref_top, s.ref_max));
    push<kWants, false, kStep>(s, load, n);
  }
  return top;
}

template <class F> struct Held {
  const F *z, *r;
  PU_FN void operator()(int i, F* z_to, F* r_to) const { *z_to = z[i], *r_to = r[i]; }
};
template <unsigned kWants, class F> PU_FN F absorb(RowState<F>& s, const F* z, const F* r, int n) {
  return absorb<kWants, 1>(s, Held<F>{z, r}, n);
}

// Joins two scalar states of the same row.
template <class A> PU_FN void merge(RowState<A>& into, RowState<A> other) {
  const A m = max_lanes(other.max, into.max), mq = max_lanes(other.ref_max, into.ref_max);
  raise_max<kEverything>(into, m);
  raise_max<kEverything>(other, m);
  raise_ref_max(into, mq);
  raise_ref_max(other, mq);
  if (into.count == 0) into.offset = other.offset, into.origin = other.origin;
  const A rebase = other.offset - into.offset;
  into.gap += other.gap + times(other.ones + other.rest, rebase);
  into.ref_gap += other.ref_gap + times(other.ref_sum, rebase);
  into.ones += other.ones;
  into.rest += other.rest;
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
enum Output { kLogp, kLogNll, kEntropy, kVariance, kKlPq, kKlQp, kUniformCe, kLse, kGreedy, kTopk, kOutputCount };

// What the outputs asked for need of a pass over the logits, the reference's own sums apart.
constexpr PU_FN unsigned wants_of(uint32_t outputs) {
  return (outputs & (1u << kEntropy | 1u << kVariance) ? kShifted : 0u) | (outputs >> kVariance & 1 ? kSquared : 0u) |
         (outputs >> kUniformCe & 1 ? kTotal : 0u);
}

template <class A> PU_FN A softplus(A u) { return u > 0 ? u + log1p(exp(-u)) : log1p(exp(u)); }
template <class A> PU_FN A log_softplus(A u) { return u < -15 ? u - exp(u) / 2 : log(softplus(u)); }

// The finished statistics of a row: value[Output] (all but kTopk) and saved[Saved].
template <class A> PU_FN void finish(RowState<A> s, int64_t vocabulary, bool has_reference, A* value, A* saved) {
  const A infinity = std::numeric_limits<A>::infinity();
  const bool alone = s.ones == 0 && s.rest == 0;
  const A log_odds = alone ? -infinity : log1p((s.ones - 1) + s.rest) + (s.max - s.target);
  const bool peaked = s.target >= s.max;
  const bool masked = !(s.target > -infinity);  // p_t = 0: the target lane adds nothing
  // NaN, +inf, or nothing but -inf in the row: it has no softmax, and every statistic is NaN
  const bool bad = !(s.target < infinity) || !(s.max < infinity) || log_odds != log_odds || (masked && alone);
  RowState<A> all = RowState<A>::empty(A(0));
  all.offset = s.offset, all.origin = s.origin, all.count = 1, all.total = s.target - s.origin;
  const A ref_target = has_reference ? s.ref_target : A(0), difference = (s.target - ref_target) - s.offset;
  if (!masked) all.max = s.target, all.ones = 1, all.gap = difference;
  if (ref_target > -infinity) all.ref_max = ref_target, all.ref_sum = 1, all.ref_gap = difference;
  merge(all, s);
  const A log_sum = log1p((all.ones - 1) + all.rest), sum = all.ones + all.rest;
  const A nan = std::numeric_limits<A>::quiet_NaN();
  const A mean = all.shifted / sum, ref_log_sum = ref_target == ref_target ? log(all.ref_sum) : nan;
  // logsumexp(z) - logsumexp(r) - offset, in the order that keeps a common shift of z and r out of the rounding
  const A excess = ((all.max - all.ref_max) - all.offset) + (log_sum - ref_log_sum);
  value[kLogp] = -softplus(log_odds);
  value[kLogNll] = log_softplus(log_odds);
  value[kEntropy] = log_sum - mean;
  value[kVariance] = all.squared / sum - mean * mean;
  value[kKlPq] = all.gap / sum - excess;
  value[kKlQp] = excess - all.ref_gap / all.ref_sum;  // a bad reference has made `excess` NaN
  for (int i = kEntropy; i <= kKlQp; ++i)
    if (value[i] < 0) value[i] = 0;
  value[kUniformCe] = ((all.max - all.origin) + log_sum) - all.total / A(vocabulary);
  value[kLse] = all.max + log_sum;
  value[kGreedy] = peaked && s.target > s.before ? A(1) : A(0);
  if (bad)
    for (int i = 0; i < kTopk; ++i) value[i] = nan;
  saved[kMax] = all.max;
  saved[kLogSum] = bad ? nan : log_sum;
  saved[kLogOdds] = bad ? nan : log_odds;
  saved[kRefMax] = has_reference ? all.ref_max : A(0);
  saved[kRefLogSum] = has_reference ? ref_log_sum : A(0);
}

}  // namespace PU_ISA
}  // namespace pu
