// Compiled once per instruction set: PU_ISA names it, PU_LANES is its float lanes. No std:: templates here: the linker
// could hand an AVX-512 instance of one to the portable build.
#include "../math/row_state.h"
#include "../math/token_gradient.h"
#include "lane_functions.h"
#include "storage_lanes.h"

namespace pu {
inline namespace PU_ISA {

PU_FN float lane0(Floats v) { return v[0]; }
PU_FN double lane0(double v) { return v; }
PU_FN float sum_lanes(Floats v) {
  float s = 0;
  for (int i = 0; i < PU_LANES; ++i) s += v[i];
  return s;
}
PU_FN double sum_lanes(double v) { return v; }

template <bool kValue> struct Flag { static constexpr bool value = kValue; };

// ---- z and its slope ----------------------------------------------------------------------------------------------

template <class A> struct Curve {
  A scale, softcap, per_softcap, temperature;
  explicit PU_FN Curve(const Transform& t)
      : scale(A(1 / t.temperature)), softcap(A(t.softcap)), per_softcap(A(t.softcap > 0 ? 1 / t.softcap : 0)),
        temperature(A(t.temperature)) {}
  template <bool kSoftcap, bool kUnit = false, class F> PU_FN F z(F x) const {
    if (kUnit) return x;
    return product(kSoftcap ? softcap * tanh_lanes(x * per_softcap) : x,
                   scale);  // less the maximum it is exactly 0 there
  }
  // whether z = x: who asks once saves the products
  template <bool kSoftcap> PU_FN bool is_unit() const { return !kSoftcap && scale == 1; }
  // scale * dz -> dx
  template <bool kSoftcap, class F> PU_FN F dx(F dz, F z) const {
    if (!kSoftcap) return dz;
    const F y = z * (temperature * per_softcap);
    return dz * (1 - y * y);
  }
};

// ---- a few lanes at a time: the edges of a row ---------------------------------------------------------------------

template <class T> PU_FN typename LaneOf<T>::type load_some(const T* p, int64_t n) {
  T buffer[PU_LANES] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T> PU_FN void store_some(T* p, typename LaneOf<T>::type v, int64_t n) {
  T buffer[PU_LANES];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

// Of R, which may be another dtype than that of the lanes F.
template <class R, class F> PU_FN F load_as(const R* p, int64_t n, F) {
  if constexpr (sizeof(R) == 8 && sizeof(F) > 8) {
    F v{};
    for (int64_t l = 0; l < n; ++l) v[l] = float(p[l]);
    return v;
  } else if constexpr (sizeof(R) == 8 || sizeof(F) > 8) {
    return n == Lane<F>::count ? load(p) : load_some(p, n);
  } else {
    return double(lane0(load_some(p, 1)));
  }
}

// Reference logits. kAlike: in the dtype T of the logits, which is not asked for at every load; else in their own.
template <class T, bool kAlike> struct Reference {
  using F = typename LaneOf<T>::type;
  const void* data;
  DType dtype;
  explicit PU_FN Reference(const Piece& piece) : data(piece.r), dtype(piece.ref_dtype) {}
  template <int n> PU_FN void ahead(int64_t i) const {
    if constexpr (kAlike) prefetch<n>(static_cast<const T*>(data) + i);
  }
  PU_FN void load_two(int64_t i, F& a, F& b) const {
    constexpr int L = Lane<F>::count;
    if constexpr (kAlike) load_pair(static_cast<const T*>(data) + i, a, b);
    else a = load_lanes(i, L), b = load_lanes(i + L, L);
  }
  PU_FN F load_lanes(int64_t i, int64_t n) const {
    if constexpr (kAlike) return load_as(static_cast<const T*>(data) + i, n, F{});
    switch (dtype) {
      case DType::kFloat32: return load_as(static_cast<const float*>(data) + i, n, F{});
      case DType::kBFloat16: return load_as(static_cast<const BFloat16*>(data) + i, n, F{});
      case DType::kFloat16: return load_as(static_cast<const Float16*>(data) + i, n, F{});
      default: return load_as(static_cast<const double*>(data) + i, n, F{});
    }
  }
};

// Two vectors of the logits, in the order in which the reference's come.
template <bool kAlike, class T, class F> PU_FN void load_two(const T* p, F& a, F& b) {
  if constexpr (kAlike) load_pair(p, a, b);
  else a = load(p), b = load(p + Lane<F>::count);
}

PU_FN Floats keep(Floats v, int64_t n, int64_t without, float otherwise) {  // lanes [0, n) except one
  for (int i = 0; i < PU_LANES; ++i)
    if (i >= n || i == without) v[i] = otherwise;
  return v;
}
PU_FN double keep(double v, int64_t n, int64_t without, double otherwise) {
  return n < 1 || without == 0 ? otherwise : v;
}

// ---- accumulate ---------------------------------------------------------------------------------------------------

template <class T, unsigned kWants, bool kSoftcap, bool kAlike = true>
void accumulate_piece(const Transform& transform, const Piece& piece, bool greedy, void* state) {
  using F = typename LaneOf<T>::type;
  using A = typename Lane<F>::Scalar;
  constexpr int L = Lane<F>::count;
  constexpr bool kReference = kWants & kReferenceSums;
  constexpr int G = 16;  // vectors between looks at the running maximum, and in the first level of the sums
  const T* x = static_cast<const T*>(piece.x);
  const Reference<T, kAlike> r(piece);
  const Curve<A> curve(transform);
  const int64_t n = piece.n, target = piece.target - piece.first;
  RowState<F> s = RowState<F>::empty(F{});
  auto z_at = [&](int64_t i) PU_LAMBDA { return curve.template z<kSoftcap>(load(x + i)); };
  auto one = [&](int64_t i) PU_LAMBDA { return lane0(curve.template z<kSoftcap>(load_some(x + i, 1))); };
  auto ref_one = [&](int64_t i) PU_LAMBDA { return lane0(curve.template z<kSoftcap>(r.load_lanes(i, 1))); };

  const A first = one(0), gap = kReference ? first - ref_one(0) : A(0);
  s.origin = broadcast(first - first == 0 ? first : A(0), F{});
  s.offset = broadcast(gap - gap == 0 ? gap : A(0), F{});

  auto groups = [&](int64_t i, int64_t end, auto unit) PU_LAMBDA {
    auto load_group = [&](int g, F* z, F* q) PU_LAMBDA {
      load_two<kAlike>(x + i + g * L, z[0], z[1]);
      if (kReference) r.load_two(i + g * L, q[0], q[1]);
      else q[0] = q[1] = F{};
      for (int k = 0; k < 2; ++k) {
        z[k] = curve.template z<kSoftcap, decltype(unit)::value>(z[k]);
        q[k] = curve.template z<kSoftcap, decltype(unit)::value>(q[k]);
      }
    };
    for (; i < end; i += G * L) {
      prefetch<G * L>(x + i);
      if constexpr (kReference) r.template ahead<G * L>(i);
      absorb<kWants, 2>(s, load_group, G);
    }
  };
  auto edge = [&](int64_t i, int64_t count, int64_t without) PU_LAMBDA {
    const A low = -std::numeric_limits<A>::infinity();
    const F z = keep(curve.template z<kSoftcap>(load_some(x + i, count)), count, without, low);
    const F q = kReference ? keep(curve.template z<kSoftcap>(r.load_lanes(i, count)), count, without, low) : F{};
    const F total = s.total;
    absorb<kWants>(s, &z, &q, 1);
    s.total = total + keep(z - s.origin, count, without, A(0));
  };
  const int64_t block = target >= 0 && target < n ? target / L * L : n, after = block + L < n ? block + L : n;
  for (int right = 0; right < 2; ++right) {  // of the target's block: vectors in groups, then what is left
    const int64_t begin = right ? after : 0, end = right ? n : block;
    const int64_t whole = begin + (end - begin) / (G * L) * (G * L);
    curve.template is_unit<kSoftcap>() ? groups(begin, whole, Flag<true>{}) : groups(begin, whole, Flag<false>{});
    auto load_vector = [&](int g, F* z, F* q) PU_LAMBDA {
      *z = curve.template z<kSoftcap>(load(x + whole + g * L));
      *q = kReference ? curve.template z<kSoftcap>(r.load_lanes(whole + g * L, L)) : F{};
    };
    const int vectors = int(end - whole) / L;
    if (vectors > 0) absorb<kWants, 1>(s, load_vector, vectors);
    if (whole + vectors * L < end) edge(whole + vectors * L, end - whole - vectors * L, -1);
  }
  if (block < n) edge(block, after - block, target - block);

  const A top = largest_lane(s.max), ref_top = largest_lane(s.ref_max);
  raise_max<kWants>(s, broadcast(top, F{}));
  if (kReference) raise_ref_max(s, broadcast(ref_top, F{}));
  RowState<A>& out = *static_cast<RowState<A>*>(state);
  out = RowState<A>::empty(A(0));
  out.max = top, out.ones = sum_lanes(s.ones), out.rest = sum_lanes(s.rest), out.shifted = sum_lanes(s.shifted),
  out.squared = sum_lanes(s.squared);
  out.total = sum_lanes(s.total), out.gap = sum_lanes(s.gap);
  if (kReference) out.ref_max = ref_top, out.ref_sum = sum_lanes(s.ref_sum), out.ref_gap = sum_lanes(s.ref_gap);
  out.origin = lane0(s.origin), out.offset = lane0(s.offset), out.count = A(n - (target >= 0 && target < n));
  if (target >= n) out.before = top;
  if (target >= 0 && target < n) {
    out.target = one(target), out.ref_target = kReference ? ref_one(target) : A(0);
    if (greedy && out.target >= top) {
      F before = broadcast(-std::numeric_limits<A>::infinity(), F{});
      int64_t i = 0;
      for (; i + L <= target; i += L) before = max_lanes(z_at(i), before);
      out.before = largest_lane(before);
      for (; i < target; ++i) out.before = max_lanes(one(i), out.before);
    }
  }
}

// ---- gradient -----------------------------------------------------------------------------------------------------

template <class T, bool kLogs, bool kReference, bool kSoftcap, bool kAlike = true>
void gradient_piece(const Transform& transform, const Piece& piece, const void* coefficients, const Belief& belief,
                    void* out) {
  using F = typename LaneOf<T>::type;
  using A = typename Lane<F>::Scalar;
  constexpr int L = Lane<F>::count;
  constexpr int kMaxFixed = 257;  // lanes set apart: the target and the top k
  const T* x = static_cast<const T*>(piece.x);
  const Reference<T, kAlike> r(piece);
  T* dx = static_cast<T*>(out);
  const Curve<A> curve(transform);
  // a copy: what is stored to dx cannot change it
  RowCoefficients<A> c = scaled(*static_cast<const RowCoefficients<A>*>(coefficients), curve.scale);
  for (A* a = &c.max; a <= &c.target_p; ++a)  // for store_pair: NaN of one form, which arithmetic leaves as it is
    if (*a != *a) *a = std::numeric_limits<A>::quiet_NaN();
  const int64_t n = piece.n;
  auto lanes = [&](F xv, F rv, auto unit) PU_LAMBDA {
    const F z = curve.template z<kSoftcap, decltype(unit)::value>(xv);
    const F q = kReference ? curve.template z<kSoftcap, decltype(unit)::value>(rv) : F{};
    return curve.template dx<kSoftcap>(lane_gradient<kLogs, kReference, sizeof(T) == 2>(z, q, c), z);
  };

  // Before anything is overwritten (dx may be x): the lanes that do not follow the common formula.
  int64_t column[kMaxFixed];
  A value[kMaxFixed];
  int fixed = 0;
  auto fix = [&](int64_t j, A b, bool is_target) PU_LAMBDA {
    const A z = lane0(curve.template z<kSoftcap>(load_some(x + j, 1)));
    const A q = kReference ? lane0(curve.template z<kSoftcap>(r.load_lanes(j, 1))) : A(0);
    const A dz = is_target ? target_gradient<kReference>(q, c)
                           : lane0(lane_gradient<kLogs, kReference>(broadcast(z, F{}), broadcast(q, F{}), c));
    column[fixed] = j, value[fixed++] = curve.template dx<kSoftcap>(dz + b, z);
  };
  const int64_t target = piece.target - piece.first;
  A target_belief = 0;
  for (int64_t i = 0; i < belief.k; ++i) {
    const int64_t j = belief.index[i] - piece.first;
    const A b = c.on_belief * static_cast<const A*>(belief.weight)[i];
    if (j == target) target_belief = b;
    else if (j >= 0 && j < n) fix(j, b, false);
  }
  if (target >= 0 && target < n) fix(target, target_belief, true);

  int64_t i = 0;
  auto run = [&](auto unit) PU_LAMBDA {
    for (; i + 2 * L <= n; i += 2 * L) {
      F a, b, p{}, q{};
      prefetch<2 * L>(x + i);
      if constexpr (kReference) r.template ahead<2 * L>(i);
      load_two<kAlike>(x + i, a, b);
      if (kReference) r.load_two(i, p, q);
      a = lanes(a, p, unit), b = lanes(b, q, unit);
      if constexpr (kAlike) store_pair(dx + i, a, b);
      else store(dx + i, a), store(dx + i + L, b);
    }
  };
  curve.template is_unit<kSoftcap>() ? run(Flag<true>{}) : run(Flag<false>{});
  for (int64_t count; i < n; i += count) {
    count = n - i < L ? n - i : L;
    const F q = kReference ? r.load_lanes(i, count) : F{};
    store_some(dx + i, lanes(load_some(x + i, count), q, Flag<false>{}), count);
  }
  for (int f = 0; f < fixed; ++f) store_some(dx + column[f], broadcast(value[f], F{}), 1);
}

// ---- top k --------------------------------------------------------------------------------------------------------

template <class T, bool kSoftcap>
void largest_of(const Transform& transform, const Piece& piece, int64_t k, int32_t* index, void* out) {
  using F = typename LaneOf<T>::type;
  using A = typename Lane<F>::Scalar;
  constexpr int L = Lane<F>::count;
  const T* x = static_cast<const T*>(piece.x);
  const Curve<A> curve(transform);
  A* z = static_cast<A*>(out);
  int64_t held = 0;
  auto offer = [&](A value, int64_t j) PU_LAMBDA {
    if (held == k && !(value > z[k - 1])) return;
    int64_t at = held < k ? held++ : k - 1;
    for (; at > 0 && value > z[at - 1]; --at) z[at] = z[at - 1], index[at] = index[at - 1];
    z[at] = value, index[at] = int32_t(j);
  };
  for (int64_t i = 0; i < piece.n; i += L) {
    const int64_t count = piece.n - i < L ? piece.n - i : L;
    const F v = curve.template z<kSoftcap>(count == L ? load(x + i) : load_some(x + i, count));
    if (held == k && !any(v > broadcast(z[k - 1], F{}))) continue;
    A lane[L];
    __builtin_memcpy(lane, &v, sizeof v);
    for (int64_t l = 0; l < count; ++l) offer(lane[l], i + l);
  }
}

// ---- run-time arguments -> template arguments -----------------------------------------------------------------------

template <class Call> PU_FN void with_dtype(DType t, Call call) {
  switch (t) {
    case DType::kFloat32: return call(float{});
    case DType::kBFloat16: return call(BFloat16{});
    case DType::kFloat16: return call(Float16{});
    default: return call(double{});
  }
}
template <class Call> PU_FN void with_flag(bool value, Call call) { value ? call(Flag<true>{}) : call(Flag<false>{}); }

void accumulate(const Transform& t, const Piece& p, unsigned wants, bool greedy, void* state) {
  with_dtype(p.dtype, [&](auto like) {
    with_flag(t.softcap > 0, [&](auto softcap) {
      using T = decltype(like);
      constexpr bool S = decltype(softcap)::value;
      constexpr unsigned kPrecision = sizeof(T) == 2 ? unsigned(kCoarse) : 0;
      if (p.r && p.ref_dtype != p.dtype) accumulate_piece<T, kEverything, S, false>(t, p, greedy, state);
      else if (p.r && wants) accumulate_piece<T, kEverything, S>(t, p, greedy, state);
      else if (p.r) accumulate_piece<T, kReferenceSums, S>(t, p, greedy, state);
      else if (wants & ~kShifted) accumulate_piece<T, kMoments, S>(t, p, greedy, state);
      else if (wants) accumulate_piece<T, kShifted | kPrecision, S>(t, p, greedy, state);
      else accumulate_piece<T, kPrecision, S>(t, p, greedy, state);
    });
  });
}

void gradient(const Transform& t, const Piece& p, const void* c, int kind, const Belief& belief, void* out) {
  with_dtype(p.dtype, [&](auto like) {
    with_flag(t.softcap > 0, [&](auto softcap) {
      using T = decltype(like);
      constexpr bool S = decltype(softcap)::value;
      if (kind == 2 && p.ref_dtype != p.dtype) gradient_piece<T, true, true, S, false>(t, p, c, belief, out);
      else if (kind == 2) gradient_piece<T, true, true, S>(t, p, c, belief, out);
      else if (kind == 1) gradient_piece<T, true, false, S>(t, p, c, belief, out);
      else gradient_piece<T, false, false, S>(t, p, c, belief, out);
    });
  });
}

void largest(const Transform& t, const Piece& p, int64_t k, int32_t* index, void* z) {
  with_dtype(p.dtype, [&](auto like) {
    with_flag(t.softcap > 0,
              [&](auto softcap) { largest_of<decltype(like), decltype(softcap)::value>(t, p, k, index, z); });
  });
}

}  // namespace PU_ISA

#define PU_JOIN2(a, b) a##b
#define PU_JOIN(a, b) PU_JOIN2(a, b)
#define PU_TEXT2(a) #a
#define PU_TEXT(a) PU_TEXT2(a)
LaneFunctions PU_JOIN(PU_ISA, _lanes)() {
  return {PU_TEXT(PU_ISA), accumulate, gradient, largest, perturb_chunk, pair_sums};
}

}  // namespace pu
