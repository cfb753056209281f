// Gaussian noise out of a counter: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) and Box-Muller. One stream everywhere:
// elements 4 b .. 4 b + 3 of a parameter get the four normals of the words
//
//   philox(counter = (b low, b high, draw, parameter id), key = (seed low, seed high)),
//
// words 0, 1 -> normals 0, 1 and words 2, 3 -> normals 2, 3, by u = x 2^-32 + 2^-33:
//   z_even = sqrt(-2 ln u_even) cos(2 pi u_odd),   z_odd = sqrt(-2 ln u_even) sin(2 pi u_odd),   |z| <= 6.77.
//
// The CPU's arithmetic is single additions, products and square roots, rounded one by one (built without contraction):
// every instruction set gives the same bits, 1e-6 from the exact normals. CUDA threads take the special function units
// where these are good enough, and stay within 2e-5.
#pragma once
#include "lanes.h"
#if defined(PU_LANES) && defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pu {
inline namespace PU_ISA {

// ---- words: uint32_t, or SIMD lanes of 64 bits of which the lower 32 count -------------------------------------------

PU_FN uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // left to itself the compiler multiplies 64 bits by 64
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}
template <class W> PU_FN W high_word(uint64_t product) { return W(product >> 32); }
template <class W> PU_FN W low_word(uint64_t product) { return W(product); }

#if defined(PU_LANES)
using WideWords = uint64_t __attribute__((vector_size(4 * PU_LANES)));

PU_FN WideWords wide_product(WideWords a, uint32_t b) {
#if defined(__AVX512F__)
  return reinterpret_cast<WideWords>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<WideWords>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<WideWords>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}
template <class W> PU_FN W high_word(WideWords product) { return product >> 32; }
template <class W> PU_FN W low_word(WideWords product) { return product; }  // what lies above is never looked at
#endif

template <class W> PU_FN void philox(W (&c)[4], uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
    const auto p = wide_product(c[0], 0xD2511F53u), q = wide_product(c[2], 0xCD9E8D57u);
    c[0] = high_word<W>(q) ^ c[1] ^ key_low, c[1] = low_word<W>(q);
    c[2] = high_word<W>(p) ^ c[3] ^ key_high, c[3] = low_word<W>(p);
    key_low += 0x9E3779B9u, key_high += 0xBB67AE85u;
  }
}

// ---- words -> normals -------------------------------------------------------------------------------------------------
// Read as signed, a word x gives x 2^-32 + 2^-33, which is u below 1/2 and u - 1 above: no digit of 1 - u is lost.

// One CUDA thread: the special function units where they are good enough. Elsewhere the C library stands in for them.
#if defined(__CUDA_ARCH__)
PU_FN float log2_unit(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PU_FN float sqrt_unit(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PU_FN void cos_sin_unit(float x, float& cosine, float& sine) { __sincosf(x, &sine, &cosine); }
#else
PU_FN float log2_unit(float x) { return log2f(x); }
PU_FN float sqrt_unit(float x) { return sqrtf(x); }
PU_FN void cos_sin_unit(float x, float& cosine, float& sine) { cosine = cosf(x), sine = sinf(x); }
#endif
PU_FN void box_muller(uint32_t radius, uint32_t angle, float& z_even, float& z_odd) {
  const float c = fmaf(float(int32_t(radius)), 0x1p-32f, 0x1p-33f);
  // absolute error 2e-7: too much where u is near 1
  const float any_u = -1.38629436f * log2_unit(c < 0 ? 1.0f + c : c);
  const float near_1 = c * (((c * 0.553899109f - 0.664509535f) * c + 1.0000273f) * c - 2.0f);
  const float r = sqrt_unit(c < 0 && c > -0.0625f ? near_1 : any_u);
  cos_sin_unit(fmaf(float(int32_t(angle)), 1.46291808e-9f, 7.31459039e-10f), z_even, z_odd);  // 5e-7 in [-pi, pi]
  z_even *= r, z_odd *= r;
}

#if defined(PU_LANES)
PU_FN Floats sqrt_lanes(Floats x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  for (int i = 0; i < PU_LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// u = 2^e (1 + f), sqrt(1/2) <= 1 + f < sqrt(2): -2 ln u = -2 ln2 e + f Q(f), Q minimax to 3e-8 relative.
PU_FN Floats minus_two_log(Words word) {
  const Floats c = __builtin_convertvector(bits_of<Ints>(word), Floats) * 0x1p-32f + 0x1p-33f;
  const Floats u = select(c < 0.0f, c + 1.0f, c);
  const int32_t half_root = 0x3f3504f3;  // sqrt(1/2)
  const Ints shifted = bits_of<Ints>(u) - half_root, e = shifted >> 23;
  const Floats f = select(e == 0, c, bits_of<Floats>((shifted & 0x7fffff) + half_root) - 1.0f);
  Floats q = f * -0.174447134f + 0.287336856f;
  q = q * f + -0.299045324f;
  q = q * f + 0.331247866f;
  q = q * f + -0.399136662f;
  q = q * f + 0.500041485f;
  q = q * f + -0.666683733f;
  q = q * f + 0.999999762f;
  q = q * f + -2.0f;
  return __builtin_convertvector(e, Floats) * -1.38629436f + q * f;
}

// The word in quarter turns is q + w, -1/2 <= w <= 1/2: sin(pi/2 w) and cos(pi/2 w) minimax to 3e-8, turned by q.
PU_FN void cos_sin(Words word, Floats& cosine, Floats& sine) {
  const Words q = (word + 0x20000000u) >> 30;
  const Ints twice = bits_of<Ints>((word - (q << 30)) * 2 + 1);
  const Floats w = __builtin_convertvector(twice, Floats) * 0x1p-31f, s = w * w;
  Floats odd = s * -0.00460165786f + 0.079680033f;
  odd = odd * s + -0.64596349f;
  odd = (odd * s + 1.57079637f) * w;
  Floats even = s * -0.0203985814f + 0.253594935f;
  even = even * s + -1.2336967f;
  even = even * s + 0.99999994f;
  const Ints swapped = bits_of<Ints>(q << 31) >> 31;
  cosine = bits_of<Floats>(bits_of<Words>(select(swapped, odd, even)) ^ ((q + 1) & 2u) << 30);
  sine = bits_of<Floats>(bits_of<Words>(select(swapped, even, odd)) ^ (q & 2u) << 30);
}

PU_FN void box_muller(Words radius, Words angle, Floats& z_even, Floats& z_odd) {
  const Floats r = sqrt_lanes(minus_two_log(radius));
  cos_sin(angle, z_even, z_odd);
  z_even = z_even * r, z_odd = z_odd * r;
}
#endif

}  // namespace PU_ISA
}  // namespace pu
