// Kernels that a GPU would hang on, fail at or compute something else with: the launch says what is wrong.
#include <cooperative_groups.h>

#include <cstdio>

namespace {

void unwritten(float* out) {
  __shared__ float room[4], other;
  if (threadIdx.x == 0) room[0] = 1, other = 2;
  __syncthreads();
  out[0] = room[0] + other, out[1] = room[3];  // room[3]: NaN
}
void of_an_ended_thread(float* out) {
  if (threadIdx.x == 1) return;
  const float v = __shfl_xor_sync(0xffffffffu, 1.0f, 1);  // thread 0 reads thread 1's
  if (threadIdx.x == 0) *out = v;
}
void half_a_warp_at_a_barrier(float*) {
  if (threadIdx.x % 32 < 16) __syncthreads();
  else __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
void two_barriers(float*) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
}
void arrives_alone(float*) { cooperative_groups::this_cluster().barrier_arrive(); }
void waits_alone(float*) { cooperative_groups::this_cluster().barrier_wait(); }
void arrives_twice(float*) {
  cooperative_groups::this_cluster().barrier_arrive();
  cooperative_groups::this_cluster().barrier_arrive();
}
void one_block_fails(float*) {
  if (blockIdx.y == 1) cooperative_groups::this_cluster().barrier_wait();
  cooperative_groups::this_cluster().sync();
}
void exchanges(float* out) {  // right: every block gets the sum over its cluster
  __shared__ float mine;
  if (threadIdx.x == 0) mine = float(blockIdx.y + 1);
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  float sum = 0;
  for (unsigned rank = 0; rank < gridDim.y; ++rank) sum += *cluster.map_shared_rank(&mine, rank);
  cluster.barrier_arrive();
  if (threadIdx.x == 0) out[blockIdx.y] = sum;
  cluster.barrier_wait();
}
void copies(float* out) {  // reads 1.5 after the wait; what was there before it is NaN
  PU_DYNAMIC_SHARED(memory);
  __shared__ pu::cuda::Arrival arrival;
  alignas(16) static const float source[4] = {1.5f, 2, 3, 4};
  const float* brought = reinterpret_cast<const float*>(memory);
  if (threadIdx.x == 0) arrival.prepare(), arrival.publish(), arrival.copy(memory, source, 16);
  __syncthreads();
  if (threadIdx.x != 0) return;
  out[1] = brought[0];
  arrival.wait();
  out[0] = brought[0], out[2] = brought[3];
}
void copies_unprepared(float*) {
  PU_DYNAMIC_SHARED(memory);
  __shared__ pu::cuda::Arrival arrival;
  alignas(16) static const float source[4] = {};
  if (threadIdx.x == 0) arrival.copy(memory, source, 16);
}
void copies_odd_bytes(float*) {
  PU_DYNAMIC_SHARED(memory);
  __shared__ pu::cuda::Arrival arrival;
  alignas(16) static const float source[4] = {};
  if (threadIdx.x == 0) arrival.prepare(), arrival.copy(memory, source, 12);
}
void waits_for_no_copy(float*) {
  __shared__ pu::cuda::Arrival arrival;
  arrival.wait();
}
void nothing(float*) {}

void launch(const char* name, void (*kernel)(float*), dim3 grid = dim3(1), unsigned cluster = 1, size_t shared = 0) {
  float out[4] = {0, 0, 0, 0};
  cudaLaunchAttribute attribute{cudaLaunchAttributeClusterDimension, {{1, cluster, 1}}};
  const cudaLaunchConfig_t config{grid, dim3(64), shared, nullptr, &attribute, cluster > 1 ? 1u : 0u};
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<float*>(out));
  if (error != cudaSuccess) std::printf("%s: %s\n", name, cudaGetErrorString(error));
  else std::printf("%s: %g %g %g %g\n", name, double(out[0]), double(out[1]), double(out[2]), double(out[3]));
}

}  // namespace

int main() {
  launch("unwritten", unwritten), launch("unwritten again", unwritten, dim3(3));
  launch("of an ended thread", of_an_ended_thread);
  launch("half a warp", half_a_warp_at_a_barrier);
  launch("two barriers", two_barriers);
  launch("arrives alone", arrives_alone), launch("waits alone", waits_alone), launch("arrives twice", arrives_twice);
  launch("one block fails", one_block_fails, dim3(1, 2), 2);
  launch("exchanges", exchanges, dim3(2, 4), 4);
  launch("copies", copies, dim3(1), 1, 16), launch("copies unprepared", copies_unprepared, dim3(1), 1, 16);
  launch("copies odd bytes", copies_odd_bytes, dim3(1), 1, 16), launch("waits for no copy", waits_for_no_copy);
  launch("tall grid", nothing, dim3(1, 65536)), launch("empty grid", nothing, dim3(0));
  launch("large cluster", nothing, dim3(1, 16), 16), launch("odd cluster", nothing, dim3(1, 3), 2);
  launch("shared", nothing, dim3(1), 1, 49 << 10);
  cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 49 << 10);
  launch("shared allowed", nothing, dim3(1), 1, 49 << 10);
  return 0;
}
