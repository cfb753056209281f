// <a, b>, <a, a> and <b, b> of many pairs on a CUDA device: what the bindings call. All memory is the device's, that of
// the table too.
#pragma once
#include "../tensor/call.h"

namespace pu::cuda {

void segment_dot(const SegmentDot&);

}  // namespace pu::cuda
