// Token statistics on a CUDA device: what the bindings call. Views are device memory; `stream` is a raw cudaStream_t.
#pragma once
#include <cstdint>

#include "../cpu/token_stats.h"  // Call

namespace pu::cuda {

struct OnDevice {  // makes a device current for as long as it lives
  explicit OnDevice(int device);
  ~OnDevice();
  int before = 0;
};

// Parts a row of `columns` is best split into for its state; backward splits rows the same way.
int64_t parts_of(int64_t rows, int64_t columns);

// state: (rows * parts, fields); each part's columns follow from their number.
void accumulate(const cpu::Call&, const Matrix& logits, const Matrix& targets, const Matrix& reference, const Matrix& state,
                bool fresh, void* stream);
void finish(const cpu::Call&, const Matrix& state, const Matrix& targets, bool has_reference, const Matrix& stats,
            const Matrix& saved, void* stream);
void topk(const cpu::Call&, const Matrix& logits, const Matrix& targets, const Matrix& stats, const Matrix& saved,
          const Matrix& index, const Matrix& belief, void* stream);
void backward(const cpu::Call&, const Matrix& grad_stats, const Matrix& stats, const Matrix& saved, const Matrix& logits,
              const Matrix& targets, const Matrix& reference, const Matrix& index, const Matrix& belief,
              const Matrix& grad_logits, void* stream);

// As on the CPU, the row in the shared memory of a cluster: 2 N V of traffic. False where this device or a row this long
// does not allow it.
bool value_and_grad(const cpu::Call&, const cpu::Rule&, const Matrix& weights, const Matrix& floor, const Matrix& logits,
                    const Matrix& targets, const Matrix& stats, const Matrix& grad_logits, void* stream);

}  // namespace pu::cuda
