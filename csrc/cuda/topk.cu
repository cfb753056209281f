// The k largest logits of every row, in falling order, the lowest column first among equals, and the topk statistic.
// A radix select gets the k-th largest key in four passes of eight bits; one more pass collects. Counts are integers:
// their order of addition does not matter.
#include "row.cuh"

namespace pu::cuda {
namespace {

// Unsigned order is the order of floats, -0 being 0; NaN of either sign ends up at one of the ends.
__device__ uint32_t key_of(float z) {
  z += 0.0f;
  uint32_t bits;
  memcpy(&bits, &z, sizeof z);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ float z_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float z;
  memcpy(&z, &bits, sizeof z);
  return z;
}

// The number of threads before this one whose `flag` is set, and in `total` that of the whole block.
__device__ int rank_in_block(bool flag, int* room, int& total) {
  const unsigned votes = __ballot_sync(0xffffffffu, flag), before = (1u << threadIdx.x % 32) - 1;
  const int warp = threadIdx.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[warp] = __popc(votes);
  __syncthreads();
  int rank = __popc(votes & before);
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) rank += room[w];
    total += room[w];
  }
  return rank;
}

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads)
    topk_kernel(Arguments a, const float* saved, float* value, int32_t* index, float* belief, int k) {
  __shared__ int counts[kWarps][256], room[kWarps];
  __shared__ uint32_t keys[kThreads], sorted[kThreads];
  __shared__ int32_t column[kThreads], sorted_column[kThreads];
  __shared__ uint32_t prefix, tied;
  const int64_t row = blockIdx.x;
  const int me = threadIdx.x;
  index += row * k, belief += row * k;
  if (a.target(row) == a.ignore_index) {
    if (me < k) index[me] = -1, belief[me] = 0;
    return;
  }
  const T* x = a.logits.row<T>(row);
  const int32_t n = int32_t(a.columns);
  auto key_at = [&](int32_t i) { return key_of(a.z<kSoftcap>(value_of(x[i]))); };

  if (me == 0) prefix = 0, tied = uint32_t(k);  // tied: how many of the keys that begin with the prefix are wanted
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int w = 0; w < kWarps; ++w) counts[w][me] = 0;
    __syncthreads();
    const uint32_t above = shift == 24 ? 0 : ~0u << (shift + 8), wanted = prefix;
    for (int32_t i = me; i < n; i += kThreads) {
      const uint32_t key = key_at(i);
      if ((key & above) == wanted) atomicAdd(&counts[me / 32][key >> shift & 255], 1);
    }
    __syncthreads();
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += counts[w][me];
    counts[0][me] = sum;  // each thread has read its own column alone
    __syncthreads();
    if (me == 0) {
      uint32_t left = tied;
      int digit = 255;
      while (uint32_t(counts[0][digit]) < left) left -= counts[0][digit--];
      tied = left, prefix = wanted | uint32_t(digit) << shift;
    }
    __syncthreads();
  }

  const uint32_t kth = prefix;
  const int above = k - int(tied);
  int taken = 0, equal = 0;  // so far, in the order of the columns
  for (int32_t start = 0; start < n; start += kThreads) {
    const int32_t i = start + me;
    const uint32_t key = i < n ? key_at(i) : 0;
    int more, ties;
    const int at = taken + rank_in_block(i < n && key > kth, room, more);
    const int tie = equal + rank_in_block(i < n && key == kth, room, ties);
    if (i < n && key > kth) keys[at] = key, column[at] = i;
    if (i < n && key == kth && tie < int(tied)) keys[above + tie] = key, column[above + tie] = i;
    taken += more, equal += ties;
  }
  __syncthreads();
  if (me < k) {
    int rank = 0;
    for (int j = 0; j < k; ++j) rank += keys[j] > keys[me] || (keys[j] == keys[me] && column[j] < column[me]);
    sorted[rank] = keys[me], sorted_column[rank] = column[me];
  }
  __syncthreads();

  float* sums = reinterpret_cast<float*>(room);
  const float z = me < k ? z_of(sorted[me]) : 0, top = z_of(sorted[0]);
  const float e = me < k ? expf(z - top) : 0;
  const float weight = e / sum_over_block(e, sums);
  const float logp = (z - saved[kMax * a.rows + row]) - saved[kLogSum * a.rows + row];
  const float total = sum_over_block(weight != 0 ? weight * logp : 0, sums);
  if (me < k) index[me] = sorted_column[me], belief[me] = weight;
  if (me == 0) value[row] = total;
}

}  // namespace

void topk(const Call& call) {
  static_assert(kThreads >= 256, "one thread a lane of the largest k");
  const Arguments a = arguments_of(call);
  int64_t line = 0;
  for (int o = 0; o < kTopk; ++o) line += call.outputs >> o & 1;
  const Launch launch = {call.logits.rows, 1, call.stream};
  with_dtype(call.logits.dtype, [&](auto like) {
    with_flag(call.transform.softcap > 0, [&](auto softcap) {
      launch(topk_kernel<decltype(like), decltype(softcap)::value>, a, data_of(call.saved),
             data_of(call.stats) + line * a.rows, data_of<int32_t>(call.index), data_of(call.belief),
             int(call.index.columns));
    });
  });
}

}  // namespace pu::cuda
