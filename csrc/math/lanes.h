// One arithmetic for every machine. `F` is a lane type: float or double (CUDA threads, double precision on the CPU)
// or a SIMD vector of floats (CPU). The statistics are written once over F, with the few operations below.
//
// PU_ISA names the inline namespace: the CPU compiles these headers once per instruction set, and distinct names keep
// the linker from mixing AVX-512 code into the portable build.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef PU_ISA
#define PU_ISA base
#endif
#if defined(__CUDACC__)
#define PU_FN __host__ __device__ __forceinline__
#else
#define PU_FN inline __attribute__((always_inline))
#define PU_LAMBDA __attribute__((always_inline))
#endif

namespace pu {
inline namespace PU_ISA {

template <class To, class From> PU_FN To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- scalar lanes -------------------------------------------------------------------------------------------------

PU_FN float select(bool condition, float yes, float no) { return condition ? yes : no; }
PU_FN double select(bool condition, double yes, double no) { return condition ? yes : no; }
PU_FN bool any(bool condition) { return condition; }

constexpr float kLog2e = 1.44269504f;
template <class F> PU_FN F max_lanes(F a, F b) { return select(a > b, a, b); }  // NaN in `a` gives `b`
#if defined(__CUDA_ARCH__)
template <> PU_FN float max_lanes(float a, float b) { return fmaxf(a, b); }
#endif

PU_FN float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
#else
  return a > b || a != a ? a : b;
#endif
}

// e^x of the bound and below is 0, and 0 times it still is. NaN stays.
PU_FN double bounded(double x) { return max_lanes(-800.0, x); }
PU_FN float bounded(float x) { return max_or_nan(x, -104.0f); }

PU_FN double exp_lanes(double x) { return exp(x); }
#if defined(__CUDA_ARCH__)
PU_FN float exp2_lanes(float x) {  // one instruction of the special function unit, 2 ulp; no denormals
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x));
  return e;
}
PU_FN float exp_lanes(float x) { return exp2_lanes(x * kLog2e); }
PU_FN float reciprocal(float x) {  // 1 ulp
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
#else
PU_FN float exp2_lanes(float x) { return exp2f(x); }
PU_FN float reciprocal(float x) { return 1 / x; }
PU_FN float exp_lanes(float x) { return expf(x); }
#endif
PU_FN double tanh_lanes(double x) { return tanh(x); }
PU_FN float tanh_lanes(float x) { return tanhf(x); }

template <class F> struct Lane {
  using Scalar = F;
  static constexpr int count = 1;
};
PU_FN float broadcast(float x, float) { return x; }
PU_FN double broadcast(double x, double) { return x; }
PU_FN float largest_lane(float x) { return x; }
PU_FN double largest_lane(double x) { return x; }

// ---- SIMD lanes (GCC and clang vector extensions: operators, comparisons and ?: come with the language) -------------

#if defined(PU_LANES)
using Floats = float __attribute__((vector_size(4 * PU_LANES)));
using Ints = int32_t __attribute__((vector_size(4 * PU_LANES)));
using Words = uint32_t __attribute__((vector_size(4 * PU_LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * PU_LANES)));

template <> struct Lane<Floats> {
  using Scalar = float;
  static constexpr int count = PU_LANES;
};

PU_FN Floats broadcast(float x, Floats) { return Floats{} + x; }
PU_FN Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }
PU_FN Floats max_lanes(Floats a, Floats b) {  // GCC makes two instructions of the template
#if defined(__AVX512F__)
  return _mm512_max_ps(__m512(a), __m512(b));
#elif defined(__AVX2__)
  return _mm256_max_ps(__m256(a), __m256(b));
#else
  return select(a > b, a, b);
#endif
}
PU_FN Floats bounded(Floats x) {
#if defined(__AVX512F__)
  return max_lanes(Floats{} - 104.0f, x);
#else
  return max_lanes(Floats{} - 88.0296919f, x);  // -127 ln 2: n = -127, and the bits of 2^n are 0
#endif
}
PU_FN float largest_lane(Floats v) {
  float m = v[0];
  for (int i = 1; i < PU_LANES; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
PU_FN bool any(Ints condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(condition), reinterpret_cast<__m512i>(condition)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(condition)) != 0;
#else
  int32_t folded = 0;
  for (int i = 0; i < PU_LANES; ++i) folded |= condition[i];
  return folded != 0;
#endif
}

// e^x = 2^n * 2^r with x log2(e) = n + r, |r| <= 1/2. NaN stays NaN. `log2(e)` is 1.3e-8 off, less than the difference
// of logits that x is may be.
struct Exponent {
  Floats n, r;
  explicit PU_FN Exponent(Floats from) {
    const Floats x = bounded(from);
#if defined(__AVX512F__)
    n = _mm512_roundscale_ps(__m512(x * 1.44269502f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    r = _mm512_fmsub_ps(__m512(x), _mm512_set1_ps(1.44269502f), __m512(n));  // rounded once
  }
  PU_FN Floats times_power(Floats p) const { return _mm512_scalef_ps(__m512(p), __m512(n)); }
#else
    // 1.5 * 2^23: adding it rounds to an integer, and 127 is the exponent's bias
    const float magic = 12582912.0f + 127;
    n = x * 1.44269502f + magic;
    r = x * 1.44269502f - (n - magic);
  }
  PU_FN Floats times_power(Floats p) const { return p * bits_of<Floats>(bits_of<Ints>(n) << 23); }
#endif
};

PU_FN Floats exp_lanes(Floats from) {  // degree-5 minimax, 1.7e-7 relative
  const Exponent e(from);
  const Floats r = e.r;
  Floats p = r * 0.00132647273f + 0.00967151299f;
  p = p * r + 0.0555073358f;
  p = p * r + 0.240222424f;
  p = p * r + 0.693147004f;
  p = p * r + 1.0f;
  return e.times_power(p);
}

PU_FN Floats exp_coarse(Floats from) {  // beside 16 bits: degree-4 minimax, 4e-6 relative
  const Exponent e(from);
  const Floats r = e.r;
  Floats p = r * 0.00957010221f + 0.0559178591f;
  p = p * r + 0.240247443f;
  p = p * r + 0.693121791f;
  p = p * r + 0.999999285f;
  return e.times_power(p);
}

// tanh by (1 - e^-2|x|) / (1 + e^-2|x|), and by its odd series where that would cancel.
PU_FN Floats tanh_lanes(Floats x) {
  Floats magnitude = bits_of<Floats>(bits_of<Words>(x) & 0x7fffffffu);
  Floats e = exp_lanes(magnitude * -2.0f);
  Floats large = (1.0f - e) / (1.0f + e);
  large = bits_of<Floats>(bits_of<Words>(large) | (bits_of<Words>(x) & 0x80000000u));
  Floats s = x * x;
  Floats p = s * -0.00665356731f + 0.0213016998f;
  p = p * s + -0.0538999699f;
  p = p * s + 0.133329704f;
  p = p * s + -0.333333284f;
  return select(magnitude < 0.5f, x + x * s * p, large);
}
#endif
#if !defined(PU_LANES)
PU_FN float exp_coarse(float x) { return exp_lanes(x); }
#endif
PU_FN double exp_coarse(double x) { return exp_lanes(x); }

// a * b, rounded: no compiler makes one operation of it and the sum or difference that follows.
template <class F, class S> PU_FN F product(F a, S b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(F) == 8) return __dmul_rn(a, b);
  else return __fmul_rn(a, b);
#else
  F ab = a * b;
#if defined(__AVX512F__)
  asm("" : "+v"(ab));
#elif defined(__x86_64__)
  asm("" : "+x"(ab));
#elif defined(__aarch64__)
  asm("" : "+w"(ab));
#else
  asm("" : "+m"(ab));
#endif
  return ab;
#endif
}

// e^(x - less), `less` the same in many lanes.
template <class F, class S> PU_FN F exp_less(F x, S less) { return exp_lanes(x - less); }
#if defined(__CUDA_ARCH__)
PU_FN float exp_less(float x, float less) { return exp2_lanes(fmaf(x, kLog2e, -less * kLog2e)); }
#endif

// Nothing of anything is nothing, even of infinity.
template <class A> PU_FN A times(A weight, A value) { return weight == 0 ? A(0) : weight * value; }

}  // namespace PU_ISA
}  // namespace pu
