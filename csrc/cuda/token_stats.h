// Token statistics on a CUDA device: what the bindings call, with the fields of Call as on the CPU. Views are device
// memory.
#pragma once
#include "../tensor/call.h"

namespace pu::cuda {

struct OnDevice {  // makes a device current for as long as it lives
  explicit OnDevice(int device);
  ~OnDevice();
  int before = 0;
};

// Parts a row of `columns` is best split into for its state; backward splits rows the same way.
int64_t parts_of(int64_t rows, int64_t columns);

void accumulate(const Call&);  // each part's columns follow from its number
void finish(const Call&);
void topk(const Call&);
void backward(const Call&);

// The row is in the shared memory of a cluster: 2 N V of traffic. Returns why this device or a row this long does not
// allow it, with nothing done, or null.
const char* value_and_grad(const Call&);

}  // namespace pu::cuda
