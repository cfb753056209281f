// One thread's share of a row part: the streaming state of the columns it reads.
//
// Most packs lie below the running maximum and hold no target. They are taken in without a choice a lane, in base 2: with
// m the maximum and c = m log2(e), rounded, e^(z - m) = 2^(z log2(e) - c) 2^(c - m log2(e)); the first power is one fused
// operation and one of the special function unit a lane, the second a factor a pack. All others go through row_state.h.
#pragma once
#include "row.cuh"

namespace pu::cuda {

// A maximum m as the exponents see it.
struct Level {
  float limit = std::numeric_limits<float>::quiet_NaN();  // m; NaN, below which nothing is, where m is too large
  float c = 0, excess = 0, factor = 1;                    // excess: c - m log2(e), factor: 2 to the power of that

  static __device__ Level of(float m) {
    Level l;
    if (!(fabsf(m) < 4194304.0f)) return l;  // beyond, c is off by more than 1/4
    l.limit = m;
    l.c = product(m, kLog2e);
    l.excess = -fmaf(m, kLog2e, -l.c);
    l.factor = exp2_lanes(l.excess);
    return l;
  }
  __device__ float exponent(float z) const { return fmaf(z, kLog2e, -c); }
};

// All threads of the block share origin and offset.
template <class T, unsigned kWants, bool kSoftcap> struct Reader {
  static constexpr int P = Pack<T>::count;
  static constexpr bool kReference = kWants & kReferenceSums;
  const Arguments& a;
  const T* const x;
  const Lanes r;
  const int64_t target;  // a column of these logits, or outside of them
  int32_t target_pack;   // where its pack begins, or what is left or right of all columns
  RowState<float> s = RowState<float>::empty(0.0f);
  Level level, ref_level;

  __device__ Reader(const Arguments& arguments, const T* logits, Lanes reference, Span span, int64_t column)
      : a(arguments), x(logits), r(reference), target(column) {
    const float first = z(value_of(x[span.begin])), gap = kReference ? first - z(r[span.begin]) : 0.0f;
    s.origin = first - first == 0 ? first : 0.0f;
    s.offset = gap - gap == 0 ? gap : 0.0f;
    if (target < 0) target_pack = -1;
    else if (target >= a.columns) target_pack = int32_t(a.columns);
    else target_pack = int32_t(target) - int32_t(reinterpret_cast<uintptr_t>(x + target) % 16 / sizeof(T));
  }
  __device__ float z(float v) const { return a.template z<kSoftcap>(v); }
  __device__ Pack<T> load_reference(int32_t i) const { return load(reinterpret_cast<const T*>(r.data) + i); }

  __device__ void points(const Pack<T>& px, const Pack<T>& pr, float (&zs)[P], float (&qs)[P]) const {
    unpack(px, zs);
    if (kReference) unpack(pr, qs);
#pragma unroll
    for (int l = 0; l < P; ++l) zs[l] = z(zs[l]), qs[l] = kReference ? z(qs[l]) : 0.0f;
  }

  // A maximum to begin with: that of the block's first packs. Few lanes are above it; each such holds up its whole warp.
  __device__ void prime(Span packs, float* room) {
    if (packs.end - packs.begin <= kBatch * kStride<T>) return;  // they are all
    const float nothing = -std::numeric_limits<float>::infinity();
    float top = nothing, ref_top = nothing;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int32_t i = packs.begin + int32_t(threadIdx.x) * P + b * kStride<T>;
      if (i >= packs.end || i == target_pack) continue;
      float v[P], q[P];
      unpack(load(x + i), v);
      if (kReference) unpack(load_reference(i), q);
#pragma unroll
      for (int l = 0; l < P; ++l) {
        top = max_lanes(v[l], top);
        if (kReference) ref_top = max_lanes(q[l], ref_top);
      }
    }
    s.max = max_lanes(z(max_over_block(top, room)), s.max);
    if (kReference) s.ref_max = max_lanes(z(max_over_block(ref_top, room)), s.ref_max);
    level = Level::of(s.max), ref_level = Level::of(s.ref_max);
  }

  // Takes in a pack that is below the maximum and not the target's. Otherwise, and where a lane at -inf makes NaN of a
  // product, it is left as it was: false.
  __device__ bool below(const Pack<T>& px, const Pack<T>& pr, int32_t i) {
    float zs[P], qs[P];
    points(px, pr, zs, qs);
    float top = zs[0], ref_top = qs[0];
#pragma unroll
    for (int l = 1; l < P; ++l) {
      top = max_lanes(zs[l], top);
      if (kReference) ref_top = max_lanes(qs[l], ref_top);
    }
    if (i == target_pack || !(top < level.limit) || (kReference && !(ref_top <= ref_level.limit))) return false;
    constexpr float kNone = -0.0f;  // x + -0 is x: the first sum is none
    float rest = kNone, shifted = kNone, squared = kNone, total = kNone, gap = kNone, ref_sum = kNone, ref_gap = kNone;
#pragma unroll
    for (int l = 0; l < P; ++l) {
      const float t = level.exponent(zs[l]), e = exp2_lanes(t);
      rest += e;
      if (kWants & (kShifted | kSquared)) shifted += e * t;
      if (kWants & kSquared) squared += e * t * t;
      if (kWants & kTotal) total += zs[l] - s.origin;
      if (kReference) {
        const float q = exp2_lanes(ref_level.exponent(qs[l])), difference = (zs[l] - qs[l]) - s.offset;
        ref_sum += q;
        gap += e * difference;
        ref_gap += q * difference;
      }
    }
    const float products = (kWants & kSquared ? squared : shifted) + (kReference ? gap + ref_gap : kNone);
    if (products != products) return false;
    constexpr float kLn2 = 0.693147181f;
    s.rest += level.factor * rest;
    if (kWants & (kShifted | kSquared)) s.shifted += kLn2 * level.factor * (shifted + level.excess * rest);
    if (kWants & kSquared)
      s.squared += kLn2 * kLn2 * level.factor * (squared + level.excess * (2 * shifted + level.excess * rest));
    if (kWants & kTotal) s.total += total;
    if (kReference) {
      s.gap += level.factor * gap;
      s.ref_sum += ref_level.factor * ref_sum;
      s.ref_gap += ref_level.factor * ref_gap;
    }
    if (i < target_pack) s.before = max_lanes(top, s.before);
    return true;
  }

  // Takes in any columns [i, i + N).
  template <int N> __device__ void take(float (&z)[N], float (&q)[N], int32_t i) {
    const bool around = target >= i && target < i + N;  // one lane is the target's: it goes in as -inf
    float total = s.total;
    if (around) {
#pragma unroll
      for (int l = 0; l < N; ++l) {
        if (i + l == target) z[l] = q[l] = -std::numeric_limits<float>::infinity();
        else if (kWants & kTotal) total += z[l] - s.origin;
        if (i + l < target) s.before = max_lanes(z[l], s.before);
      }
    }
    const float top = absorb<kWants>(s, z, q, N);
    if (i + N <= target) s.before = max_lanes(top, s.before);
    if ((kWants & kTotal) && around) s.total = total;
  }

  // kBatch packs from column i on, those before `end`.
  __device__ void batch(int32_t i, int32_t end) {
    Pack<T> px[kBatch], pr[kReference ? kBatch : 1];
    unsigned left = 0;  // bit b: pack b is not taken in
    const bool whole = i + (kBatch - 1) * kStride<T> < end;
    if (whole) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        px[b] = load(x + i + b * kStride<T>);
        if (kReference) pr[kReference ? b : 0] = load_reference(i + b * kStride<T>);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (!below(px[b], pr[kReference ? b : 0], i + b * kStride<T>)) left |= 1u << b;
    } else {
      for (int b = 0; b < kBatch - 1 && i + b * kStride<T> < end; ++b) left |= 1u << b;
    }
#pragma unroll 1
    for (int b = 0; left != 0; ++b, left >>= 1) {
      if (!(left & 1)) continue;
      const int32_t j = i + b * kStride<T>;
      const Pack<T> own = load_again(x + j);  // px and pr are not kept: their registers are wanted
      Pack<T> ref = own;
      if (kReference) ref = load_again(reinterpret_cast<const T*>(r.data) + j);
      if (!whole && below(own, ref, j)) continue;
      float zs[P], qs[P];
      points(own, ref, zs, qs);
      take(zs, qs, j);
      level = Level::of(s.max), ref_level = Level::of(s.ref_max);
    }
  }
  // One that is at hand.
  __device__ void pack(const Pack<T>& px, const Pack<T>& pr, int32_t i) {
    if (below(px, pr, i)) return;
    float zs[P], qs[P];
    points(px, pr, zs, qs);
    take(zs, qs, i);
    level = Level::of(s.max), ref_level = Level::of(s.ref_max);
  }
  // After the last pack: `level` stays as it was.
  __device__ void single(int32_t i) {
    float zs[1] = {z(value_of(x[i]))}, qs[1] = {kReference ? z(r[i]) : 0.0f};
    take(zs, qs, i);
  }

  // The state of the block's whole span, in every thread. `room` is kWarps floats of shared memory.
  __device__ RowState<float> joined(Span span, float* room) {
    const float max = max_over_block(s.max, room);
    raise_max<kWants>(s, max);
    s.ones = sum_over_block(s.ones, room);
    s.rest = sum_over_block(s.rest, room);
    s.before = max_over_block(s.before, room);
    if (kWants & kShifted) s.shifted = sum_over_block(s.shifted, room);
    if (kWants & kSquared) s.squared = sum_over_block(s.squared, room);
    if (kWants & kTotal) s.total = sum_over_block(s.total, room);
    if (kReference) {
      const float ref_max = max_over_block(s.ref_max, room);
      raise_ref_max(s, ref_max);
      s.gap = sum_over_block(s.gap, room);
      s.ref_sum = sum_over_block(s.ref_sum, room);
      s.ref_gap = sum_over_block(s.ref_gap, room);
    }
    const bool here = target >= span.begin && target < span.end;
    if (here) s.target = z(value_of(x[target])), s.ref_target = kReference ? z(r[target]) : 0.0f;
    s.count = float(span.end - span.begin - here);
    return s;
  }
};

}  // namespace pu::cuda
