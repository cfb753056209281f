// Storage types on a GPU: to float, and back rounded to nearest even.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace pu::cuda {

__device__ inline float value_of(float x) { return x; }
__device__ inline float value_of(__half x) { return __half2float(x); }
__device__ inline float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ T stored(float x);
template <> __device__ inline float stored<float>(float x) { return x; }
template <> __device__ inline __half stored<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 stored<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

}  // namespace pu::cuda
