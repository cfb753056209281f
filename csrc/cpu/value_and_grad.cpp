// Statistics and d(logits) in one pass: a row is still in the cache when its gradient is worked out.
#include <cstring>

#include "../math/token_rule.h"
#include "row.h"
#include "token_stats.h"

namespace pu::cpu {
namespace {

template <class A> void value_and_grad_as(const Call& call) {
  const int64_t pieces = pieces_of(call.logits);
  const Rule<A> rule = {A(call.rule.alpha), A(call.rule.gamma), A(call.rule.beta)};
  parallel(call.logits.rows, call.threads, [&](int64_t row) {
    A up[kOutputCount] = {}, value[kOutputCount] = {}, keep[kSavedCount];
    const int64_t target = target_of(call, row);
    if (target == call.ignore_index) {
      std::memset(call.grad_logits.row(row), 0, call.logits.columns * size_of(call.grad_logits.dtype));
      return write_stats(call, value, row);
    }
    RowState<A> whole = read_piece<A>(call, row, 0, target);
    for (int64_t p = 1; p < pieces; ++p) merge(whole, read_piece<A>(call, row, p, target));
    finish(whole, call.vocabulary, false, value, keep);
    write_stats(call, value, row);
    upstream_of(call, row, up);
    const A weight = rule_weight(rule, keep, bool(call.floor), call.floor ? *call.floor.as<A>(row) : A(0));
    up[kLogp] = times(up[kLogp], weight);
    const RowCoefficients<A> c = row_coefficients(up, value, keep, call.vocabulary);
    for (int64_t p = 0; p < pieces; ++p) write_piece(call, row, p, target, c, Belief{});
  });
}

}  // namespace

const char* value_and_grad(const Call& call) {
  if (call.logits.rows < call.threads) return "fewer rows than threads, which share rows in two passes";
  check_range(call);
  call.logits.dtype == DType::kFloat64 ? value_and_grad_as<double>(call) : value_and_grad_as<float>(call);
  return nullptr;
}

}  // namespace pu::cpu
