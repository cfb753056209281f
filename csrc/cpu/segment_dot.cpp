#include "segment_dot.h"

#include <algorithm>

#include "../math/segments.h"
#include "lane_functions.h"
#include "parallel.h"

namespace pu::cpu {

void segment_dot(const SegmentDot& d) {
  const Segment* segments = d.table.as<Segment>();
  double* partial = d.partials.as<double>();
  parallel(d.partials.rows, d.threads, [&](int64_t i) {
    const Segment& s = segments[segment_of(segments, d.table.rows, i)];
    const int64_t begin = (i - s.first_chunk) * d.chunk;
    const DType a = DType(s.a_type), b = DType(s.b_type);
    lanes().pair_sums(a, reinterpret_cast<const char*>(s.a) + begin * size_of(a), b,
                      reinterpret_cast<const char*>(s.b) + begin * size_of(b), std::min(d.chunk, s.count - begin),
                      partial + 3 * i);
  });
  parallel(d.table.rows, d.threads, [&](int64_t j) {
    const double* first = partial + 3 * segments[j].first_chunk;
    const double* end = first + 3 * ((segments[j].count + d.chunk - 1) / d.chunk);
    double total[3] = {};
    for (const double* p = first; p < end; p += 3)
      for (int k = 0; k < 3; ++k) total[k] += p[k];
    for (int k = 0; k < 3; ++k) d.sums.as<double>(k)[j] = total[k];
  });
}

}  // namespace pu::cpu
