// Storage types <-> SIMD lanes of float (double stays double). For files compiled once per instruction set.
#pragma once
#include "../math/lanes.h"

namespace pu {
inline namespace PU_ISA {

// Asks for the lines of n elements as far ahead of a stream as memory takes to answer. Beyond its end it does no harm.
template <int n, class T> PU_FN void prefetch(const T* p) {
  constexpr int kAhead = 2048, kLine = 64;
  for (int at = 0; at < n * int(sizeof(T)); at += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + at);
}

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class T> struct LaneOf { using type = Floats; };
template <> struct LaneOf<double> { using type = double; };

PU_FN double load(const double* p) { return *p; }
PU_FN void store(double* p, double v) { *p = v; }
PU_FN Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
PU_FN void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

PU_FN Words load_words(const void* p) {  // GCC makes several instructions of __builtin_convertvector
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, Words);
#endif
}
PU_FN void store_words(void* p, Words v) {
  const Halves h = __builtin_convertvector(v, Halves);
  __builtin_memcpy(p, &h, sizeof h);
}

PU_FN Floats load(const BFloat16* p) { return bits_of<Floats>(load_words(p) << 16); }
PU_FN Words bfloat16_bits(Floats v) {  // round to nearest even; NaN stays NaN
  const Words w = bits_of<Words>(v);
  const Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  return v == v ? rounded : (w >> 16 | 0x40u);
}
PU_FN void store(BFloat16* p, Floats v) { store_words(p, bfloat16_bits(v)); }

// Two vectors of a row, in an order of their own: those of bfloat16 take every other element.
template <class T, class F> PU_FN void load_pair(const T* p, F& a, F& b) { a = load(p), b = load(p + Lane<F>::count); }
template <class T, class F> PU_FN void store_pair(T* p, F a, F b) { store(p, a), store(p + Lane<F>::count, b); }
PU_FN void load_pair(const BFloat16* p, Floats& a, Floats& b) {
  Words w;
  __builtin_memcpy(&w, p, sizeof w);
  a = bits_of<Floats>(w << 16), b = bits_of<Floats>(w & 0xffff0000u);
}
// To the nearest, of two the one that is larger in magnitude. NaN stays NaN if its low 16 bits are 0.
PU_FN void store_pair(BFloat16* p, Floats a, Floats b) {
  const Words low = (bits_of<Words>(a) + 0x8000u) >> 16, high = bits_of<Words>(b) + 0x8000u;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const Words w = Words(_mm256_blend_epi16(__m256i(low), __m256i(high), 0xaa));
#else
  const Words w = low | (high & 0xffff0000u);
#endif
  __builtin_memcpy(p, &w, sizeof w);
}

PU_FN Floats load(const Float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  const Words w = load_words(p), magnitude = (w & 0x7fffu) << 13;
  const Floats value = bits_of<Floats>(magnitude) * 0x1p112f;  // denormals come out right
  const Words special = bits_of<Words>(value) | 0x7f800000u;   // exponent 31: infinity or NaN
  const Words absolute = bits_of<Ints>(magnitude) >= 0x0f800000 ? special : bits_of<Words>(value);
  return bits_of<Floats>(absolute | (w & 0x8000u) << 16);
#endif
}
PU_FN void store(Float16* p, Floats v) {
  const Words w = bits_of<Words>(v), magnitude = w & 0x7fffffffu;
  const Floats a = bits_of<Floats>(magnitude);
  const Words normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  const Words denormal = bits_of<Words>(a + 0.5f) - 0x3f000000u;  // the ulp of 0.5 is the smallest half
  Words h = a < 0x1p-14f ? denormal : normal;
  h = a >= 65520.0f ? Words{} + 0x7c00u : h;
  h = a != a ? Words{} + 0x7e00u : h;
  store_words(p, h | (w >> 16 & 0x8000u));
}

}  // namespace PU_ISA
}  // namespace pu
