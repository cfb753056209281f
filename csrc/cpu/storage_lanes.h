// Storage types <-> SIMD lanes of float (double stays double). For files compiled once per instruction set.
#pragma once
#include "../math/lanes.h"

namespace pu {
inline namespace PU_ISA {

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

// With the instruction for it, where `native` says that the CPU has it (it makes 0 of denormals).
template <class T, class F> PU_FN void store(T* p, F v, bool) { store(p, v); }
#if defined(__AVX512F__)
PU_FN bool has_native_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }
PU_FN void store(BFloat16* p, Floats v, bool native) {
  if (!native) return store(p, v);
  __m256i h;
  asm("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}
#else
PU_FN bool has_native_bfloat16() { return false; }
#endif

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
