// What the kernels take, one named field an argument: the same structures on the CPU and on a GPU.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "view.h"

namespace pu {

struct Transform {  // z = softcap * tanh(x / softcap) / temperature; softcap 0 = none
  double temperature = 1, softcap = 0;
};

// The coefficients of math/token_rule.h.
template <class A> struct Rule { A alpha = 0, gamma = 0, beta = 0; };

// Of the token statistics; a kernel reads the fields that its declaration names. Shapes were checked, an empty Matrix is
// none. A row is one target; per-row arrays lie with the rows last: (outputs, rows).
struct Call {
  Transform transform;
  int64_t ignore_index = -100;
  uint32_t outputs = 1;                      // bit i: Output i
  int64_t first_column = 0, vocabulary = 0;  // the logits given are columns [first_column, first_column + columns)

  Matrix logits, targets, reference;  // the reference may be of another dtype than the logits
  Matrix state;  // (rows * parts, state_fields()): a row's states lie one after another, parts of its columns in order
  bool fresh = false, has_reference = false;
  Matrix stats, saved;             // (outputs, rows), (kSavedCount, rows)
  Matrix index, belief;            // (rows, k): the top k lanes and their beliefs, float (double for float64 logits)
  Matrix grad_stats, grad_logits;  // (outputs, rows); like logits, and may be logits
  Rule<double> rule;
  Matrix floor;  // (rows, 1), of the rule's sigmoid; none: no sigmoid

  int threads = 1;         // on the CPU
  void* stream = nullptr;  // on a GPU, a raw cudaStream_t
};

// The top k lanes of a row, or from the first row on.
struct Belief {
  const int32_t* index = nullptr;
  const void* weight = nullptr;  // float (double for float64 logits)
  int64_t k = 0;
};

// ---- out = w + scale z, over a table of chunks that covers every parameter -----------------------------------------

// `count` consecutive elements of a parameter, the first of them its logical (global) element `first`. A row of the table.
struct Chunk {
  int64_t source, target;  // addresses of element `first`
  int64_t first, count;
  int64_t id;  // of the parameter; 32 bits
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
  Matrix table;  // (chunks, 5) int64, rows of Chunk
  int threads = 1;
  void* stream = nullptr;

  // (source, target) that are served: the same floating type, a 16-bit type to float32, nothing to float32 or int32;
  // `remove` for float32 in place alone. Throws std::invalid_argument otherwise.
  void check() const {
    const bool half = source == DType::kBFloat16 || source == DType::kFloat16;
    const bool floating = source != DType::kInt32 && source != DType::kInt64;
    const bool served = has_source ? floating && (source == target || (half && target == DType::kFloat32))
                                   : target == DType::kFloat32 || target == DType::kInt32;
    if (!served) throw std::invalid_argument("perturb: this pair of source and target dtypes is not served");
    if (remove.on && !(has_source && source == DType::kFloat32))
      throw std::invalid_argument("perturb: noise can be removed from float32 alone");
  }
};

// ---- <a, b>, <a, a> and <b, b> of many pairs of arrays --------------------------------------------------------------

// A pair of contiguous arrays; a row of the table. Chunks of `chunk` elements are numbered through all segments, a
// segment's last one may be short.
struct Segment {
  int64_t a, b;   // addresses
  int64_t count;  // elements of each
  int64_t first_chunk;
  int64_t a_type, b_type;  // DType: kFloat32, kBFloat16, kFloat16 or kFloat64
};

struct SegmentDot {
  Matrix table;  // (segments, 6) int64, rows of Segment
  int64_t chunk = 0;
  Matrix partials;  // (chunks, 3) float64, room to work in
  Matrix sums;      // (3, segments) float64
  int threads = 1;
  void* stream = nullptr;
};

}  // namespace pu
