// Statistics and d(logits) in one pass where the gradient of each token's statistics is known from the token alone: the
// row stays on chip, in the shared memory of a cluster of blocks, and the logits are read once and the gradient written
// once (2 N V). Needs thread block clusters (sm_90 and newer).
#include <cooperative_groups.h>

#include "../math/token_rule.h"
#include "reader.cuh"

namespace pu::cuda {
namespace {

constexpr int64_t kPieceBytes = 72 << 10;  // three blocks of an SM's 227 KB: one loads while another stores
constexpr int kLargestCluster = 8;         // the portable limit

struct Weights {
  const float* of_stats;  // (outputs, rows)
  const float* floor;     // (rows) or null
  Rule<float> rule;
};

template <class T, unsigned kWants, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, 3)
    value_and_grad_kernel(Arguments a, Weights weights, float* stats, Rows out) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  PU_DYNAMIC_SHARED(memory);
  __shared__ float room[kWarps];
  __shared__ RowState<float> mine;
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

  RowState<float> s = RowState<float>::empty(0.0f);
  if (span.begin < span.end) {
    Reader<T, kWants, kSoftcap> reader(a, x, Lanes{}, span, target);
    const Span packs = packs_of(x, span, true);
    reader.prime(packs, room);
    auto batch = [&](int32_t i, int32_t end) {
      reader.batch(i, end, [&](int32_t j, const Pack<T>& px) { store(at + j, px); });
    };
    auto single = [&](int32_t i) {
      at[i] = x[i];
      reader.single(i);
    };
    sweep<T>(span, packs, batch, single);
    s = reader.joined(span, room);
  }
  if (threadIdx.x == 0) mine = s;
  cluster.sync();
  if (threadIdx.x == 0) {
    RowState<float> whole = *cluster.map_shared_rank(&mine, 0);
    for (int other = 1; other < parts; ++other) merge(whole, *cluster.map_shared_rank(&mine, other));
    float value[kOutputCount], keep[kSavedCount], up[kOutputCount] = {};
    finish(whole, a.vocabulary, false, value, keep);
    int64_t line = 0;
#pragma unroll
    for (int o = 0; o < kOutputCount; ++o) {
      if (!(a.outputs >> o & 1)) continue;
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
