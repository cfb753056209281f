// One launch over all chunks of all pairs, a block each, and a small one that adds each segment's chunks in order.
//
// Every element is widened to double: two conversions and three DFMA. At 4.3 TB/s a bf16 pair (4 bytes) asks an SM of an
// H200 for 9 conversions and 14 DFMA lanes a cycle, which does 16 and 64; an fp32 pair (8 bytes) for half of that. A
// product in fp32 first would not save any: it is exact for bf16, but needs a conversion of its own (three a pair).
#include "segment_dot.h"

#include "../math/segments.h"
#include "row.cuh"

namespace pu::cuda {

__device__ inline double value_of(double x) { return x; }

namespace {

constexpr int kLoads = 2;  // groups of elements a thread has under way, 32 bytes each or more

struct Sums {
  double ab = 0, aa = 0, bb = 0;
  template <class A, class B> __device__ void add(A a, B b) {
    const double x = value_of(a), y = value_of(b);
    ab += x * y, aa += x * x, bb += y * y;
  }
};

// This thread's share of n elements.
template <class A, class B> __device__ Sums sums_of(const A* a, const B* b, int32_t n) {
  constexpr int kGroup = 16 / (sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));
  constexpr int kA = Pack<A>::count, kB = Pack<B>::count, kStep = kThreads * kGroup;
  Sums s;
  const bool aligned = (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
  const int32_t body = aligned ? n / kGroup * kGroup : 0;
  for (int32_t i = int32_t(threadIdx.x) * kGroup; i < body; i += kLoads * kStep) {
    Pack<A> pa[kLoads][kGroup / kA];
    Pack<B> pb[kLoads][kGroup / kB];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int32_t j = i + l * kStep;
      if (j >= body) break;
#pragma unroll
      for (int k = 0; k < kGroup; k += kA) pa[l][k / kA] = load(a + j + k);
#pragma unroll
      for (int k = 0; k < kGroup; k += kB) pb[l][k / kB] = load(b + j + k);
    }
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      if (i + l * kStep >= body) break;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) s.add(pa[l][k / kA].lane[k % kA], pb[l][k / kB].lane[k % kB]);
    }
  }
  for (int32_t i = body + int32_t(threadIdx.x); i < n; i += kThreads) s.add(a[i], b[i]);
  return s;
}

template <class Call> __device__ Sums with_type(int64_t type, int64_t address, int64_t first, Call call) {
  switch (DType(type)) {
    case DType::kBFloat16: return call(reinterpret_cast<const __nv_bfloat16*>(address) + first);
    case DType::kFloat16: return call(reinterpret_cast<const __half*>(address) + first);
    case DType::kFloat64: return call(reinterpret_cast<const double*>(address) + first);
    default: return call(reinterpret_cast<const float*>(address) + first);
  }
}

// The sums of all threads by a fixed tree, in thread 0.
__device__ inline Sums over_threads(Sums s) {
  __shared__ Sums room[kThreads];
  const int t = int(threadIdx.x);
  room[t] = s;
  for (int by = kThreads / 2; by > 0; by /= 2) {
    __syncthreads();
    if (t < by) {
      const Sums other = room[t + by];
      s.ab += other.ab, s.aa += other.aa, s.bb += other.bb;
      room[t] = s;
    }
  }
  return s;
}

__global__ void __launch_bounds__(kThreads, 3)
    chunk_kernel(const Segment* table, int64_t segments, int64_t chunk, Sums* partials) {
  const int64_t i = blockIdx.x;
  const Segment segment = table[segment_of(table, segments, i)];
  const int64_t begin = (i - segment.first_chunk) * chunk, left = segment.count - begin;
  const int32_t n = int32_t(left < chunk ? left : chunk);
  const Sums s = with_type(segment.a_type, segment.a, begin, [&](auto a) {
    return with_type(segment.b_type, segment.b, begin, [&](auto b) { return sums_of(a, b, n); });
  });
  const Sums whole = over_threads(s);
  if (threadIdx.x == 0) partials[i] = whole;
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(const Segment* table, int64_t segments, int64_t chunk, const Sums* partials, double* sums) {
  const Segment segment = table[blockIdx.x];
  const int64_t end = segment.first_chunk + (segment.count + chunk - 1) / chunk;
  Sums s;
  for (int64_t i = segment.first_chunk + threadIdx.x; i < end; i += kThreads)
    s.ab += partials[i].ab, s.aa += partials[i].aa, s.bb += partials[i].bb;
  s = over_threads(s);
  if (threadIdx.x != 0) return;
  sums[blockIdx.x] = s.ab, sums[segments + blockIdx.x] = s.aa, sums[2 * segments + blockIdx.x] = s.bb;
}

}  // namespace

void segment_dot(const SegmentDot& d) {
  const Segment* segments = d.table.as<Segment>();
  Sums* partial = reinterpret_cast<Sums*>(d.partials.data);
  Launch{d.partials.rows, 1, d.stream}(chunk_kernel, segments, d.table.rows, d.chunk, partial);
  Launch{d.table.rows, 1, d.stream}(finish_kernel, segments, d.table.rows, d.chunk, partial, d.sums.as<double>());
}

}  // namespace pu::cuda
