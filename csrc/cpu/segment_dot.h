// <a, b>, <a, a> and <b, b> of many pairs of arrays: exact products, summed in double precision in a fixed order.
#pragma once
#include <cstdint>

#include "../math/lanes.h"
#include "../tensor/view.h"

namespace pu {

// A pair of contiguous arrays; a row of the table. Chunks of `chunk` elements are numbered through all segments, a
// segment's last one may be short.
struct Segment {
  int64_t a, b;            // addresses
  int64_t count;           // elements of each
  int64_t first_chunk;
  int64_t a_type, b_type;  // DType: kFloat32, kBFloat16, kFloat16 or kFloat64
};

// The last segment that begins at `chunk` or before it; empty segments have no chunk.
PU_FN int64_t segment_of(const Segment* table, int64_t segments, int64_t chunk) {
  int64_t low = 0;
  for (int64_t high = segments; high - low > 1;) {
    const int64_t middle = (low + high) / 2;
    (table[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return low;
}

namespace cpu {

// table: (segments, 6) int64, rows of Segment. partials: (chunks, 3) float64, room to work in. sums: (3, segments)
// float64. The bits do not depend on the threads, nor on the instruction set unless an array is float64.
void segment_dot(const Matrix& table, int64_t chunk, const Matrix& partials, const Matrix& sums, int threads);

}  // namespace cpu

// The three sums over n elements.
using PairSums = void (*)(DType a_type, const void* a, DType b_type, const void* b, int64_t n, double* sums);
PairSums portable_pair_sums();
#if defined(PU_X86)
PairSums avx2_pair_sums();
PairSums avx512_pair_sums();
#endif

}  // namespace pu
