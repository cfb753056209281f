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
  float scale, softcap, per_softcap, per_z;  // per_z: 1 / (scale softcap)
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
  // z and dz/dx over scale. kCoarse: good enough for a gradient in 16 bits; tanh is off by 3e-7.
  struct Point { float z, slope; };
  template <bool kSoftcap, bool kCoarse> __device__ Point point(float x) const {
    if constexpr (kSoftcap && kCoarse) {  // tanh y = 1 - 2 r and its slope 4 r (1 - r), r = 1 / (1 + e^2y)
      const float r = reciprocal(1 + exp2_lanes(x * (2 * kLog2e * per_softcap))), top = softcap * scale;
      return {fmaf(-2 * top, r, top), 4 * fmaf(-r, r, r)};
    }
    const float z = this->z<kSoftcap>(x), y = z * per_z;
    return {z, kSoftcap ? 1 - y * y : 1.0f};
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
template <class T>
__device__ Pack<T> load_again(const T* p) {  // from the cache: not among the wide loads of a hot loop
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = reinterpret_cast<const uint32_t*>(p)[w];
  Pack<T> v;
  memcpy(&v, words, sizeof words);
  return v;
}
template <class T> __device__ void store(T* p, const Pack<T>& v) { *reinterpret_cast<Pack<T>*>(p) = v; }

template <class T> __device__ void unpack(const Pack<T>& p, float (&v)[Pack<T>::count]) {
  uint32_t words[4];
  memcpy(words, &p, sizeof words);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    constexpr int kEach = Pack<T>::count / 4;
    float own[kEach];
    values_of(words[w], own, T{});
#pragma unroll
    for (int l = 0; l < kEach; ++l) v[w * kEach + l] = own[l];
  }
}
template <class T> __device__ Pack<T> packed(const float (&v)[Pack<T>::count]) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    constexpr int kEach = Pack<T>::count / 4;
    float own[kEach];
#pragma unroll
    for (int l = 0; l < kEach; ++l) own[l] = v[w * kEach + l];
    words[w] = word_of(own, T{});
  }
  Pack<T> p;
  memcpy(&p, words, sizeof words);
  return p;
}

template <class T> __device__ bool same_phase(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

// The columns of a span that are aligned packs of x: [begin, end). None where not `aligned`.
template <class T> __device__ Span packs_of(const T* x, Span span, bool aligned) {
  const int32_t misses = int32_t((16 - reinterpret_cast<uintptr_t>(x + span.begin) % 16) % 16 / sizeof(T));
  const int32_t head = aligned && misses < span.end - span.begin ? span.begin + misses : span.end;
  return {head, head + (span.end - head) / Pack<T>::count * Pack<T>::count};
}

// Shares the columns of a span out among the block's threads, in a fixed order. batch(i, end): packs of T at i,
// i + kStride<T>, ... below end, kBatch at most. single(i): the columns that are in no pack, after the packs.
template <class T> constexpr int32_t kStride = kThreads * Pack<T>::count;
template <class T, class Batch, class Single> __device__ void sweep(Span span, Span packs, Batch batch, Single single) {
  constexpr int32_t P = Pack<T>::count;
  for (int32_t i = packs.begin + int32_t(threadIdx.x) * P; i < packs.end; i += kBatch * kStride<T>) batch(i, packs.end);
  const int32_t head = packs.begin - span.begin, edges = head + span.end - packs.end;
  for (int32_t k = int32_t(threadIdx.x); k < edges; k += kThreads)
    single(k < head ? span.begin + k : packs.end + k - head);
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
