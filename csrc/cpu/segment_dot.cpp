#include "segment_dot.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "token_stats.h"  // the instruction set in use

namespace pu::cpu {

void segment_dot(const Matrix& table, int64_t chunk, const Matrix& partials, const Matrix& sums, int threads) {
  PairSums pair_sums = portable_pair_sums();
#if defined(PU_X86)
  if (std::strcmp(lanes().name, "avx2") == 0) pair_sums = avx2_pair_sums();
  if (std::strcmp(lanes().name, "avx512") == 0) pair_sums = avx512_pair_sums();
#endif
  const Segment* segments = table.as<Segment>();
  double* partial = partials.as<double>();
  parallel(partials.rows, threads, [&](int64_t i) {
    const Segment& s = segments[segment_of(segments, table.rows, i)];
    const int64_t begin = (i - s.first_chunk) * chunk;
    const DType a = DType(s.a_type), b = DType(s.b_type);
    pair_sums(a, reinterpret_cast<const char*>(s.a) + begin * size_of(a), b, reinterpret_cast<const char*>(s.b) + begin * size_of(b),
              std::min(chunk, s.count - begin), partial + 3 * i);
  });
  parallel(table.rows, threads, [&](int64_t j) {
    const double* first = partial + 3 * segments[j].first_chunk;
    const double* end = first + 3 * ((segments[j].count + chunk - 1) / chunk);
    double total[3] = {};
    for (const double* p = first; p < end; p += 3)
      for (int k = 0; k < 3; ++k) total[k] += p[k];
    for (int k = 0; k < 3; ++k) sums.as<double>(k)[j] = total[k];
  });
}

}  // namespace pu::cpu
