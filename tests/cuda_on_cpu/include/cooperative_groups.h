// Clusters as far as csrc/cuda uses them.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void sync() const {  // the block's threads meet, then its first one meets those of the other blocks
    __syncthreads();
    if (threadIdx.x == 0) cuda_on_cpu::cluster->sync();
    __syncthreads();
  }
  void barrier_arrive() const {}
  void barrier_wait() const { sync(); }
  template <class T> T* map_shared_rank(T* here, unsigned rank) const {
    return reinterpret_cast<T*>(cuda_on_cpu::cluster->local[rank] +
                                (reinterpret_cast<char*>(here) - &cuda_on_cpu::local_mark));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
