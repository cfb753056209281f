// Token statistics on a CUDA device: what the bindings call. Views are device memory; `stream` is a raw cudaStream_t.
#pragma once
#include <cstdint>

#include "../cpu/token_stats.h"  // Call

namespace pu::cuda {

void accumulate(const cpu::Call&, const Matrix& logits, const Matrix& targets, const Matrix& reference, const Matrix& state,
                bool fresh, void* stream);
void finish(const cpu::Call&, const Matrix& state, const Matrix& targets, bool has_reference, const Matrix& stats,
            const Matrix& saved, void* stream);
void backward(const cpu::Call&, const Matrix& grad_stats, const Matrix& stats, const Matrix& saved, const Matrix& logits,
              const Matrix& targets, const Matrix& reference, const Matrix& grad_logits, void* stream);

}  // namespace pu::cuda
