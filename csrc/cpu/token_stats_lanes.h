// The part of the CPU token statistics that is compiled once per instruction set: work on one piece of one row.
// Pointers to it are picked once, at run time (token_stats.cpp).
#pragma once
#include <cstdint>

#include "../tensor/view.h"

namespace pu {

struct Transform {  // z = softcap * tanh(x / softcap) / temperature; softcap 0 = none
  double temperature = 1, softcap = 0;
};

// One piece of a row: n logits at x (and r), the first of them being column `first` of the row.
struct Piece {
  DType dtype;
  const void* x;
  const void* r;  // null without a reference
  int64_t n;
  int64_t first;
  int64_t target;  // column in the row
};

struct Belief {  // the top-k lanes of a row
  const int32_t* index;
  const void* weight;  // float (double for float64 logits)
  int64_t k;
};

struct LaneFunctions {
  const char* name;
  // state: RowState<float> (double for float64). wants: the sums to keep (Want).
  void (*accumulate)(const Transform&, const Piece&, unsigned wants, bool greedy, void* state);
  // out may be x. coefficients: RowCoefficients of the same scalar. kind: 0 plain, 1 with log terms, 2 with a reference.
  void (*gradient)(const Transform&, const Piece&, const void* coefficients, int kind, const Belief&, void* out);
  // The k largest z of a whole row in falling order, the lowest column first among equals.
  void (*largest)(const Transform&, const Piece&, int64_t k, int32_t* index, void* z);
};

LaneFunctions portable_lanes();
#if defined(PU_X86)
LaneFunctions avx2_lanes();
LaneFunctions avx512_lanes();
#endif

}  // namespace pu
