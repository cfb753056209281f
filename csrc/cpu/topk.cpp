// The k largest logits of every row, in falling order, the lowest column first among equals, and the topk statistic.
#include "row.h"
#include "token_stats.h"

namespace pu::cpu {
namespace {

template <class A> void topk_as(const Call& call) {
  const int64_t k = call.index.columns;
  A* value = call.stats.as<A>(__builtin_popcount(call.outputs & ((1u << kTopk) - 1)));
  parallel(call.logits.rows, call.threads, [&](int64_t row) {
    int32_t* j = call.index.as<int32_t>(row);
    A* b = call.belief.as<A>(row);
    if (target_of(call, row) == call.ignore_index) {
      for (int64_t i = 0; i < k; ++i) j[i] = -1, b[i] = 0;
      return;
    }
    lanes().largest(call.transform, {call.logits.dtype, {}, call.logits.row(row), nullptr, call.logits.columns, 0, 0},
                    k, j, b);
    const A top = b[0], max = call.saved.as<A>(kMax)[row], log_sum = call.saved.as<A>(kLogSum)[row];
    A total = 0, sum = 0;
    for (int64_t i = 0; i < k; ++i) total += exp(b[i] - top);
    for (int64_t i = 0; i < k; ++i) {
      const A weight = exp(b[i] - top) / total;
      if (weight != 0) sum += weight * ((b[i] - max) - log_sum);
      b[i] = weight;
    }
    value[row] = sum;
  });
}

}  // namespace

void topk(const Call& call) { call.logits.dtype == DType::kFloat64 ? topk_as<double>(call) : topk_as<float>(call); }

}  // namespace pu::cpu
