#include "lane_functions.h"

#include <string>

namespace pu::cpu {
namespace {

LaneFunctions best_lanes() {
#if defined(PU_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return avx512_lanes();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_lanes();
#endif
  return portable_lanes();
}
LaneFunctions& chosen() {
  static LaneFunctions functions = best_lanes();
  return functions;
}

}  // namespace

const LaneFunctions& lanes() { return chosen(); }

const char* choose_lanes(const char* name) {
  const std::string wanted = name;
  LaneFunctions functions = best_lanes();
  if (wanted == "portable") functions = portable_lanes();
#if defined(PU_X86)
  else if (wanted == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    functions = avx2_lanes();
#endif
  else if (wanted != "auto" && wanted != functions.name)
    throw std::invalid_argument("instruction set '" + wanted + "': this CPU has " + functions.name +
                                "; choose auto, portable or avx2");
  chosen() = functions;
  return chosen().name;
}

}  // namespace pu::cpu
