// w + scale z on the CPU: what the bindings call. The bits do not depend on the instruction set, the chunks or the threads.
#pragma once
#include "../tensor/call.h"

namespace pu::cpu {

void perturb(const Perturb&);

}  // namespace pu::cpu
