#pragma once
#include <cstdint>

namespace pu::cpu {

template <class Body> void parallel(int64_t items, int threads, Body body) {
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && items > 1)
#endif
  for (int64_t i = 0; i < items; ++i) body(i);
}

}  // namespace pu::cpu
