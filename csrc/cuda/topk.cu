// The k largest logits of every row, in falling order, the lowest column first among equals, and the topk statistic.
// One pass: what reaches the k-th largest lane so far is held in shared memory, and when that is full all but its k largest
// are dropped. In a row without order that happens once or a few times, so packs are hardly more than read and compared.
#include "row.cuh"

namespace pu::cuda {
namespace {

static_assert(kThreads == 256, "a thread a digit of eight bits, and one a lane of the largest k");
constexpr int kRoom = kThreads + kThreads * 8;  // k lanes, and as many as the block's threads read at a time

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

// The block's, in shared memory.
struct Held {
  uint64_t entry[kRoom];  // a lane's key, and below it the complement of its column: all differ
  int counts[kWarps][kThreads], sums[kWarps];
  uint64_t prefix;
  int taken, wanted;
  uint32_t least;

  // Every thread's lanes of key `floor` or more, of the P from column i on. In any order: places come from an atomic.
  template <int P> __device__ void offer(const float (&z)[P], int32_t i, uint32_t floor) {
    int own = 0;
#pragma unroll
    for (int l = 0; l < P; ++l) own += key_of(z[l]) >= floor;
    if (own == 0) return;
    int at = atomicAdd(&taken, own);
#pragma unroll
    for (int l = 0; l < P; ++l)
      if (const uint32_t key = key_of(z[l]); key >= floor) entry[at++] = uint64_t(key) << 32 | uint32_t(~(i + l));
  }

  // Drops all but the k largest, of which there are more. The least key that a later column needs to be one of them.
  __device__ uint32_t keep(int k) {
    const int me = int(threadIdx.x), lane = me % 32, warp = me / 32, n = taken;
    if (me == 0) prefix = 0, wanted = k, least = ~0u;
    uint64_t begin = 0;  // of the k largest; a radix select: a digit a round, until all that have it are wanted
    for (int shift = 56; shift >= 0; shift -= 8) {
      for (int w = 0; w < kWarps; ++w) counts[w][me] = 0;
      __syncthreads();
      const uint64_t above = begin >> shift >> 8;
      const int left = wanted;
      for (int i = me; i < n; i += kThreads)
        if (entry[i] >> shift >> 8 == above) atomicAdd(&counts[warp][entry[i] >> shift & 255], 1);
      __syncthreads();
      int own = 0;
      for (int w = 0; w < kWarps; ++w) own += counts[w][me];
      int from = own;  // as many have this digit or a greater one
      for (int by = 1; by < 32; by *= 2) {
        const int other = __shfl_down_sync(0xffffffffu, from, by);
        if (lane + by < 32) from += other;
      }
      if (lane == 0) sums[warp] = from;
      __syncthreads();
      for (int w = warp + 1; w < kWarps; ++w) from += sums[w];
      if (from >= left && from - own < left)
        prefix = begin | uint64_t(me) << shift, wanted = left - (from - own), sums[0] = own;
      __syncthreads();
      begin = prefix;
      if (wanted == sums[0]) break;
    }
    __syncthreads();
    if (me == 0) taken = 0;
    for (int start = 0; start < n; start += kThreads) {  // what is written was read before
      const uint64_t e = start + me < n ? entry[start + me] : 0;
      __syncthreads();
      if (start + me < n && e >= begin) entry[atomicAdd(&taken, 1)] = e, atomicMin(&least, uint32_t(e >> 32));
    }
    __syncthreads();
    return least + 1;  // equal ones of later columns come after them; 0, beyond the largest key: all are offered
  }
};

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads)
    topk_kernel(Arguments a, const float* saved, float* value, int32_t* index, float* belief, int k) {
  constexpr int P = Pack<T>::count;
  __shared__ Held held;
  __shared__ uint64_t sorted[kThreads];
  __shared__ float room[kWarps];
  const int64_t row = blockIdx.x;
  const int me = int(threadIdx.x);
  index += row * k, belief += row * k;
  if (a.target(row) == a.ignore_index) {
    if (me < k) index[me] = -1, belief[me] = 0;
    return;
  }
  const T* x = a.logits.row<T>(row);
  const Span all = {0, int32_t(a.columns)}, packs = packs_of(x, all, true);
  const float margin = kSoftcap ? 1e-6f * a.softcap * a.scale : 0;  // rounded, tanh may fall where it should not
  uint32_t floor = 0;
  auto points = [&](const Pack<T>& pack, float (&z)[P]) {
    unpack(pack, z);
#pragma unroll
    for (int l = 0; l < P; ++l) z[l] = a.z<kSoftcap>(z[l]);
  };
  auto single = [&](int32_t i) {
    const float z[1] = {a.z<kSoftcap>(value_of(x[i]))};
    held.offer(z, i, floor);
  };

  if (me == 0) held.taken = 0;
  __syncthreads();
  if (me < packs.begin) single(me);
  for (int32_t first = packs.begin; first < packs.end; first += kBatch * kStride<T>) {
    const int32_t i = first + me * P;
    const float limit = z_of(floor) - margin;
    Pack<T> pack[kBatch];
    bool any = false;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {  // beyond the last one: that again
      const int32_t j = i + b * kStride<T>;
      pack[b] = load(x + (j < packs.end ? j : packs.end - P));
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float v[P];
      unpack(pack[b], v);
#pragma unroll
      for (int l = 1; l < P; ++l) v[0] = max_or_nan(v[l], v[0]);
      any |= !(a.z<kSoftcap>(v[0]) < limit);  // NaN is looked at
    }
    if (!__syncthreads_or(any)) continue;
#pragma unroll 1
    for (int32_t j = i; j - me * P < packs.end && j < i + kBatch * kStride<T>; j += kStride<T>) {
      float z[P];
      if (j < packs.end) points(load_again(x + j), z), held.offer(z, j, floor);
      if (__syncthreads_or(held.taken > kThreads)) floor = held.keep(k);  // the next ones may not have room
    }
  }
  if (me < all.end - packs.end) single(packs.end + me);
  __syncthreads();
  if (held.taken > k) held.keep(k);

  if (me < k) {
    int rank = 0;
    for (int j = 0; j < k; ++j) rank += held.entry[j] > held.entry[me];
    sorted[rank] = held.entry[me];
  }
  __syncthreads();
  const float z = me < k ? z_of(uint32_t(sorted[me] >> 32)) : 0, top = z_of(uint32_t(sorted[0] >> 32));
  const float e = me < k ? expf(z - top) : 0;
  const float weight = e / sum_over_block(e, room);
  const float logp = (z - saved[kMax * a.rows + row]) - saved[kLogSum * a.rows + row];
  const float total = sum_over_block(weight != 0 ? weight * logp : 0, room);
  if (me < k) index[me] = int32_t(~uint32_t(sorted[me])), belief[me] = weight;
  if (me == 0) value[row] = total;
}

}  // namespace

void topk(const Call& call) {
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
