// Compiled once per instruction set. No std:: templates here: the linker could hand an AVX-512 instance of one to the
// portable build. Products of all types but double are exact in double, so that contraction changes no bit.
#include "lane_functions.h"
#include "storage_lanes.h"

namespace pu {
inline namespace PU_ISA {

using Doubles = double __attribute__((vector_size(4 * PU_LANES)));
constexpr int kGroup = 16;  // running sums, on every machine
constexpr int kVectors = 2 * kGroup / PU_LANES;

// GCC makes several instructions of __builtin_convertvector.
PU_FN void widen(Floats f, Doubles& low, Doubles& high) {
#if defined(__AVX512F__)
  const __m512 v = reinterpret_cast<__m512>(f);
  low = reinterpret_cast<Doubles>(_mm512_cvtps_pd(_mm512_castps512_ps256(v)));
  high = reinterpret_cast<Doubles>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#elif defined(__AVX2__)
  const __m256 v = reinterpret_cast<__m256>(f);
  low = reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm256_castps256_ps128(v)));
  high = reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
#else
  using HalfFloats = float __attribute__((vector_size(2 * PU_LANES)));
  HalfFloats half[2];
  __builtin_memcpy(half, &f, sizeof f);
  low = __builtin_convertvector(half[0], Doubles), high = __builtin_convertvector(half[1], Doubles);
#endif
}

template <class T> PU_FN void widen(const T* p, Doubles (&v)[kVectors]) {
  for (int i = 0; i < kVectors; i += 2) widen(load(p + i / 2 * PU_LANES), v[i], v[i + 1]);
}
PU_FN void widen(const double* p, Doubles (&v)[kVectors]) { __builtin_memcpy(v, p, sizeof v); }

PU_FN double total(const Doubles (&v)[kVectors]) {
  double lane[kGroup], sum = 0;
  __builtin_memcpy(lane, v, sizeof v);
  for (int i = 0; i < kGroup; ++i) sum += lane[i];
  return sum;
}

template <class A, class B> void sums_of(const A* a, const B* b, int64_t n, double* sums) {
  Doubles ab[kVectors] = {}, aa[kVectors] = {}, bb[kVectors] = {};
  auto group = [&](const A* p, const B* q) PU_LAMBDA {
    prefetch<kGroup>(p), prefetch<kGroup>(q);
    Doubles x[kVectors], y[kVectors];
    widen(p, x), widen(q, y);
    for (int i = 0; i < kVectors; ++i) ab[i] += x[i] * y[i], aa[i] += x[i] * x[i], bb[i] += y[i] * y[i];
  };
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) group(a + i, b + i);
  if (i < n) {
    A p[kGroup] = {};
    B q[kGroup] = {};
    __builtin_memcpy(p, a + i, (n - i) * sizeof(A));
    __builtin_memcpy(q, b + i, (n - i) * sizeof(B));
    group(p, q);
  }
  sums[0] = total(ab), sums[1] = total(aa), sums[2] = total(bb);
}

template <class A> void sums_with(const A* a, DType b_type, const void* b, int64_t n, double* sums) {
  switch (b_type) {
    case DType::kBFloat16: return sums_of(a, static_cast<const BFloat16*>(b), n, sums);
    case DType::kFloat16: return sums_of(a, static_cast<const Float16*>(b), n, sums);
    case DType::kFloat64: return sums_of(a, static_cast<const double*>(b), n, sums);
    default: return sums_of(a, static_cast<const float*>(b), n, sums);
  }
}

void pair_sums(DType a_type, const void* a, DType b_type, const void* b, int64_t n, double* sums) {
  switch (a_type) {
    case DType::kBFloat16: return sums_with(static_cast<const BFloat16*>(a), b_type, b, n, sums);
    case DType::kFloat16: return sums_with(static_cast<const Float16*>(a), b_type, b, n, sums);
    case DType::kFloat64: return sums_with(static_cast<const double*>(a), b_type, b, n, sums);
    default: return sums_with(static_cast<const float*>(a), b_type, b, n, sums);
  }
}

}  // namespace PU_ISA
}  // namespace pu
