// Storage types on a GPU: to float, and back rounded to nearest even.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../math/lanes.h"

namespace pu::cuda {

__device__ inline float value_of(float x) { return x; }
__device__ inline float value_of(__half x) { return __half2float(x); }
__device__ inline float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ T stored(float x);
template <> __device__ inline float stored<float>(float x) { return x; }
template <> __device__ inline __half stored<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 stored<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// The values that a 32-bit word holds, the lower address first: an instruction each.
__device__ inline void values_of(uint32_t word, float (&v)[1], float) { v[0] = bits_of<float>(word); }
__device__ inline void values_of(uint32_t word, float (&v)[2], __nv_bfloat16) {
  v[0] = bits_of<float>(word << 16), v[1] = bits_of<float>(word & 0xffff0000u);
}
__device__ inline void values_of(uint32_t word, float (&v)[2], __half) {
  v[0] = __low2float(bits_of<__half2>(word)), v[1] = __high2float(bits_of<__half2>(word));
}
__device__ inline uint32_t word_of(const float (&v)[1], float) { return bits_of<uint32_t>(v[0]); }
__device__ inline uint32_t word_of(const float (&v)[2], __nv_bfloat16) {
  return bits_of<uint32_t>(__floats2bfloat162_rn(v[0], v[1]));
}
__device__ inline uint32_t word_of(const float (&v)[2], __half) {
  return bits_of<uint32_t>(__floats2half2_rn(v[0], v[1]));
}

}  // namespace pu::cuda
