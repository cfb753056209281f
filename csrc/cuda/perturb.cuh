// w + scale z on a CUDA device: what the bindings call. The table is device memory; `stream` is a raw cudaStream_t.
#pragma once
#include "../cpu/perturb.h"

namespace pu::cuda {

void perturb(const Perturb&, const Matrix& table, void* stream);

}  // namespace pu::cuda
