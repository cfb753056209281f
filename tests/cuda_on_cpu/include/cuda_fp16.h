#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

struct __half { uint16_t bits; };
struct __half2 { __half x, y; };

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
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
