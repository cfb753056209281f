// What the token statistics on the CPU share: a row in fixed pieces, and where its statistics lie.
#pragma once
#include <string>

#include "../math/row_state.h"
#include "../math/token_gradient.h"
#include "lane_functions.h"
#include "parallel.h"

namespace pu::cpu {

constexpr int64_t kPiece = 16384;  // columns: 64 KB of float32, well inside L2

inline int64_t target_of(const Call& call, int64_t row) {
  return call.targets.dtype == DType::kInt64 ? *call.targets.as<int64_t>(row) : *call.targets.as<int32_t>(row);
}

inline void check_range(const Call& call) {
  for (int64_t row = 0; row < call.targets.rows; ++row) {
    const int64_t target = target_of(call, row);
    if ((target < 0 || target >= call.vocabulary) && target != call.ignore_index)
      throw std::out_of_range("targets: row " + std::to_string(row) + " holds " + std::to_string(target) +
                              ", needs 0 <= target < " + std::to_string(call.vocabulary) +
                              " or ignore_index=" + std::to_string(call.ignore_index));
  }
}

inline int64_t pieces_of(const Matrix& logits) { return (logits.columns + kPiece - 1) / kPiece; }

inline Piece piece_of(const Call& call, int64_t row, int64_t column, int64_t target) {
  const int64_t left = call.logits.columns - column, n = left < kPiece ? left : kPiece;
  const void *x = call.logits.row(row, column), *r = call.reference ? call.reference.row(row, column) : nullptr;
  return {call.logits.dtype, call.reference.dtype, x, r, n, call.first_column + column, target};
}

template <class A> RowState<A> read_piece(const Call& call, int64_t row, int64_t p, int64_t target) {
  RowState<A> s;
  const bool greedy = call.outputs >> kGreedy & 1;
  lanes().accumulate(call.transform, piece_of(call, row, p * kPiece, target), wants_of(call.outputs), greedy, &s);
  return s;
}

// d(logits) of piece p of a row, into grad_logits.
template <class A>
void write_piece(const Call& call, int64_t row, int64_t p, int64_t target, const RowCoefficients<A>& c,
                 const Belief& belief) {
  const int kind = c.at_target_logq != 0 || c.on_q != 0 ? 2 : c.on_logp != 0 ? 1 : 0;
  lanes().gradient(call.transform, piece_of(call, row, p * kPiece, target), &c, kind, belief,
                   call.grad_logits.row(row, p * kPiece));
}

// The gradients of a row's statistics, by Output; whether there is any.
template <class A> bool upstream_of(const Call& call, int64_t row, A* up) {
  bool wanted = false;
  int64_t line = 0;
  for (int o = 0; o < kOutputCount; ++o) {
    if (!(call.outputs >> o & 1)) continue;
    if (o != kVariance && o != kGreedy) up[o] = call.grad_stats.as<A>(line)[row];
    wanted |= up[o] != 0;
    ++line;
  }
  return wanted;
}

template <class A> void write_stats(const Call& call, const A* value, int64_t row) {
  int64_t line = 0;
  for (int o = 0; o < kOutputCount; ++o)
    if (call.outputs >> o & 1) call.stats.as<A>(line++)[row] = value[o];
}

}  // namespace pu::cpu
