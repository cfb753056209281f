// Token statistics of rows of logits: the streaming forward (state, then finish) and the backward pass over csrc/math.
//
// accumulate: block (row, part) reads its columns once; N V of traffic (2 N V with a reference). At 4.3 TB/s a bf16 element
// leaves about 14 issue slots. What the machine code takes of them is in benchmarks/results/not-run-on-a-gpu-yet.md.
// backward: one read and one write of its columns, 2 N V (3 N V with a reference).
// Few rows are split into parts so that every SM has work; their states merge in a fixed order. No float atomics.
#include "reader.cuh"

namespace pu::cuda {
namespace {

template <class T, unsigned kWants, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, blocks_of(kWants& kReferenceSums))
    accumulate_kernel(Arguments a, RowState<float>* state, bool fresh) {
  __shared__ float room[kWarps];
  const int64_t row = blockIdx.x, column = a.target(row);
  const int part = blockIdx.y, parts = gridDim.y;
  RowState<float>& out = state[row * parts + part];
  const Span span = span_of(a.columns, part, parts);
  if (column == a.ignore_index || span.begin == span.end) {
    if (fresh && threadIdx.x == 0) out = RowState<float>::empty(0.0f);
    return;
  }
  constexpr bool kReference = kWants & kReferenceSums;
  const T* x = a.logits.row<T>(row);
  const Lanes ref = row_of(a.reference, a.ref_type, row);
  const T* r = kReference ? reinterpret_cast<const T*>(ref.data) : x;
  Reader<T, kWants, kSoftcap> reader(a, x, ref, span, column - a.first_column);
  const Span packs = packs_of(x, span, !kReference || (ref.type == kType<T> && same_phase(x, r)));
  reader.prime(packs, room);
  auto batch = [&](int32_t i, int32_t end) { reader.batch(i, end); };
  sweep<T>(span, packs, batch, [&](int32_t i) { reader.single(i); });
  RowState<float> s = reader.joined(span, room);
  if (threadIdx.x != 0) return;
  if (!fresh) {
    RowState<float> whole = out;
    merge(whole, s);
    s = whole;
  }
  out = s;
}

// One warp a row: its lanes merge the row's parts in turn, then each other by a fixed tree.
__global__ void __launch_bounds__(128) finish_kernel(Arguments a, const RowState<float>* state, int parts,
                                                     bool has_reference, float* stats, float* saved) {
  const int64_t row = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= a.rows) return;
  float value[kOutputCount] = {}, keep[kSavedCount] = {};
  if (a.target(row) != a.ignore_index) {
    RowState<float> s = RowState<float>::empty(0.0f);
    for (int part = lane; part < parts; part += 32) merge(s, state[row * parts + part]);
    for (int by = 1; by < 32 && by < parts; by *= 2) {
      constexpr int kFields = sizeof(s) / sizeof(float);
      float field[kFields];
      memcpy(field, &s, sizeof s);
#pragma unroll
      for (int i = 0; i < kFields; ++i) field[i] = __shfl_down_sync(0xffffffffu, field[i], by);
      RowState<float> other;
      memcpy(&other, field, sizeof s);
      if (lane % (2 * by) == 0 && lane + by < 32) merge(s, other);
    }
    finish(s, a.vocabulary, has_reference, value, keep);
  }
  if (lane != 0) return;
  int64_t line = 0;
#pragma unroll
  for (int o = 0; o < kOutputCount; ++o)
    if (a.outputs >> o & 1) stats[line++ * a.rows + row] = value[o];
#pragma unroll
  for (int k = 0; k < kSavedCount; ++k) saved[k * a.rows + row] = keep[k];
}

template <class T, bool kLogs, bool kReference, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, blocks_of(kReference))
    backward_kernel(Arguments a, const float* grad, const float* stats, const float* saved, Belief belief, Rows out) {
  constexpr int P = Pack<T>::count;
  const int64_t row = blockIdx.x, column = a.target(row), target = column - a.first_column;
  const Span span = span_of(a.columns, blockIdx.y, gridDim.y);
  const T* x = a.logits.row<T>(row);
  const Lanes ref = row_of(a.reference, a.ref_type, row);
  const T* r = kReference ? reinterpret_cast<const T*>(ref.data) : x;
  T* dx = out.row<T>(row);
  float up[kOutputCount] = {}, value[kOutputCount] = {}, keep[kSavedCount];
  bool wanted = false;
  int64_t line = 0;
#pragma unroll
  for (int o = 0; o < kOutputCount; ++o) {
    if (!(a.outputs >> o & 1)) continue;
    value[o] = stats[line * a.rows + row];
    if (o != kVariance && o != kGreedy) up[o] = grad[line * a.rows + row];
    wanted |= up[o] != 0;
    ++line;
  }
  if (!wanted || column == a.ignore_index) {  // nothing is read
    const Pack<T> zeros{};
    auto batch = [&](int32_t i, int32_t end) {
      for (int b = 0; b < kBatch && i < end; ++b, i += kStride<T>) store(dx + i, zeros);
    };
    sweep<T>(span, packs_of(dx, span, true), batch, [&](int32_t i) { dx[i] = stored<T>(0.0f); });
    return;
  }
#pragma unroll
  for (int k = 0; k < kSavedCount; ++k) keep[k] = saved[k * a.rows + row];
  const RowCoefficients<float> c = scaled(row_coefficients(up, value, keep, a.vocabulary), a.scale);
  auto lane = [&](float x, float r) {
    const auto at = a.point<kSoftcap, sizeof(T) == 2>(x);
    const float q = kReference ? a.point<kSoftcap, sizeof(T) == 2>(r).z : 0.0f;
    return lane_gradient<kLogs, kReference>(at.z, q, c) * at.slope;
  };

  // The lanes that do not follow the common formula, the top k (one a thread) and the target (thread 0), are worked out
  // before anything is overwritten (dx may be x) and written after everything else.
  auto special = [&](int64_t j, bool at_target, float more) {
    const auto at = a.point<kSoftcap, false>(value_of(x[j]));
    const float q = kReference ? a.z<kSoftcap>(ref[j]) : 0.0f;
    const float dz = at_target ? target_gradient<kReference>(q, c) : lane_gradient<kLogs, kReference>(at.z, q, c);
    return stored<T>((dz + more) * at.slope);
  };
  auto inside = [&](int64_t j) { return j >= span.begin && j < span.end; };
  __shared__ float target_belief;
  int64_t own = -1;
  T own_value = stored<T>(0.0f), target_value = own_value;
  if (threadIdx.x == 0) target_belief = 0;
  if (belief.index != nullptr && up[kTopk] != 0) {
    __syncthreads();
    if (threadIdx.x < belief.k) {
      const float more = c.on_belief * static_cast<const float*>(belief.weight)[row * belief.k + threadIdx.x];
      own = belief.index[row * belief.k + threadIdx.x] - a.first_column;
      if (own == target) target_belief = more, own = -1;
      if (inside(own)) own_value = special(own, false, more);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && inside(target)) target_value = special(target, true, target_belief);
  __syncthreads();
  auto batch = [&](int32_t i, int32_t end) {
    Pack<T> px[kBatch], pr[kReference ? kBatch : 1];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int32_t j = i + b * kStride<T>;
      if (j < end) px[b] = load(x + j);
      if (kReference && j < end) pr[kReference ? b : 0] = load(r + j);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int32_t j = i + b * kStride<T>;
      if (j >= end) break;
      float v[P], q[P] = {};
      unpack(px[b], v);
      if (kReference) unpack(pr[kReference ? b : 0], q);
#pragma unroll
      for (int l = 0; l < P; ++l) v[l] = lane(v[l], q[l]);
      store(dx + j, packed<T>(v));
    }
  };
  const bool aligned =
      same_phase(x, static_cast<const T*>(dx)) && (!kReference || (ref.type == kType<T> && same_phase(x, r)));
  auto single = [&](int32_t i) { dx[i] = stored<T>(lane(value_of(x[i]), kReference ? ref[i] : 0.0f)); };
  sweep<T>(span, packs_of(x, span, aligned), batch, single);
  __syncthreads();
  if (inside(own)) dx[own] = own_value;
  if (threadIdx.x == 0 && inside(target)) dx[target] = target_value;
}

template <class Call> void with_wants(unsigned wants, bool has_reference, Call call) {
  const bool light = (wants & ~kShifted) == 0;
  if (has_reference && light) return wants ? call(Wants<kReferenceSums | kShifted>{}) : call(Wants<kReferenceSums>{});
  if (has_reference) return call(Wants<kEverything>{});
  return !light ? call(Wants<kMoments>{}) : wants ? call(Wants<kShifted>{}) : call(Wants<0>{});
}

}  // namespace

OnDevice::OnDevice(int device) {
  check(cudaGetDevice(&before));
  if (device != before) check(cudaSetDevice(device));
  else before = -1;
}
OnDevice::~OnDevice() {
  if (before >= 0) cudaSetDevice(before);
}

int64_t parts_of(int64_t rows, int64_t columns) {
  const int64_t blocks = 4 * device_attribute(cudaDevAttrMultiProcessorCount);  // resident at once
  const int64_t parts = rows > 0 ? blocks / rows : 1, most = columns / 4096;
  return std::max<int64_t>(1, std::min({parts, most, int64_t(128)}));
}

void accumulate(const Call& call) {
  const Matrix& logits = call.logits;
  if (logits.rows == 0) return;
  const Arguments a = arguments_of(call);
  const Launch launch = {logits.rows, call.state.rows / logits.rows, call.stream};
  with_dtype(logits.dtype, [&](auto like) {
    with_flag(call.transform.softcap > 0, [&](auto softcap) {
      with_wants(wants_of(call.outputs), bool(call.reference), [&](auto wants) {
        launch(accumulate_kernel<decltype(like), decltype(wants)::value, decltype(softcap)::value>, a,
               data_of<RowState<float>>(call.state), call.fresh);
      });
    });
  });
}

void finish(const Call& call) {
  const int64_t rows = call.targets.rows;
  if (rows == 0) return;
  const Launch launch = {(rows + 3) / 4, 1, call.stream, 0, 1, 128};
  launch(finish_kernel, arguments_of(call), data_of<const RowState<float>>(call.state), int(call.state.rows / rows),
         call.has_reference, data_of(call.stats), data_of(call.saved));
}

void backward(const Call& call) {
  const Arguments a = arguments_of(call);
  const Launch launch = {call.logits.rows, parts_of(call.logits.rows, call.logits.columns), call.stream};
  const bool logs = wants_of(call.outputs) & kShifted;
  const Belief belief = {reinterpret_cast<const int32_t*>(call.index.data), call.belief.data, call.index.columns};
  with_dtype(call.logits.dtype, [&](auto like) {
    with_flag(call.transform.softcap > 0, [&](auto softcap) {
      using T = decltype(like);
      constexpr bool S = decltype(softcap)::value;
      auto kernel = call.reference ? backward_kernel<T, true, true, S>
                    : logs         ? backward_kernel<T, true, false, S>
                                   : backward_kernel<T, false, false, S>;
      launch(kernel, a, data_of(call.grad_stats), data_of(call.stats), data_of(call.saved), belief,
             rows_of(call.grad_logits));
    });
  });
}

}  // namespace pu::cuda
