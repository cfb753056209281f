// <a, b>, <a, a> and <b, b> of many pairs on a CUDA device: what the bindings call. All memory is the device's, that of
// the table too; `stream` is a raw cudaStream_t.
#pragma once
#include "../cpu/segment_dot.h"

namespace pu::cuda {

void segment_dot(const Matrix& table, int64_t chunk, const Matrix& partials, const Matrix& sums, void* stream);

}  // namespace pu::cuda
