// Copies from global to shared memory by the copy engine of sm_90 and newer: no thread waits for them before it needs what
// they bring, and no register holds it. A thread prepares an Arrival for every copy; after a barrier all may wait for it.
#pragma once
#include <cstdint>

#if !defined(PU_BULK_COPY)  // where the kernels run on a CPU it is there already
#define PU_BULK_COPY

namespace pu::cuda {

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// In shared memory, for one copy.
struct Arrival {
  uint64_t word;  // an mbarrier

  __device__ void prepare() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(this)) : "memory");
  }
  // The copy engine sees what this thread has prepared.
  static __device__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  // Addresses and size are whole 16 bytes.
  __device__ void copy(void* to, const void* from, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(this))
                 : "memory");
  }
  __device__ void wait() {
    for (uint32_t there = 0; !there;)
      asm volatile(
          "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n\tselp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(there)
          : "r"(shared_address(this))
          : "memory");
  }
};

}  // namespace pu::cuda

#endif
