// <a, b>, <a, a> and <b, b> of many pairs on the CPU: exact products, summed in double precision in a fixed order. The
// bits do not depend on the threads, nor on the instruction set unless an array is float64.
#pragma once
#include "../tensor/call.h"

namespace pu::cpu {

void segment_dot(const SegmentDot&);

}  // namespace pu::cpu
