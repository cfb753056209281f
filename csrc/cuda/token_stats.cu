// One block streams one row; the arithmetic is csrc/math with float lanes. Loads are 16 bytes wide wherever a row allows.
// No atomics: a thread's columns are fixed, states merge by a fixed tree, the same bits every run.
#include "token_stats.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../math/row_state.h"
#include "../math/token_gradient.h"

namespace pu::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // at most 96 registers a thread: two blocks an SM or more

struct Rows {  // Matrix as a kernel argument
  char* data;
  int64_t inner_rows, inner_stride, outer_stride;
  template <class T> __device__ T* row(int64_t i) const {
    return reinterpret_cast<T*>(data) + (i / inner_rows) * outer_stride + (i % inner_rows) * inner_stride;
  }
};
Rows rows_of(const Matrix& m) { return {m.data, m.inner_rows, m.inner_stride, m.outer_stride}; }

struct Arguments {
  Rows logits, targets, reference;
  int64_t columns, first_column, vocabulary, ignore_index;
  float scale, softcap, per_softcap;
  uint32_t outputs;
  bool wide_targets;  // int64
  __device__ int64_t target(int64_t row) const { return wide_targets ? *targets.row<int64_t>(row) : *targets.row<int32_t>(row); }
  template <bool kSoftcap> __device__ float z(float x) const { return (kSoftcap ? softcap * tanhf(x * per_softcap) : x) * scale; }
  template <bool kSoftcap> __device__ float dx(float dz, float z) const {
    const float y = z / scale * per_softcap;
    return kSoftcap ? dz * scale * (1 - y * y) : dz * scale;
  }
};

Arguments arguments_of(const cpu::Call& call, const Matrix& logits, const Matrix& targets, const Matrix& reference) {
  const double softcap = call.transform.softcap;
  return {rows_of(logits), rows_of(targets), rows_of(reference), logits.columns, call.first_column, call.vocabulary, call.ignore_index,
          float(1 / call.transform.temperature), float(softcap), float(softcap > 0 ? 1 / softcap : 0), call.outputs,
          targets.dtype == DType::kInt64};
}

__device__ float value_of(float x) { return x; }
__device__ float value_of(__half x) { return __half2float(x); }
__device__ float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ T stored(float x);
template <> __device__ float stored<float>(float x) { return x; }
template <> __device__ __half stored<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __nv_bfloat16 stored<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <class T> struct alignas(16) Pack {
  static constexpr int count = 16 / sizeof(T);
  T lane[count];
};

// Calls wide(i) for whole 16-byte packs of [0, n) and narrow(i) for the rest; thread by thread, in a fixed order.
template <class T, class Wide, class Narrow> __device__ void sweep(const T* x, int64_t n, bool aligned, Wide wide, Narrow narrow) {
  constexpr int P = Pack<T>::count;
  const int64_t misses = (16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T);
  const int64_t head = aligned ? (misses < n ? misses : n) : n;
  const int64_t body = head + (n - head) / P * P;
  for (int64_t i = threadIdx.x; i < head; i += kThreads) narrow(i);
  for (int64_t i = head + int64_t(threadIdx.x) * P; i < body; i += int64_t(kThreads) * P) wide(i);
  for (int64_t i = body + threadIdx.x; i < n; i += kThreads) narrow(i);
}

template <class T> __device__ bool same_phase(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

__device__ RowState<float> shuffled_down(RowState<float> s, int by) {
  constexpr int kFields = sizeof(s) / sizeof(float);
  float field[kFields];
  memcpy(field, &s, sizeof s);
#pragma unroll
  for (int i = 0; i < kFields; ++i) field[i] = __shfl_down_sync(0xffffffffu, field[i], by);
  memcpy(&s, field, sizeof s);
  return s;
}

template <class T, bool kMoments, bool kReference, bool kSoftcap>
__global__ void __launch_bounds__(kThreads) accumulate_kernel(Arguments a, RowState<float>* state, bool fresh) {
  constexpr int P = Pack<T>::count;
  const int64_t row = blockIdx.x, target = a.target(row) - a.first_column;
  if (target + a.first_column == a.ignore_index) return;
  const T* x = a.logits.row<T>(row);
  const T* r = kReference ? a.reference.row<T>(row) : x;
  const float low = -std::numeric_limits<float>::infinity();
  RowState<float> s = RowState<float>::empty(0.0f);

  auto lanes = [&](int64_t i, const float* z, const float* q, int n) {
    if (s.count == 0) {
      const float gap = kReference ? z[0] - q[0] : 0.0f;
      s.origin = z[0] - z[0] == 0 ? z[0] : 0.0f;
      s.offset = gap - gap == 0 ? gap : 0.0f;
    }
    float own[P], other[P];
    float top = s.max, ref_top = s.ref_max, skipped = 0;
    int dropped = 0;
    const bool holds_target = target >= i && target < i + n;
    for (int l = 0; l < n; ++l) {
      const bool drop = holds_target && i + l == target;
      if (drop) s.target = z[l], s.ref_target = kReference ? q[l] : 0.0f, dropped = 1;
      own[l] = drop ? low : z[l];
      other[l] = drop ? low : kReference ? q[l] : 0.0f;
      top = max_lanes(own[l], top);
      if (kReference) ref_top = max_lanes(other[l], ref_top);
      if (i + l < target) s.before = max_lanes(z[l], s.before);
    }
    if (top > s.max) raise_max<kMoments, kReference>(s, top);
    if (kReference && ref_top > s.ref_max) raise_ref_max(s, ref_top);
    const float total = s.total;
    push<kMoments, kReference>(s, own, other, n);
    if (dropped) {  // the target's lane went in as -inf: `total` counts the others alone
      for (int l = 0; l < n; ++l)
        if (i + l != target) skipped += z[l] - s.origin;
      s.total = total + skipped;
    }
    s.count += n - dropped;
  };
  auto wide = [&](int64_t i) {
    const Pack<T> px = *reinterpret_cast<const Pack<T>*>(x + i), pr = *reinterpret_cast<const Pack<T>*>(r + i);
    float z[P], q[P];
#pragma unroll
    for (int l = 0; l < P; ++l) {
      z[l] = a.z<kSoftcap>(value_of(px.lane[l]));
      q[l] = kReference ? a.z<kSoftcap>(value_of(pr.lane[l])) : 0.0f;
    }
    lanes(i, z, q, P);
  };
  auto narrow = [&](int64_t i) {
    const float z = a.z<kSoftcap>(value_of(x[i])), q = kReference ? a.z<kSoftcap>(value_of(r[i])) : 0.0f;
    lanes(i, &z, &q, 1);
  };
  sweep(x, a.columns, same_phase(x, r), wide, narrow);

  __shared__ RowState<float> part[kWarps];
  for (int by = 16; by > 0; by /= 2) merge(s, shuffled_down(s, by));
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x == 0) {
    RowState<float> whole = fresh ? RowState<float>::empty(0.0f) : state[row];
    for (int w = 0; w < kWarps; ++w) merge(whole, part[w]);
    state[row] = whole;
  }
}

__global__ void finish_kernel(Arguments a, const RowState<float>* state, int64_t rows, bool has_reference, float* stats, float* saved) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  float value[kOutputCount] = {}, keep[kSavedCount] = {};
  if (a.target(row) != a.ignore_index) finish(state[row], a.vocabulary, has_reference, value, keep);
  int64_t line = 0;
  for (int o = 0; o < kOutputCount; ++o)
    if (a.outputs >> o & 1) stats[line++ * rows + row] = value[o];
  for (int k = 0; k < kSavedCount; ++k) saved[k * rows + row] = keep[k];
}

// The 1 matters: left to itself ptxas aims at more blocks an SM on sm_80, and spills.
template <class T, bool kReference, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(Arguments a, int64_t rows, const float* grad, const float* stats, const float* saved, Rows out) {
  constexpr int P = Pack<T>::count;
  const int64_t row = blockIdx.x, target = a.target(row);
  const T* x = a.logits.row<T>(row);
  const T* r = kReference ? a.reference.row<T>(row) : x;
  T* dx = out.row<T>(row);
  float up[kOutputCount] = {}, value[kOutputCount] = {}, keep[kSavedCount];
  bool wanted = false;
  int64_t line = 0;
  for (int o = 0; o < kOutputCount; ++o) {
    if (!(a.outputs >> o & 1)) continue;
    value[o] = stats[line * rows + row];
    if (o != kVariance && o != kGreedy) up[o] = grad[line * rows + row];
    wanted |= up[o] != 0;
    ++line;
  }
  const bool aligned = same_phase(x, r) && same_phase(x, static_cast<const T*>(dx));
  if (!wanted || target == a.ignore_index) {  // nothing is read
    const Pack<T> zeros{};
    sweep(static_cast<const T*>(dx), a.columns, true, [&](int64_t i) { *reinterpret_cast<Pack<T>*>(dx + i) = zeros; },
          [&](int64_t i) { dx[i] = stored<T>(0.0f); });
    return;
  }
  for (int k = 0; k < kSavedCount; ++k) keep[k] = saved[k * rows + row];
  const RowCoefficients<float> c = row_coefficients(up, value, keep, a.vocabulary);
  const int64_t at = target - a.first_column;
  auto lane = [&](int64_t i, T xv, T rv) {
    const float z = a.z<kSoftcap>(value_of(xv)), q = kReference ? a.z<kSoftcap>(value_of(rv)) : 0.0f;
    const float dz = i == at ? target_gradient<kReference>(q, c) : lane_gradient<true, kReference>(z, q, c);
    return stored<T>(a.dx<kSoftcap>(dz, z));
  };
  auto wide = [&](int64_t i) {
    const Pack<T> px = *reinterpret_cast<const Pack<T>*>(x + i), pr = *reinterpret_cast<const Pack<T>*>(r + i);
    Pack<T> result;
#pragma unroll
    for (int l = 0; l < P; ++l) result.lane[l] = lane(i + l, px.lane[l], pr.lane[l]);
    *reinterpret_cast<Pack<T>*>(dx + i) = result;
  };
  sweep(x, a.columns, aligned, wide, [&](int64_t i) { dx[i] = lane(i, x[i], r[i]); });
}

void check() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class Call> void with_dtype(DType t, Call call) {
  if (t == DType::kFloat32) return call(float{});
  if (t == DType::kFloat16) return call(__half{});
  if (t == DType::kBFloat16) return call(__nv_bfloat16{});
  throw std::invalid_argument("logits: the CUDA backend takes float32, float16 and bfloat16; use backend=\"eager\" for float64");
}
template <bool kValue> struct Flag { static constexpr bool value = kValue; };
template <class Call> void with_flag(bool value, Call call) { value ? call(Flag<true>{}) : call(Flag<false>{}); }

}  // namespace

void accumulate(const cpu::Call& call, const Matrix& logits, const Matrix& targets, const Matrix& reference, const Matrix& state, bool fresh, void* stream) {
  if (logits.rows == 0) return;
  const bool moments = reference || call.outputs & (1u << kEntropy | 1u << kVariance | 1u << kUniformCe);
  const Arguments a = arguments_of(call, logits, targets, reference);
  with_dtype(logits.dtype, [&](auto like) {
    with_flag(call.transform.softcap > 0, [&](auto softcap) {
      using T = decltype(like);
      constexpr bool S = decltype(softcap)::value;
      auto kernel = reference ? accumulate_kernel<T, true, true, S> : moments ? accumulate_kernel<T, true, false, S> : accumulate_kernel<T, false, false, S>;
      kernel<<<unsigned(logits.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, reinterpret_cast<RowState<float>*>(state.data), fresh);
    });
  });
  check();
}

void finish(const cpu::Call& call, const Matrix& state, const Matrix& targets, bool has_reference, const Matrix& stats, const Matrix& saved, void* stream) {
  if (state.rows == 0) return;
  const Arguments a = arguments_of(call, state, targets, Matrix{});
  finish_kernel<<<unsigned((state.rows + 127) / 128), 128, 0, static_cast<cudaStream_t>(stream)>>>(
      a, reinterpret_cast<const RowState<float>*>(state.data), state.rows, has_reference, reinterpret_cast<float*>(stats.data), reinterpret_cast<float*>(saved.data));
  check();
}

void backward(const cpu::Call& call, const Matrix& grad_stats, const Matrix& stats, const Matrix& saved, const Matrix& logits, const Matrix& targets,
              const Matrix& reference, const Matrix& grad_logits, void* stream) {
  if (logits.rows == 0) return;
  const Arguments a = arguments_of(call, logits, targets, reference);
  with_dtype(logits.dtype, [&](auto like) {
    with_flag(call.transform.softcap > 0, [&](auto softcap) {
      using T = decltype(like);
      constexpr bool S = decltype(softcap)::value;
      auto kernel = reference ? backward_kernel<T, true, S> : backward_kernel<T, false, S>;
      kernel<<<unsigned(logits.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          a, logits.rows, reinterpret_cast<const float*>(grad_stats.data), reinterpret_cast<const float*>(stats.data),
          reinterpret_cast<const float*>(saved.data), rows_of(grad_logits));
    });
  });
  check();
}

}  // namespace pu::cuda
