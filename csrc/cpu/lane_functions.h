// What is compiled once per instruction set: work on one piece of a row, one chunk, one stretch of two arrays. Pointers
// to it are picked once, at run time (lane_functions.cpp).
#pragma once
#include <cstdint>

#include "../tensor/call.h"

namespace pu {

// One piece of a row: n logits at x (and r), the first of them being column `first` of the row.
struct Piece {
  DType dtype, ref_dtype;
  const void* x;
  const void* r;  // null without a reference
  int64_t n;
  int64_t first;
  int64_t target;  // column in the row
};

struct LaneFunctions {
  const char* name;
  // state: RowState<float> (double for float64). wants: the sums to keep (Want).
  void (*accumulate)(const Transform&, const Piece&, unsigned wants, bool greedy, void* state);
  // out may be x. coefficients: RowCoefficients of the same scalar. kind: 0 plain, 1 with log terms, 2 with a reference.
  void (*gradient)(const Transform&, const Piece&, const void* coefficients, int kind, const Belief&, void* out);
  // The k largest z of a whole row in falling order, the lowest column first among equals.
  void (*largest)(const Transform&, const Piece&, int64_t k, int32_t* index, void* z);
  void (*perturb)(const Perturb&, const Chunk&);
  // <a, b>, <a, a>, <b, b> over n elements.
  void (*pair_sums)(DType a_type, const void* a, DType b_type, const void* b, int64_t n, double* sums);
};

LaneFunctions portable_lanes();
#if defined(PU_X86)
LaneFunctions avx2_lanes();
LaneFunctions avx512_lanes();
#endif
#if defined(PU_LANES)  // a file that is compiled per instruction set
inline namespace PU_ISA {
void perturb_chunk(const Perturb&, const Chunk&);
void pair_sums(DType a_type, const void* a, DType b_type, const void* b, int64_t n, double* sums);
}  // namespace PU_ISA
#endif

namespace cpu {

const LaneFunctions& lanes();  // the instruction set in use
// "auto" or a name; returns what is in use afterwards. Throws on one this CPU lacks.
const char* choose_lanes(const char* name);

}  // namespace cpu
}  // namespace pu
