// Runs the kernels of csrc/cuda on the CPU, thread by thread, so that their values can be tested where there is no GPU.
// It stands in for the CUDA headers. A block is an operating system thread, its threads are fibers that hand over at
// barriers and shuffles; the blocks of a cluster run at the same time, all others one after another. It shows wrong
// values, missed or doubled columns and reads of unwritten shared memory; races inside a block it does not show.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local
#define PU_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_on_cpu::dynamic_shared.get()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned a, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline thread_local dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace cuda_on_cpu {

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  static constexpr size_t kStack = 128 << 10;
};

struct Barrier {  // among the fibers of one block: no locks
  int size = 0, count = 0;
  unsigned turn = 0;
};

struct Cluster {  // among the operating system threads of a cluster's blocks
  std::mutex mutex;
  std::condition_variable changed;
  unsigned size = 1, count = 0, turn = 0;
  std::vector<char*> local;  // where each block keeps its shared memory
  void sync() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned now = turn;
    if (++count == size) count = 0, ++turn, changed.notify_all();
    else changed.wait(lock, [&] { return turn != now; });
  }
};

inline thread_local std::vector<std::unique_ptr<Fiber>> fibers;
inline thread_local jmp_buf scheduler;
inline thread_local unsigned running = 0;
inline thread_local Barrier block, warps[32];
inline thread_local uint32_t slot[2][1024];
inline thread_local std::function<void()> body;
struct Free {
  void operator()(unsigned char* p) const { std::free(p); }
};
inline thread_local std::unique_ptr<unsigned char[], Free> dynamic_shared;
inline thread_local Cluster* cluster = nullptr;
inline thread_local unsigned rank_in_cluster = 0;
inline thread_local char local_mark = 0;  // offsets from here are the same in every thread

inline void yield() {
  const dim3 me = threadIdx;
  if (_setjmp(fibers[running]->at) == 0) _longjmp(scheduler, 1);
  threadIdx = me;
}
inline void leave(Barrier& b) {
  if (--b.size > 0 && b.count == b.size) b.count = 0, ++b.turn;
}
inline void wait(Barrier& b) {
  const unsigned now = b.turn;
  if (++b.count == b.size) b.count = 0, ++b.turn;
  while (b.turn == now) yield();
}
inline void enter() {
  threadIdx = dim3(running);
  body();
  fibers[running]->done = true;
  leave(block), leave(warps[running / 32]);
  _longjmp(scheduler, 1);
}

inline void run_block(unsigned threads) {
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  block = {int(threads), 0, 0};
  for (unsigned w = 0; w < threads / 32; ++w) warps[w] = {32, 0, 0};
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = *fibers[i];
    f.started = f.done = false;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get(), f.start.uc_stack.ss_size = Fiber::kStack, f.start.uc_link = nullptr;
    makecontext(&f.start, enter, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (running = 0; running < threads; ++running) {
      Fiber& f = *fibers[running];
      if (f.done) continue;
      any = true;
      if (_setjmp(scheduler) != 0) continue;  // back from the fiber
      if (f.started) _longjmp(f.at, 1);
      f.started = true;
      setcontext(&f.start);
    }
  }
}

// Every lane of the warp gives a word and sees all of them.
inline const uint32_t* exchange(uint32_t word) {
  static thread_local unsigned turn[1024];
  const unsigned me = threadIdx.x;
  uint32_t* here = slot[turn[me]++ & 1];
  here[me] = word;
  wait(warps[me / 32]);
  return here + me / 32 * 32;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block); }
template <class V> V shuffled(V v, unsigned lane) {
  static_assert(sizeof v == 4, "words");
  uint32_t word;
  std::memcpy(&word, &v, 4);
  const uint32_t* all = cuda_on_cpu::exchange(word);
  std::memcpy(&v, &all[lane < 32 ? lane : threadIdx.x % 32], 4);
  return v;
}
template <class V> V __shfl_down_sync(unsigned, V v, unsigned by) { return shuffled(v, threadIdx.x % 32 + by); }
template <class V> V __shfl_xor_sync(unsigned, V v, unsigned by) { return shuffled(v, threadIdx.x % 32 ^ by); }
inline unsigned __ballot_sync(unsigned, bool flag) {
  const uint32_t* all = cuda_on_cpu::exchange(flag);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= all[i] << i;
  return votes;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class V> V atomicAdd(V* at, V by) {
  const V before = *at;
  *at += by;
  return before;
}

// ---- the runtime --------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrClusterLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttributeValue {
  struct { unsigned x, y, z; } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : attribute == cudaDevAttrClusterLaunch ? 1 : 227 << 10;
  return cudaSuccess;
}
template <class K> cudaError_t cudaFuncSetAttribute(K*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Formal, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Formal...), Actual&&... actual) {
  using namespace cuda_on_cpu;
  const std::tuple<Formal...> arguments(std::forward<Actual>(actual)...);
  const unsigned together = config->numAttrs ? config->attrs[0].val.clusterDim.y : 1;
  const dim3 grid = config->gridDim, threads = config->blockDim;
  if (grid.y % together != 0 || threads.x > 1024 || threads.x % 32 != 0) return cudaErrorInvalidValue;
  Cluster shared;
  shared.size = together;
  shared.local.resize(together);
  auto run = [&](dim3 at, unsigned rank) {
    blockIdx = at, gridDim = grid, blockDim = threads;
    cluster = &shared, rank_in_cluster = rank;
    shared.local[rank] = &local_mark;
    dynamic_shared.reset(
        static_cast<unsigned char*>(std::aligned_alloc(128, (config->dynamicSmemBytes + 128) / 128 * 128)));
    std::memset(dynamic_shared.get(), 0xff, config->dynamicSmemBytes);  // NaN in every format
    body = [&] { std::apply(kernel, arguments); };
    run_block(threads.x);
  };
  for (unsigned x = 0; x < grid.x; ++x)
    for (unsigned y = 0; y < grid.y; y += together) {
      if (together == 1) {
        run(dim3(x, y), 0);
        continue;
      }
      std::vector<std::thread> blocks;
      for (unsigned rank = 0; rank < together; ++rank) blocks.emplace_back(run, dim3(x, y + rank), rank);
      for (std::thread& t : blocks) t.join();
    }
  return cudaSuccess;
}
