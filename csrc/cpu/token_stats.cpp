// Rows over threads; a row in fixed pieces, merged left to right: the same bits for any number of threads or rows.
#include "token_stats.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "row.h"

namespace pu::cpu {
namespace {

template <class A> void accumulate_as(const Call& call) {
  const int64_t pieces = pieces_of(call.logits), rows = call.logits.rows;
  auto piece = [&](int64_t row, int64_t p) { return read_piece<A>(call, row, p, target_of(call, row)); };
  auto join = [&](int64_t row, auto next) {
    RowState<A>& state = *call.state.as<RowState<A>>(row);
    RowState<A> total = call.fresh ? RowState<A>::empty(A(0)) : state;
    for (int64_t p = 0; p < pieces; ++p) merge(total, next(p));
    state = total;
  };
  auto ignored = [&](int64_t row) { return target_of(call, row) == call.ignore_index; };
  if (rows >= 4 * call.threads || pieces == 1) {
    parallel(rows, call.threads, [&](int64_t row) {
      if (!ignored(row)) join(row, [&](int64_t p) { return piece(row, p); });
    });
  } else {
    std::unique_ptr<RowState<A>[]> parts(new RowState<A>[rows * pieces]);
    parallel(rows * pieces, call.threads, [&](int64_t i) {
      if (!ignored(i / pieces)) parts[i] = piece(i / pieces, i % pieces);
    });
    for (int64_t row = 0; row < rows; ++row)
      if (!ignored(row)) join(row, [&](int64_t p) { return parts[row * pieces + p]; });
  }
}

template <class A> void finish_as(const Call& call) {
  const int64_t rows = call.targets.rows, parts = rows > 0 ? call.state.rows / rows : 0;
  for (int64_t row = 0; row < rows; ++row) {
    A value[kOutputCount] = {}, keep[kSavedCount] = {};
    if (target_of(call, row) != call.ignore_index) {
      RowState<A> whole = *call.state.as<RowState<A>>(row * parts);
      for (int64_t part = 1; part < parts; ++part) merge(whole, *call.state.as<RowState<A>>(row * parts + part));
      finish(whole, call.vocabulary, call.has_reference, value, keep);
    }
    write_stats(call, value, row);
    for (int k = 0; k < kSavedCount; ++k) call.saved.as<A>(k)[row] = keep[k];
  }
}

template <class A> void backward_as(const Call& call) {
  const int64_t pieces = pieces_of(call.logits), rows = call.logits.rows;
  auto piece = [&](int64_t row, int64_t p) {
    A up[kOutputCount] = {}, value[kOutputCount] = {}, keep[kSavedCount];
    const int64_t target = target_of(call, row);
    if (!upstream_of(call, row, up) || target == call.ignore_index) {
      const int64_t count = std::min(kPiece, call.logits.columns - p * kPiece);
      std::memset(call.grad_logits.row(row, p * kPiece), 0, count * size_of(call.grad_logits.dtype));
      return;
    }
    int64_t line = 0;
    for (int o = 0; o < kOutputCount; ++o)
      if (call.outputs >> o & 1) value[o] = call.stats.as<A>(line++)[row];
    for (int k = 0; k < kSavedCount; ++k) keep[k] = call.saved.as<A>(k)[row];
    Belief b;
    if (call.index && up[kTopk] != 0) b = {call.index.as<int32_t>(row), call.belief.as<A>(row), call.index.columns};
    write_piece(call, row, p, target, row_coefficients(up, value, keep, call.vocabulary), b);
  };
  if (rows >= 4 * call.threads || pieces == 1)
    parallel(rows, call.threads, [&](int64_t row) {
      for (int64_t p = 0; p < pieces; ++p) piece(row, p);
    });
  else parallel(rows * pieces, call.threads, [&](int64_t i) { piece(i / pieces, i % pieces); });
}

}  // namespace

int output_count() { return kOutputCount; }

int64_t state_fields() { return sizeof(RowState<float>) / sizeof(float); }

void accumulate(const Call& call) {
  if (call.fresh) check_range(call);
  call.logits.dtype == DType::kFloat64 ? accumulate_as<double>(call) : accumulate_as<float>(call);
}
void finish(const Call& call) {
  call.state.dtype == DType::kFloat64 ? finish_as<double>(call) : finish_as<float>(call);
}
void backward(const Call& call) {
  call.logits.dtype == DType::kFloat64 ? backward_as<double>(call) : backward_as<float>(call);
}

}  // namespace pu::cpu
