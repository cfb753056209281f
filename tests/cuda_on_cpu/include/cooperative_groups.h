// Clusters as far as csrc/cuda uses them.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void sync(int line = __builtin_LINE()) const { barrier_arrive(line), barrier_wait(line); }

  void barrier_arrive(int line = __builtin_LINE()) const {
    using namespace cuda_on_cpu;
    if (arrived[threadIdx.x])
      fail("two arrivals at the cluster's barrier without a wait, line " + std::to_string(line));
    arrived[threadIdx.x] = moved = true, phase[threadIdx.x] = arrivals.turn;
    ++arrivals.count, arrive_if_all();
  }
  void barrier_wait(int line = __builtin_LINE()) const {
    using namespace cuda_on_cpu;
    if (!arrived[threadIdx.x]) fail("a wait at the cluster's barrier without an arrival, line " + std::to_string(line));
    while (arrivals.turn == phase[threadIdx.x]) yield();  // until all threads of the block have arrived
    if (!cluster->wait(arrivals_turn)) fail("another block of the cluster failed");
    arrived[threadIdx.x] = false, moved = true;
  }
  template <class T> T* map_shared_rank(T* here, unsigned rank) const {
    return reinterpret_cast<T*>(cuda_on_cpu::cluster->local[rank] +
                                (reinterpret_cast<char*>(here) - &cuda_on_cpu::local_mark));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
