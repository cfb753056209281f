// Which chunk belongs to which pair of arrays.
#pragma once
#include "../tensor/call.h"
#include "lanes.h"

namespace pu {

// The last segment that begins at `chunk` or before it; empty segments have no chunk.
PU_FN int64_t segment_of(const Segment* table, int64_t segments, int64_t chunk) {
  int64_t low = 0;
  for (int64_t high = segments; high - low > 1;) {
    const int64_t middle = (low + high) / 2;
    (table[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return low;
}

}  // namespace pu
