// Rows over threads; a row in fixed pieces, merged left to right: the same bits for any number of threads or rows.
#include "token_stats.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "../math/row_state.h"
#include "../math/token_gradient.h"
#include "../math/token_rule.h"
#include "parallel.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pu::cpu {
namespace {

constexpr int64_t kPiece = 16384;  // columns: 64 KB of float32, well inside L2

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

int64_t target_of(const Matrix& targets, int64_t i) {
  return targets.dtype == DType::kInt64 ? *targets.as<int64_t>(i) : *targets.as<int32_t>(i);
}

void check_range(const Call& call, const Matrix& targets) {
  for (int64_t row = 0; row < targets.rows; ++row) {
    const int64_t target = target_of(targets, row);
    if ((target < 0 || target >= call.vocabulary) && target != call.ignore_index)
      throw std::out_of_range("targets: row " + std::to_string(row) + " holds " + std::to_string(target) + ", needs 0 <= target < " +
                              std::to_string(call.vocabulary) + " or ignore_index=" + std::to_string(call.ignore_index));
  }
}

// Fresh memory is first touched here: huge pages spare one page fault in 4 KB of it.
void advise(const Matrix& m) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2u << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(m.data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(m.data) + m.rows * m.columns * size_of(m.dtype)) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)m;
#endif
}

Piece piece_of(const Call& call, const Matrix& logits, const Matrix& reference, int64_t row, int64_t column, int64_t target) {
  const int64_t n = logits.columns - column < kPiece ? logits.columns - column : kPiece;
  return {logits.dtype, logits.row(row, column), reference ? reference.row(row, column) : nullptr, n, call.first_column + column, target};
}

int64_t pieces_of(const Matrix& logits) { return (logits.columns + kPiece - 1) / kPiece; }

template <class A> RowState<A> read_piece(const Call& call, const Matrix& logits, const Matrix& reference, int64_t row, int64_t p, int64_t target) {
  RowState<A> s;
  const bool greedy = call.outputs >> kGreedy & 1;
  lanes().accumulate(call.transform, piece_of(call, logits, reference, row, p * kPiece, target), wants_of(call.outputs), greedy, &s);
  return s;
}

// d(logits) of piece p of a row, into `grad`.
template <class A>
void write_piece(const Call& call, const Matrix& logits, const Matrix& reference, int64_t row, int64_t p, int64_t target, const RowCoefficients<A>& c,
                 const Belief& belief, const Matrix& grad) {
  const int kind = c.on_logq != 0 || c.on_q != 0 ? 2 : c.on_logp != 0 ? 1 : 0;
  lanes().gradient(call.transform, piece_of(call, logits, reference, row, p * kPiece, target), &c, kind, belief, grad.row(row, p * kPiece));
}

// The gradients of a row's statistics, by Output; whether there is any.
template <class A> bool upstream_of(const Call& call, const Matrix& grad_stats, int64_t row, A* up) {
  bool wanted = false;
  int64_t line = 0;
  for (int o = 0; o < kOutputCount; ++o) {
    if (!(call.outputs >> o & 1)) continue;
    if (o != kVariance && o != kGreedy) up[o] = grad_stats.as<A>(line)[row];
    wanted |= up[o] != 0;
    ++line;
  }
  return wanted;
}

template <class A> void write_stats(const Call& call, const A* value, const Matrix& stats, int64_t row) {
  int64_t line = 0;
  for (int o = 0; o < kOutputCount; ++o)
    if (call.outputs >> o & 1) stats.as<A>(line++)[row] = value[o];
}

template <class A>
void accumulate_as(const Call& call, const Matrix& logits, const Matrix& targets, const Matrix& reference, const Matrix& state, bool fresh) {
  const int64_t pieces = pieces_of(logits), rows = logits.rows;
  auto piece = [&](int64_t row, int64_t p) { return read_piece<A>(call, logits, reference, row, p, target_of(targets, row)); };
  auto join = [&](int64_t row, auto next) {
    RowState<A> total = fresh ? RowState<A>::empty(A(0)) : *state.as<RowState<A>>(row);
    for (int64_t p = 0; p < pieces; ++p) merge(total, next(p));
    *state.as<RowState<A>>(row) = total;
  };
  auto ignored = [&](int64_t row) { return target_of(targets, row) == call.ignore_index; };
  if (rows >= 4 * call.threads || pieces == 1) {
    parallel(rows, call.threads, [&](int64_t row) {
      if (!ignored(row)) join(row, [&](int64_t p) { return piece(row, p); });
    });
  } else {
    std::unique_ptr<RowState<A>[]> parts(new RowState<A>[rows * pieces]);
    parallel(rows * pieces, call.threads, [&](int64_t i) { if (!ignored(i / pieces)) parts[i] = piece(i / pieces, i % pieces); });
    for (int64_t row = 0; row < rows; ++row)
      if (!ignored(row)) join(row, [&](int64_t p) { return parts[row * pieces + p]; });
  }
}

template <class A>
void finish_as(const Call& call, const Matrix& state, const Matrix& targets, bool has_reference, const Matrix& stats, const Matrix& saved) {
  const int64_t parts = targets.rows > 0 ? state.rows / targets.rows : 0;
  for (int64_t row = 0; row < targets.rows; ++row) {
    A value[kOutputCount] = {}, keep[kSavedCount] = {};
    if (target_of(targets, row) != call.ignore_index) {
      RowState<A> whole = *state.as<RowState<A>>(row * parts);
      for (int64_t part = 1; part < parts; ++part) merge(whole, *state.as<RowState<A>>(row * parts + part));
      finish(whole, call.vocabulary, has_reference, value, keep);
    }
    write_stats(call, value, stats, row);
    for (int k = 0; k < kSavedCount; ++k) saved.as<A>(k)[row] = keep[k];
  }
}

template <class A>
void topk_as(const Call& call, const Matrix& logits, const Matrix& targets, const Matrix& stats, const Matrix& saved, const Matrix& index, const Matrix& belief) {
  const int64_t k = index.columns;
  A* value = stats.as<A>(__builtin_popcount(call.outputs & ((1u << kTopk) - 1)));
  parallel(logits.rows, call.threads, [&](int64_t row) {
    int32_t* j = index.as<int32_t>(row);
    A* b = belief.as<A>(row);
    if (target_of(targets, row) == call.ignore_index) {
      for (int64_t i = 0; i < k; ++i) j[i] = -1, b[i] = 0;
      return;
    }
    lanes().largest(call.transform, {logits.dtype, logits.row(row), nullptr, logits.columns, 0, 0}, k, j, b);
    const A top = b[0], max = saved.as<A>(kMax)[row], log_sum = saved.as<A>(kLogSum)[row];
    A total = 0, sum = 0;
    for (int64_t i = 0; i < k; ++i) total += exp(b[i] - top);
    for (int64_t i = 0; i < k; ++i) {
      const A weight = exp(b[i] - top) / total;
      if (weight > 0) sum += weight * ((b[i] - max) - log_sum);
      b[i] = weight;
    }
    value[row] = sum;
  });
}

template <class A>
void backward_as(const Call& call, const Matrix& grad_stats, const Matrix& stats, const Matrix& saved, const Matrix& logits,
                 const Matrix& targets, const Matrix& reference, const Matrix& index, const Matrix& belief, const Matrix& grad) {
  const int64_t pieces = pieces_of(logits), rows = logits.rows;
  auto piece = [&](int64_t row, int64_t p) {
    A up[kOutputCount] = {}, value[kOutputCount] = {}, keep[kSavedCount];
    const int64_t target = target_of(targets, row);
    if (!upstream_of(call, grad_stats, row, up) || target == call.ignore_index) {
      std::memset(grad.row(row, p * kPiece), 0, std::min(kPiece, logits.columns - p * kPiece) * size_of(grad.dtype));
      return;
    }
    int64_t line = 0;
    for (int o = 0; o < kOutputCount; ++o)
      if (call.outputs >> o & 1) value[o] = stats.as<A>(line++)[row];
    for (int k = 0; k < kSavedCount; ++k) keep[k] = saved.as<A>(k)[row];
    Belief b = {nullptr, nullptr, 0};
    if (index && up[kTopk] != 0) b = {index.as<int32_t>(row), belief.as<A>(row), index.columns};
    write_piece(call, logits, reference, row, p, target, row_coefficients(up, value, keep, call.vocabulary), b, grad);
  };
  if (rows >= 4 * call.threads || pieces == 1)
    parallel(rows, call.threads, [&](int64_t row) { for (int64_t p = 0; p < pieces; ++p) piece(row, p); });
  else
    parallel(rows * pieces, call.threads, [&](int64_t i) { piece(i / pieces, i % pieces); });
}

// A row at a time: it is still in the cache when its gradient is worked out.
template <class A>
void value_and_grad_as(const Call& call, const Rule& rule, const Matrix& weights, const Matrix& floor, const Matrix& logits, const Matrix& targets,
                       const Matrix& stats, const Matrix& grad) {
  const int64_t pieces = pieces_of(logits);
  parallel(logits.rows, call.threads, [&](int64_t row) {
    A up[kOutputCount] = {}, value[kOutputCount] = {}, keep[kSavedCount];
    const int64_t target = target_of(targets, row);
    if (target == call.ignore_index) {
      std::memset(grad.row(row), 0, logits.columns * size_of(grad.dtype));
      return write_stats(call, value, stats, row);
    }
    RowState<A> whole = read_piece<A>(call, logits, Matrix{}, row, 0, target);
    for (int64_t p = 1; p < pieces; ++p) merge(whole, read_piece<A>(call, logits, Matrix{}, row, p, target));
    finish(whole, call.vocabulary, false, value, keep);
    write_stats(call, value, stats, row);
    upstream_of(call, weights, row, up);
    const TokenRule<A> as = {A(rule.alpha), A(rule.gamma), A(rule.beta)};
    up[kLogp] = times(up[kLogp], rule_weight(as, keep, bool(floor), floor ? *floor.as<A>(row) : A(0)));
    const RowCoefficients<A> c = row_coefficients(up, value, keep, call.vocabulary);
    for (int64_t p = 0; p < pieces; ++p) write_piece(call, logits, Matrix{}, row, p, target, c, Belief{nullptr, nullptr, 0}, grad);
  });
}

}  // namespace

const LaneFunctions& lanes() { return chosen(); }

const char* choose_lanes(const char* name) {
  const std::string wanted = name;
  LaneFunctions functions = best_lanes();
  if (wanted == "portable") functions = portable_lanes();
#if defined(PU_X86)
  else if (wanted == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) functions = avx2_lanes();
#endif
  else if (wanted != "auto" && wanted != functions.name)
    throw std::invalid_argument("instruction set '" + wanted + "': this CPU has " + functions.name + "; choose auto, portable or avx2");
  chosen() = functions;
  return chosen().name;
}

int64_t state_fields() { return sizeof(RowState<float>) / sizeof(float); }

void accumulate(const Call& call, const Matrix& logits, const Matrix& targets, const Matrix& reference, const Matrix& state, bool fresh) {
  if (fresh) check_range(call, targets);
  if (logits.dtype == DType::kFloat64) accumulate_as<double>(call, logits, targets, reference, state, fresh);
  else accumulate_as<float>(call, logits, targets, reference, state, fresh);
}
void finish(const Call& call, const Matrix& state, const Matrix& targets, bool has_reference, const Matrix& stats, const Matrix& saved) {
  if (state.dtype == DType::kFloat64) finish_as<double>(call, state, targets, has_reference, stats, saved);
  else finish_as<float>(call, state, targets, has_reference, stats, saved);
}
void topk(const Call& call, const Matrix& logits, const Matrix& targets, const Matrix& stats, const Matrix& saved, const Matrix& index, const Matrix& belief) {
  if (logits.dtype == DType::kFloat64) topk_as<double>(call, logits, targets, stats, saved, index, belief);
  else topk_as<float>(call, logits, targets, stats, saved, index, belief);
}
void backward(const Call& call, const Matrix& grad_stats, const Matrix& stats, const Matrix& saved, const Matrix& logits,
              const Matrix& targets, const Matrix& reference, const Matrix& index, const Matrix& belief, const Matrix& grad_logits) {
  if (grad_logits.data != logits.data) advise(grad_logits);
  if (logits.dtype == DType::kFloat64) backward_as<double>(call, grad_stats, stats, saved, logits, targets, reference, index, belief, grad_logits);
  else backward_as<float>(call, grad_stats, stats, saved, logits, targets, reference, index, belief, grad_logits);
}

bool value_and_grad(const Call& call, const Rule& rule, const Matrix& weights, const Matrix& floor, const Matrix& logits, const Matrix& targets,
                    const Matrix& stats, const Matrix& grad_logits) {
  if (logits.rows < call.threads) return false;  // two passes split the rows
  check_range(call, targets);
  if (grad_logits.data != logits.data) advise(grad_logits);
  if (logits.dtype == DType::kFloat64) value_and_grad_as<double>(call, rule, weights, floor, logits, targets, stats, grad_logits);
  else value_and_grad_as<float>(call, rule, weights, floor, logits, targets, stats, grad_logits);
  return true;
}

}  // namespace pu::cpu
