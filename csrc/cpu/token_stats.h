// Token statistics on the CPU: the three calls the bindings make. All views are on the CPU; shapes were checked.
#pragma once
#include "../tensor/view.h"
#include "token_stats_lanes.h"

namespace pu::cpu {

struct Call {
  Transform transform;
  int64_t ignore_index = -100;
  uint32_t outputs = 1;   // bit i: Output i
  int64_t first_column = 0, vocabulary = 0;  // the logits given are columns [first_column, first_column + columns)
  int threads = 1;
};

// Streaming state of every row, `state` (rows, state_fields()), merged into what it holds unless `fresh`.
// Throws std::out_of_range for a target outside [0, vocabulary).
void accumulate(const Call&, const Matrix& logits, const Matrix& targets, const Matrix& reference, const Matrix& state, bool fresh);
int64_t state_fields();
// Parts a row is best split into for its state. Here threads share a row by themselves.
inline int64_t parts_of(int64_t, int64_t) { return 1; }

// state -> stats (outputs, rows) and saved (kSavedCount, rows). 0 at ignored rows. A row may have several states, one
// after the other (parts of its columns): they merge in that order.
void finish(const Call&, const Matrix& state, const Matrix& targets, bool has_reference, const Matrix& stats, const Matrix& saved);

// Fills the topk row of stats, and index, belief (rows, k). Needs whole rows.
void topk(const Call&, const Matrix& logits, const Matrix& targets, const Matrix& stats, const Matrix& saved, const Matrix& index, const Matrix& belief);

// grad_logits may be logits itself. index and belief may be empty.
void backward(const Call&, const Matrix& grad_stats, const Matrix& stats, const Matrix& saved, const Matrix& logits,
              const Matrix& targets, const Matrix& reference, const Matrix& index, const Matrix& belief, const Matrix& grad_logits);

// The TokenRule of csrc/math/token_rule.h.
struct Rule { double alpha = 0, gamma = 0, beta = 0; };

// Statistics, and d(logits) in grad_logits (which may be logits), with each row read from memory once. weights: (outputs,
// rows), the gradients of the statistics, logp's to be multiplied by the rule. floor: (rows) or empty (no sigmoid). False,
// with nothing done, where two passes serve better.
bool value_and_grad(const Call&, const Rule&, const Matrix& weights, const Matrix& floor, const Matrix& logits, const Matrix& targets,
                    const Matrix& stats, const Matrix& grad_logits);

const LaneFunctions& lanes();              // the instruction set in use
const char* choose_lanes(const char* name);  // "auto" or a name; what is in use afterwards. Throws on one this CPU lacks

}  // namespace pu::cpu
