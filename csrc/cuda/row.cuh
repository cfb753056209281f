// What the CUDA kernels of the token statistics share: kernel arguments, 16-byte packs, block-wide sums, launching.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "../math/row_state.h"
#include "../math/token_gradient.h"
#include "storage.cuh"
#include "token_stats.h"

#if !defined(PU_DYNAMIC_SHARED)
#define PU_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace pu::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Blocks an SM holds at least: 80 registers a thread, with a reference 128. A thread has kBatch 16-byte loads in flight
// (with a reference twice as many): 48 KB and more an SM, beyond the 33 KB that 4.3 TB/s and a microsecond of latency ask for.
constexpr int blocks_of(bool has_reference) { return has_reference ? 2 : 3; }
constexpr int kBatch = 4;

// ---- arguments ------------------------------------------------------------------------------------------------------

struct Rows {  // Matrix as a kernel argument
  char* data;
  int64_t inner_rows, inner_stride, outer_stride;
  __device__ int64_t offset(int64_t i) const {
    return (i / inner_rows) * outer_stride + (i % inner_rows) * inner_stride;
  }
  template <class T> __device__ T* row(int64_t i) const { return reinterpret_cast<T*>(data) + offset(i); }
};

template <class T> constexpr DType kType = DType::kFloat32;
template <> inline constexpr DType kType<__half> = DType::kFloat16;
template <> inline constexpr DType kType<__nv_bfloat16> = DType::kBFloat16;

// A row of reference logits, in a dtype of their own.
struct Lanes {
  const char* data;
  DType type;
  __device__ float operator[](int64_t i) const {
    switch (type) {
      case DType::kFloat32: return reinterpret_cast<const float*>(data)[i];
      case DType::kBFloat16: return value_of(reinterpret_cast<const __nv_bfloat16*>(data)[i]);
      case DType::kFloat16: return value_of(reinterpret_cast<const __half*>(data)[i]);
      default: return float(reinterpret_cast<const double*>(data)[i]);
    }
  }
};
__device__ inline Lanes row_of(const Rows& rows, DType type, int64_t i) {
  const int size = type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
  return {rows.data + size * rows.offset(i), type};
}
inline Rows rows_of(const Matrix& m) { return {m.data, m.inner_rows, m.inner_stride, m.outer_stride}; }
template <class T = float> T* data_of(const Matrix& m) { return reinterpret_cast<T*>(m.data); }

struct Arguments {
  Rows logits, targets, reference;
  int64_t rows, columns, first_column, vocabulary, ignore_index;
  float scale, softcap, per_softcap, slope;  // slope: d(z / (scale softcap)) / dz
  uint32_t outputs;
  bool wide_targets;  // int64
  DType ref_type;
  __device__ int64_t target(int64_t row) const {
    return wide_targets ? *targets.row<int64_t>(row) : *targets.row<int32_t>(row);
  }
  template <bool kSoftcap> __device__ float z(float x) const {
    return product(kSoftcap ? softcap * tanh_lanes(x * per_softcap) : x,
                   scale);  // less the maximum it is exactly 0 there
  }
  template <bool kSoftcap> __device__ float dx(float dz, float z) const {
    const float y = z * slope;
    return kSoftcap ? dz * scale * (1 - y * y) : dz * scale;
  }
};

inline Arguments arguments_of(const Call& call) {
  const double softcap = call.transform.softcap, temperature = call.transform.temperature;
  return {rows_of(call.logits),
          rows_of(call.targets),
          rows_of(call.reference),
          call.targets.rows,
          call.logits.columns,
          call.first_column,
          call.vocabulary,
          call.ignore_index,
          float(1 / temperature),
          float(softcap),
          float(softcap > 0 ? 1 / softcap : 0),
          float(softcap > 0 ? temperature / softcap : 0),
          call.outputs,
          call.targets.dtype == DType::kInt64,
          call.reference.dtype};
}

// The columns [begin, end) that part `part` of `parts` of a row covers; parts begin on 16-byte packs.
struct Span { int32_t begin, end; };
PU_FN Span span_of(int64_t columns, int part, int parts) {
  const int64_t each = ((columns + parts - 1) / parts + 15) / 16 * 16, begin = each * part;
  return {int32_t(begin < columns ? begin : columns), int32_t(begin + each < columns ? begin + each : columns)};
}

// ---- 16 bytes at a time ---------------------------------------------------------------------------------------------

template <class T> struct alignas(16) Pack {
  static constexpr int count = 16 / sizeof(T);
  T lane[count];
};
template <class T> __device__ Pack<T> load(const T* p) { return *reinterpret_cast<const Pack<T>*>(p); }
template <class T> __device__ void store(T* p, const Pack<T>& v) { *reinterpret_cast<Pack<T>*>(p) = v; }

template <class T> __device__ bool same_phase(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

// Shares the columns of a span out among the block's threads, in a fixed order. batch(i, end): packs of T at i,
// i + kStride<T>, ... below end, kBatch at most. single(i): the columns before the first aligned pack of x and after the
// last one, and all of them where not `aligned`.
template <class T> constexpr int32_t kStride = kThreads * Pack<T>::count;
template <class T, class Batch, class Single>
__device__ void sweep(const T* x, Span span, bool aligned, Batch batch, Single single) {
  constexpr int P = Pack<T>::count;
  const int32_t misses = int32_t((16 - reinterpret_cast<uintptr_t>(x + span.begin) % 16) % 16 / sizeof(T));
  const int32_t head = aligned && misses < span.end - span.begin ? span.begin + misses : span.end;
  const int32_t body = head + (span.end - head) / P * P;
  for (int32_t i = span.begin + int32_t(threadIdx.x); i < head; i += kThreads) single(i);
  for (int32_t i = head + int32_t(threadIdx.x) * P; i < body; i += kBatch * kStride<T>) batch(i, body);
  for (int32_t j = body + int32_t(threadIdx.x); j < span.end; j += kThreads) single(j);
}

// ---- the whole block ------------------------------------------------------------------------------------------------

// op over the values of all threads by a fixed tree; every thread gets the result. `room` is kWarps floats of shared memory.
template <class Op> __device__ float over_block(float v, float* room, Op op) {
  for (int by = 16; by > 0; by /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, by));
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
  __syncthreads();
  v = room[0];
  for (int w = 1; w < kWarps; ++w) v = op(v, room[w]);
  return v;
}
__device__ inline float sum_over_block(float v, float* room) {
  return over_block(v, room, [](float a, float b) { return a + b; });
}
__device__ inline float max_over_block(float v, float* room) {
  return over_block(v, room, [](float a, float b) { return max_lanes(a, b); });
}

// What one thread needs to take in its columns of a row part. All threads of the block share origin and offset.
template <class T, unsigned kWants, bool kSoftcap> struct Reader {
  static constexpr int P = Pack<T>::count;
  static constexpr bool kReference = kWants & kReferenceSums;
  const Arguments& a;
  const T* const x;
  const Lanes r;
  const int64_t target;  // a column of these logits, or outside of them
  RowState<float> s = RowState<float>::empty(0.0f);

  __device__ Reader(const Arguments& arguments, const T* logits, Lanes reference, Span span, int64_t column)
      : a(arguments), x(logits), r(reference), target(column) {
    const float first = z(value_of(x[span.begin])), gap = kReference ? first - z(r[span.begin]) : 0.0f;
    s.origin = first - first == 0 ? first : 0.0f;
    s.offset = gap - gap == 0 ? gap : 0.0f;
  }
  __device__ float z(float v) const { return a.template z<kSoftcap>(v); }

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
  __device__ void pack(const Pack<T>& px, const Pack<T>& pr, int32_t i) {
    float zs[P], qs[P];
#pragma unroll
    for (int l = 0; l < P; ++l) zs[l] = z(value_of(px.lane[l])), qs[l] = kReference ? z(value_of(pr.lane[l])) : 0.0f;
    take(zs, qs, i);
  }
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

// ---- launching ------------------------------------------------------------------------------------------------------

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

struct Launch {
  int64_t blocks, parts = 1;
  void* stream = nullptr;
  size_t shared_bytes = 0;
  int cluster = 1, threads = kThreads;

  template <class... Formal, class... Actual> void operator()(void (*kernel)(Formal...), Actual&&... arguments) const {
    if (blocks == 0 || parts == 0) return;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks), unsigned(parts));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 1, attribute.val.clusterDim.y = unsigned(cluster), attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(arguments)...));
  }
};

// ---- run-time arguments -> template arguments -----------------------------------------------------------------------

template <class Call> void with_dtype(DType t, Call call) {
  if (t == DType::kFloat32) return call(float{});
  if (t == DType::kFloat16) return call(__half{});
  if (t == DType::kBFloat16) return call(__nv_bfloat16{});
  throw std::invalid_argument(
      "logits: the CUDA backend takes float32, float16 and bfloat16; use backend=\"eager\" for float64");
}
template <unsigned kValue> struct Wants { static constexpr unsigned value = kValue; };
template <bool kValue> struct Flag { static constexpr bool value = kValue; };
template <class Call> void with_flag(bool value, Call call) { value ? call(Flag<true>{}) : call(Flag<false>{}); }

}  // namespace pu::cuda
