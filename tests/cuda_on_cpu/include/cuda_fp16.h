#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

struct __half { uint16_t bits; };

#if defined(__F16C__)
inline float __half2float(__half v) { return _cvtsh_ss(v.bits); }
inline __half __float2half_rn(float x) { return {uint16_t(_cvtss_sh(x, 0))}; }
#else  // Arm
inline float __half2float(__half v) {
  __fp16 h;
  std::memcpy(&h, &v, 2);
  return h;
}
inline __half __float2half_rn(float x) {
  const __fp16 h = __fp16(x);
  __half v;
  std::memcpy(&v, &h, 2);
  return v;
}
#endif
