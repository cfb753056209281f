// Compiled once per instruction set, and without contraction of a * b + c: all of them give the same bits. No std::
// templates here: the linker could hand an AVX-512 instance of one to the portable build.
#include "../math/philox.h"
#include "lane_functions.h"
#include "storage_lanes.h"

namespace pu {
inline namespace PU_ISA {

constexpr int kLanes = PU_LANES, kQuads = kLanes / 4, kGroup = 4 * kLanes;  // elements a step

// v[k] lane 4 q + m  <->  v[m] lane 4 q + k: a 4 x 4 transpose in every quarter of 128 bits.
PU_FN void transpose(Floats (&v)[4]) {
#if defined(__AVX512F__)
  using V = __m512;
#define PU_MM(op) _mm512_##op
#elif defined(__AVX2__)
  using V = __m256;
#define PU_MM(op) _mm256_##op
#endif
#if defined(PU_MM)
  const V a = reinterpret_cast<V>(v[0]), b = reinterpret_cast<V>(v[1]), c = reinterpret_cast<V>(v[2]),
          d = reinterpret_cast<V>(v[3]);
  const auto ab = PU_MM(castps_pd)(PU_MM(unpacklo_ps)(a, b)), AB = PU_MM(castps_pd)(PU_MM(unpackhi_ps)(a, b));
  const auto cd = PU_MM(castps_pd)(PU_MM(unpacklo_ps)(c, d)), CD = PU_MM(castps_pd)(PU_MM(unpackhi_ps)(c, d));
  v[0] = reinterpret_cast<Floats>(PU_MM(unpacklo_pd)(ab, cd)),
  v[1] = reinterpret_cast<Floats>(PU_MM(unpackhi_pd)(ab, cd));
  v[2] = reinterpret_cast<Floats>(PU_MM(unpacklo_pd)(AB, CD)),
  v[3] = reinterpret_cast<Floats>(PU_MM(unpackhi_pd)(AB, CD));
#undef PU_MM
#else
  for (int q = 0; q < kLanes; q += 4)
    for (int k = 0; k < 4; ++k)
      for (int m = 0; m < k; ++m) {
        const float swapped = v[k][q + m];
        v[k][q + m] = v[m][q + k], v[m][q + k] = swapped;
      }
#endif
}

// The words of blocks block .. block + kLanes - 1. Lane 4 q + m works on block kQuads m + q, so that a transpose within
// quarters leaves the elements in order.
PU_FN void words_of(const Perturb& p, const Noise& noise, uint32_t id, uint64_t block, Words (&words)[4]) {
  WideWords half[2][4];
  for (int h = 0; h < 2; ++h) {
    WideWords at{};
    for (int i = 0; i < kLanes / 2; ++i) at[i] = kQuads * ((2 * i + h) % 4) + (2 * i + h) / 4;
    at += block;
    half[h][0] = at, half[h][1] = at >> 32, half[h][2] = WideWords{} + noise.draw, half[h][3] = WideWords{} + id;
    philox(half[h], uint32_t(p.seed), uint32_t(p.seed >> 32));
  }
  for (int k = 0; k < 4; ++k) words[k] = bits_of<Words>((half[0][k] & 0xffffffffu) | half[1][k] << 32);
}

// Elements 4 block .. 4 block + kGroup - 1, in order.
PU_FN void normals_of(const Perturb& p, const Noise& noise, uint32_t id, uint64_t block, Floats (&z)[4]) {
  Words x[4];
  words_of(p, noise, id, block, x);
  box_muller(x[0], x[1], z[0], z[1]);
  box_muller(x[2], x[3], z[2], z[3]);
  transpose(z);
}

struct Nothing {};
struct Word { uint32_t bits; };
template <class A, class B> constexpr bool is_same = false;
template <class A> constexpr bool is_same<A, A> = true;

// kGroup elements at s and t; element 4 block is the first of them.
template <class S, class T> PU_FN void group(const Perturb& p, uint32_t id, uint64_t block, const S* s, T* t) {
  if constexpr (is_same<T, Word>) {
    Words x[4];
    words_of(p, p.add, id, block, x);
    Floats v[4];
    for (int k = 0; k < 4; ++k) v[k] = bits_of<Floats>(x[k]);
    transpose(v);
    __builtin_memcpy(t, v, sizeof v);
  } else {
    Floats z[4] = {}, old[4] = {};
    if (p.add.on) normals_of(p, p.add, id, block, z);
    if (p.remove.on) normals_of(p, p.remove, id, block, old);
    if constexpr (is_same<S, Nothing>) {
      for (int k = 0; k < 4; ++k) store(t + k * kLanes, z[k] * float(p.add.scale));
    } else if constexpr (is_same<S, double>) {
      for (int i = 0; i < kGroup; ++i) t[i] = p.add.on ? s[i] + p.add.scale * z[i / kLanes][i % kLanes] : s[i];
    } else if (!p.add.on && !p.remove.on && is_same<S, T>) {
      __builtin_memcpy(t, s, kGroup * sizeof(T));
    } else {
      for (int k = 0; k < 4; ++k) {
        Floats v = load(s + k * kLanes);
        if (p.remove.on) v = bits_of<Floats>(bfloat16_bits(v - old[k] * float(p.remove.scale)) << 16);
        if (p.add.on) v = v + z[k] * float(p.add.scale);
        store(t + k * kLanes, v);
      }
    }
  }
}

template <class S, class T> void chunk(const Perturb& p, const Chunk& c) {
  const int64_t end = c.first + c.count;
  const uint32_t id = uint32_t(c.id);
  for (int64_t at = c.first / 4 * 4; at < end; at += kGroup) {
    const int64_t low = at < c.first ? c.first : at, high = end - at < kGroup ? end : at + kGroup;
    const S* s = reinterpret_cast<const S*>(c.source) + (low - c.first);
    T* t = reinterpret_cast<T*>(c.target) + (low - c.first);
    if (high - low == kGroup) {
      group(p, id, uint64_t(at) / 4, s, t);
    } else {  // an edge, by way of a buffer
      S from[kGroup] = {};
      T to[kGroup];
      if (p.has_source) __builtin_memcpy(from + (low - at), s, (high - low) * sizeof(S));
      group(p, id, uint64_t(at) / 4, from, to);
      __builtin_memcpy(t, to + (low - at), (high - low) * sizeof(T));
    }
  }
}

void perturb_chunk(const Perturb& p, const Chunk& c) {
  if (!p.has_source) return p.target == DType::kInt32 ? chunk<Nothing, Word>(p, c) : chunk<Nothing, float>(p, c);
  const bool widen = p.source != p.target;
  switch (p.source) {
    case DType::kBFloat16: return widen ? chunk<BFloat16, float>(p, c) : chunk<BFloat16, BFloat16>(p, c);
    case DType::kFloat16: return widen ? chunk<Float16, float>(p, c) : chunk<Float16, Float16>(p, c);
    case DType::kFloat64: return chunk<double, double>(p, c);
    default: return chunk<float, float>(p, c);
  }
}

}  // namespace PU_ISA
}  // namespace pu
