// One launch for all chunks of the table, a block each; a thread takes eight elements at a time: 16-byte accesses, two
// Philox calls. Nothing depends on the grid: a chunk says which elements of which parameter it holds.
#include "perturb.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../math/philox.h"
#include "storage.cuh"

namespace pu::cuda {
namespace {

constexpr int kThreads = 256, kGroup = 8;

struct Nothing {};
template <class T> struct alignas(16) Pack { T lane[kGroup]; };
template <> struct Pack<Nothing> {};

// The words of elements i .. i + 7, i a multiple of 8.
__device__ __forceinline__ void words_of(const Perturb& p, const Noise& noise, uint32_t id, int64_t i,
                                         uint32_t (&words)[2][4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint64_t block = uint64_t(i) / 4 + h;
    words[h][0] = uint32_t(block), words[h][1] = uint32_t(block >> 32), words[h][2] = noise.draw, words[h][3] = id;
    philox(words[h], uint32_t(p.seed), uint32_t(p.seed >> 32));
  }
}
__device__ __forceinline__ void normals_of(const Perturb& p, const Noise& noise, uint32_t id, int64_t i,
                                           float (&z)[kGroup]) {
  uint32_t x[2][4];
  words_of(p, noise, id, i, x);
#pragma unroll
  for (int k = 0; k < kGroup; k += 2) box_muller(x[k / 4][k % 4], x[k / 4][k % 4 + 1], z[k], z[k + 1]);
}

template <class S, class T>
__device__ __forceinline__ Pack<T> group(const Perturb& p, uint32_t id, int64_t i, const Pack<S>& from) {
  Pack<T> to;
  if constexpr (std::is_same_v<T, uint32_t>) {
    uint32_t x[2][4];
    words_of(p, p.add, id, i, x);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) to.lane[k] = x[k / 4][k % 4];
    return to;
  } else {
    if constexpr (std::is_same_v<S, T>)
      if (!p.add.on && !p.remove.on) return from;
    float z[kGroup], old[kGroup];
    if (p.add.on) normals_of(p, p.add, id, i, z);
    if constexpr (std::is_same_v<S, float>)
      if (p.remove.on) normals_of(p, p.remove, id, i, old);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if constexpr (std::is_same_v<S, double>) {
        to.lane[k] = from.lane[k] + product(p.add.scale, double(z[k]));
      } else {
        float v = 0;
        if constexpr (!std::is_same_v<S, Nothing>) v = value_of(from.lane[k]);
        if constexpr (std::is_same_v<S, float>)
          if (p.remove.on) v = value_of(stored<__nv_bfloat16>(v - product(float(p.remove.scale), old[k])));
        if (p.add.on) v = v + product(float(p.add.scale), z[k]);
        to.lane[k] = stored<T>(v);
      }
    }
    return to;
  }
}

template <class S, class T> __global__ void __launch_bounds__(kThreads) perturb_kernel(const Chunk* table, Perturb p) {
  constexpr int64_t kSource = std::is_same_v<S, Nothing> ? 0 : sizeof(S), kTarget = sizeof(T);
  const Chunk c = table[blockIdx.x];
  const int64_t end = c.first + c.count;
  const bool aligned = ((c.source - c.first * kSource) | (c.target - c.first * kTarget)) % 16 == 0;
  for (int64_t i = (c.first / kGroup + threadIdx.x) * kGroup; i < end; i += kThreads * kGroup) {
    const S* source = reinterpret_cast<const S*>(c.source + (i - c.first) * kSource);
    T* target = reinterpret_cast<T*>(c.target + (i - c.first) * kTarget);
    Pack<S> from;
    if (aligned && i >= c.first && i + kGroup <= end) {
      if constexpr (kSource > 0) from = *reinterpret_cast<const Pack<S>*>(source);
      *reinterpret_cast<Pack<T>*>(target) = group<S, T>(p, uint32_t(c.id), i, from);
    } else {
      const int low = c.first > i ? int(c.first - i) : 0, high = end - i < kGroup ? int(end - i) : kGroup;
      if constexpr (kSource > 0)
#pragma unroll
        for (int k = 0; k < kGroup; ++k) from.lane[k] = k >= low && k < high ? source[k] : S{};
      const Pack<T> to = group<S, T>(p, uint32_t(c.id), i, from);
#pragma unroll
      for (int k = 0; k < kGroup; ++k)
        if (k >= low && k < high) target[k] = to.lane[k];
    }
  }
}

template <class S, class T> void launch(const Perturb& p) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(p.table.rows)), config.blockDim = dim3(kThreads),
  config.stream = static_cast<cudaStream_t>(p.stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, perturb_kernel<S, T>, p.table.as<const Chunk>(), p);
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace

void perturb(const Perturb& p) {
  p.check();
  if (p.table.rows == 0) return;
  const bool widen = p.source != p.target;
  if (!p.has_source) p.target == DType::kInt32 ? launch<Nothing, uint32_t>(p) : launch<Nothing, float>(p);
  else if (p.source == DType::kBFloat16)
    widen ? launch<__nv_bfloat16, float>(p) : launch<__nv_bfloat16, __nv_bfloat16>(p);
  else if (p.source == DType::kFloat16) widen ? launch<__half, float>(p) : launch<__half, __half>(p);
  else if (p.source == DType::kFloat64) launch<double, double>(p);
  else launch<float, float>(p);
}

}  // namespace pu::cuda
