// Statistics and d(logits) in one pass where the gradient of each token's statistics is known from the token alone: the
// row stays on chip, in the shared memory of a cluster of blocks, and the logits are read once and the gradient written
// once (2 N V). Needs thread block clusters and the copy engine (sm_90 and newer).
//
// A block's whole piece of the row is on its way before anything is summed. The sums of every warp go to shared memory; one
// barrier of the cluster later, the first warp of each block joins those of all warps, and one thread has the coefficients.
#include <cooperative_groups.h>

#include "../math/token_rule.h"
#include "bulk_copy.cuh"
#include "reader.cuh"

namespace pu::cuda {
namespace {

// A third of an SM's 228 KB, less the 1 KB a block that the system takes and what is static: three blocks, of which one
// loads while another stores. Rows of 152064 columns in 16 bits are four pieces.
constexpr int64_t kPieceBytes = (228 << 10) / 3 - 1024 - 512;
static_assert(4 * kPieceBytes >= 152064 * 2);
constexpr int kLargestCluster = 8;  // the portable limit
constexpr int kMostCopies = 16;     // kBatch packs a thread each: 16 KB of the 227 KB that a piece can have

struct Weights {
  const float* of_stats;  // (outputs, rows)
  const float* floor;     // (rows) or null
  Rule<float> rule;
};

// The outputs that these sums make; no others are asked of a kernel.
constexpr uint32_t outputs_of(unsigned wants) {
  uint32_t made = 0;
  for (int o = 0; o < kTopk; ++o)
    if (o != kKlPq && o != kKlQp && !(wants_of(1u << o) & ~wants)) made |= 1u << o;
  return made;
}

// op over what a state of a part of the row has beside its maxima.
template <unsigned kWants, class Op> __device__ void each_sum(RowState<float>& s, Op op) {
  op(s.ones), op(s.rest);
  if (kWants & kShifted) op(s.shifted);
  if (kWants & kSquared) op(s.squared);
  if (kWants & kTotal) op(s.total);
}
template <unsigned kWants>
constexpr int kFields = 4 + bool(kWants & kShifted) + bool(kWants & kSquared) + bool(kWants & kTotal);

// The states of a warp's threads become that of them all, in every one of them.
template <unsigned kWants> __device__ void join_warp(RowState<float>& s) {
  float max = s.max;
  for (int by = 16; by > 0; by /= 2) {
    max = max_lanes(max, __shfl_xor_sync(0xffffffffu, max, by));
    s.before = max_lanes(s.before, __shfl_xor_sync(0xffffffffu, s.before, by));
  }
  raise_max<kWants>(s, max);
  each_sum<kWants>(s, [](float& sum) {
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
  });
}

template <unsigned kWants> __device__ void write(float* fields, RowState<float> s) {
  fields[0] = s.max, fields[1] = s.before;
  int i = 2;
  each_sum<kWants>(s, [&](float& sum) { fields[i++] = sum; });
}
// What `write` wrote joins a state.
template <unsigned kWants> __device__ void join(RowState<float>& s, const float* fields) {
  RowState<float> other = s;
  other.max = fields[0];
  int i = 2;
  each_sum<kWants>(other, [&](float& sum) { sum = fields[i++]; });
  const float max = max_lanes(other.max, s.max);
  raise_max<kWants>(other, max), raise_max<kWants>(s, max);
  s.before = max_lanes(fields[1], s.before);
  s.ones += other.ones, s.rest += other.rest;
  s.shifted += other.shifted, s.squared += other.squared, s.total += other.total;
}

template <class T, unsigned kWants, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, 3)
    value_and_grad_kernel(Arguments a, Weights weights, float* stats, Rows out) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  PU_DYNAMIC_SHARED(memory);
  __shared__ Arrival arrivals[kMostCopies];
  __shared__ float sums[kWarps][kFields<kWants>], room[kWarps];
  __shared__ RowCoefficients<float> coefficients;
  T* onchip = reinterpret_cast<T*>(memory);  // column i of the span is onchip[i - span.begin + phase]
  const cg::cluster_group cluster = cg::this_cluster();
  const int64_t row = blockIdx.x, column = a.target(row), target = column - a.first_column;
  const int part = blockIdx.y, parts = gridDim.y;  // the cluster is the row
  const Span span = span_of(a.columns, part, parts);
  const T* x = a.logits.row<T>(row);
  T* dx = out.row<T>(row);
  const bool aligned = same_phase(x, static_cast<const T*>(dx));
  if (column == a.ignore_index) {  // the whole cluster leaves
    const Pack<T> zeros{};
    auto batch = [&](int32_t i, int32_t end) {
      for (int b = 0; b < kBatch && i < end; ++b, i += kStride<T>) store(dx + i, zeros);
    };
    sweep<T>(span, packs_of(dx, span, true), batch, [&](int32_t i) { dx[i] = stored<T>(0.0f); });
    if (part == 0 && threadIdx.x == 0)
      for (int line = 0, o = 0; o < kOutputCount; ++o)
        if (a.outputs >> o & 1) stats[line++ * a.rows + row] = 0;
    return;
  }
  const int32_t phase = int32_t(reinterpret_cast<uintptr_t>(x + span.begin) % 16 / sizeof(T));
  T* at = onchip + phase - span.begin;  // the phase of x

  constexpr int32_t kCopy = kBatch * kStride<T>;  // columns
  const Span body = packs_of(x, span, true);
  const int copies = (body.end - body.begin + kCopy - 1) / kCopy;
  if (threadIdx.x == 0) {
    for (int c = 0; c < copies; ++c) arrivals[c].prepare();
    Arrival::publish();
    for (int c = 0; c < copies; ++c) {
      const int32_t i = body.begin + c * kCopy, count = body.end - i < kCopy ? body.end - i : kCopy;
      arrivals[c].copy(at + i, x + i, uint32_t(count * sizeof(T)));
    }
  }
  __syncthreads();

  // What lies in other blocks' pieces, the origin and the target, is read before they may write their gradient there.
  Reader<T, kWants, kSoftcap> reader(a, x, Lanes{}, Span{0, 0}, target);
  float target_z = std::numeric_limits<float>::quiet_NaN();  // of a target that is no column
  if (threadIdx.x == 0 && target >= 0 && target < a.columns) target_z = reader.z(value_of(x[target]));
  reader.prime(body, room);
  for (int c = 0; c < copies; ++c) {
    arrivals[c].wait();
    const int32_t i = body.begin + c * kCopy + int32_t(threadIdx.x) * Pack<T>::count;
    Pack<T> px[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (i + b * kStride<T> < body.end) px[b] = load(at + i + b * kStride<T>);
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (i + b * kStride<T> < body.end) reader.pack(px[b], px[b], i + b * kStride<T>);
  }
  auto edge = [&](int32_t i) {
    at[i] = x[i];
    reader.single(i);
  };
  for (int32_t i = span.begin + int32_t(threadIdx.x); i < body.begin; i += kThreads) edge(i);
  for (int32_t i = body.end + int32_t(threadIdx.x); i < span.end; i += kThreads) edge(i);
  const int warp = int(threadIdx.x) / 32, lane_in_warp = int(threadIdx.x) % 32;
  RowState<float> whole = reader.s;
  join_warp<kWants>(whole);
  if (lane_in_warp == 0) write<kWants>(sums[warp], whole);
  cluster.sync();
  if (warp == 0) {
    whole = RowState<float>::empty(0.0f);
    for (int i = lane_in_warp; i < parts * kWarps; i += 32)
      join<kWants>(whole, cluster.map_shared_rank(sums[i % kWarps], unsigned(i / kWarps)));
    join_warp<kWants>(whole);
  }
  if (threadIdx.x == 0) {
    whole.origin = reader.s.origin, whole.target = target_z, whole.count = float(a.columns - 1);
    float value[kOutputCount], keep[kSavedCount], up[kOutputCount] = {};
    finish(whole, a.vocabulary, false, value, keep);
    constexpr uint32_t kMade = outputs_of(kWants);
    int64_t line = 0;
#pragma unroll
    for (int o = 0; o < kOutputCount; ++o) {
      if (!(kMade >> o & 1) || !(a.outputs >> o & 1)) continue;
      if (part == 0) stats[line * a.rows + row] = value[o];
      if (o != kVariance && o != kGreedy) up[o] = weights.of_stats[line * a.rows + row];
      ++line;
    }
    const bool has_floor = weights.floor != nullptr;
    up[kLogp] = times(up[kLogp], rule_weight(weights.rule, keep, has_floor, has_floor ? weights.floor[row] : 0.0f));
    coefficients = scaled(row_coefficients(up, value, keep, a.vocabulary), a.scale);
  }
  cluster.barrier_arrive();  // done with the others' memory
  __syncthreads();

  const RowCoefficients<float> c = coefficients;
  auto lane = [&](float x) {
    const auto at = a.point<kSoftcap, sizeof(T) == 2>(x);
    return lane_gradient<(kWants != 0), false>(at.z, 0.0f, c) * at.slope;
  };
  auto batch = [&](int32_t i, int32_t end) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int32_t j = i + b * kStride<T>;
      if (j >= end) break;
      float v[Pack<T>::count];
      unpack(load(at + j), v);
#pragma unroll
      for (int l = 0; l < Pack<T>::count; ++l) v[l] = lane(v[l]);
      store(dx + j, packed<T>(v));
    }
  };
  auto single = [&](int32_t i) { dx[i] = stored<T>(lane(value_of(at[i]))); };
  sweep<T>(span, packs_of(x, span, aligned), batch, single);
  __syncthreads();
  if (threadIdx.x == 0 && target >= span.begin && target < span.end) {
    const float slope = a.point<kSoftcap, false>(value_of(at[target])).slope;
    dx[target] = stored<T>(target_gradient<false>(0.0f, c) * slope);
  }
  cluster.barrier_wait();  // the others may still read this block's state until here
#endif
}

}  // namespace

const char* value_and_grad(const Call& call) {
  if (!device_attribute(cudaDevAttrClusterLaunch)) return "the GPU has no thread block clusters (sm_90 and newer)";
  int cluster = 1;
  const Matrix& logits = call.logits;
  const int64_t row_bytes = logits.columns * size_of(logits.dtype);
  while (cluster < kLargestCluster && row_bytes > cluster * kPieceBytes) cluster *= 2;
  const int64_t most = span_of(logits.columns, 0, cluster).end * size_of(logits.dtype);
  const int64_t piece = (most + 15) / 16 * 16 + 16;  // and its phase
  if (piece > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024)
    return "a row is too long for the shared memory of a cluster";
  const Arguments a = arguments_of(call);
  const Launch launch = {logits.rows, cluster, call.stream, size_t(piece), cluster};
  const Weights weights = {data_of(call.grad_stats),
                           data_of(call.floor),
                           {float(call.rule.alpha), float(call.rule.gamma), float(call.rule.beta)}};
  with_dtype(logits.dtype, [&](auto like) {
    with_flag(call.transform.softcap > 0, [&](auto softcap) {
      using T = decltype(like);
      constexpr bool S = decltype(softcap)::value;
      auto run = [&](auto kernel) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(piece)));
        launch(kernel, a, weights, data_of(call.stats), rows_of(call.grad_logits));
      };
      const unsigned wants = wants_of(call.outputs);
      if (wants & ~kShifted) run(value_and_grad_kernel<T, kMoments, S>);
      else if (wants) run(value_and_grad_kernel<T, kShifted, S>);
      else run(value_and_grad_kernel<T, 0, S>);
    });
  });
  return nullptr;
}

}  // namespace pu::cuda
