// Token statistics on the CPU: what the bindings call. The fields of Call that a kernel reads and writes stand beside it.
#pragma once
#include "../tensor/call.h"

namespace pu::cpu {

// logits, targets, reference -> state, merged into what it holds unless `fresh`. Throws std::out_of_range for a target
// outside [0, vocabulary).
void accumulate(const Call&);
int64_t state_fields();
int output_count();  // of the bits of Call::outputs
// Parts a row is best split into for its state. Here threads share a row by themselves.
inline int64_t parts_of(int64_t, int64_t) { return 1; }

// state, targets, has_reference -> stats, saved; 0 at ignored rows. The states of a row merge in their order.
void finish(const Call&);

// logits, targets, saved -> the topk row of stats, index, belief. Needs whole rows.
void topk(const Call&);

// grad_stats, stats, saved, logits, targets, reference, index, belief -> grad_logits.
void backward(const Call&);

// logits, targets, grad_stats, logp's to be multiplied by `rule` and `floor` -> stats, grad_logits, with each row read
// from memory once. Returns why two passes serve better, with nothing done, or null.
const char* value_and_grad(const Call&);

}  // namespace pu::cpu
