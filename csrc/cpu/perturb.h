// out = w + scale z, in one pass over a table of chunks that covers every parameter.
#pragma once
#include <cstdint>

#include "../tensor/view.h"

namespace pu {

// `count` consecutive elements of a parameter, the first of them its logical (global) element `first`. A row of the table.
struct Chunk {
  int64_t source, target;  // addresses of element `first`
  int64_t first, count;
  int64_t id;              // of the parameter; 32 bits
};

struct Noise {  // scale z, z being draw `draw`
  bool on = false;
  uint32_t draw = 0;
  double scale = 0;
};

// value = source, or nothing; `remove`: value = bfloat16(value - noise), which undoes an earlier `add` to a weight that
// was a bfloat16 number; `add`: value = value + noise; target = value. With neither it copies, bit by bit. The noise is
// float32 and rounded apart from the sum. A target of type kInt32 gets the Philox words themselves.
struct Perturb {
  uint64_t seed = 0;
  bool has_source = false;
  DType source = DType::kFloat32, target = DType::kFloat32;
  Noise remove, add;
};

// (source, target) that are served: the same floating type, a 16-bit type to float32, nothing to float32 or int32;
// `remove` for float32 in place alone. Throws std::invalid_argument otherwise.
inline void check(const Perturb& p) {
  const bool half = p.source == DType::kBFloat16 || p.source == DType::kFloat16;
  const bool floating = p.source != DType::kInt32 && p.source != DType::kInt64;
  const bool served = p.has_source ? floating && (p.source == p.target || (half && p.target == DType::kFloat32))
                                   : p.target == DType::kFloat32 || p.target == DType::kInt32;
  if (!served) throw std::invalid_argument("perturb: this pair of source and target dtypes is not served");
  if (p.remove.on && !(p.has_source && p.source == DType::kFloat32))
    throw std::invalid_argument("perturb: noise can be removed from float32 alone");
}

namespace cpu {

// `table`: (chunks, 5) int64, rows of Chunk. The bits do not depend on the instruction set, the chunks or the threads.
void perturb(const Perturb&, const Matrix& table, int threads);

}  // namespace cpu

using PerturbChunk = void (*)(const Perturb&, const Chunk&);
PerturbChunk portable_perturb();
#if defined(PU_X86)
PerturbChunk avx2_perturb();
PerturbChunk avx512_perturb();
#endif

}  // namespace pu
