// w + scale z on a CUDA device: what the bindings call. The table is device memory.
#pragma once
#include "../tensor/call.h"

namespace pu::cuda {

void perturb(const Perturb&);

}  // namespace pu::cuda
