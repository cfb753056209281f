// Runs the kernels of csrc/cuda on the CPU, thread by thread, so that their values can be tested where there is no GPU.
// It stands in for the CUDA headers. A block is an operating system thread, its threads are fibers that hand over at
// barriers and shuffles; the blocks of a cluster run at the same time, all others one after another. It shows wrong
// values, missed or doubled columns and reads of unwritten shared memory (NaN at the start of every block), threads that
// wait for each other at different barriers or lines, arrivals at a cluster's barrier without a wait, and launches that no
// GPU takes: the launch fails and says which. Races inside a block it does not show.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
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
#define __shared__ static thread_local  // the build adds `cuda_on_cpu::poison(...)` after each declaration
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
  int size = 0, count = 0, line = 0;
  unsigned turn = 0;
};

struct Cluster {  // among the operating system threads of a cluster's blocks
  std::mutex mutex;
  std::condition_variable changed;
  unsigned size = 1, count = 0, turn = 0;
  std::vector<char*> local;  // where each block keeps its shared memory
  std::string fault;
  void complete() {
    if (count < size || size == 0) return;
    count = 0, ++turn, changed.notify_all();
  }
  unsigned arrive() {
    const std::lock_guard<std::mutex> lock(mutex);
    const unsigned now = turn;
    ++count, complete();
    return now;
  }
  bool wait(unsigned before) {  // ends: every block arrives, is done or fails
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return turn != before || !fault.empty(); });
    return turn != before;
  }
  void leave(const std::string& why) {  // a block that is done is not waited for
    const std::lock_guard<std::mutex> lock(mutex);
    if (fault.empty()) fault = why;
    --size, complete(), changed.notify_all();
  }
};

inline thread_local std::vector<std::unique_ptr<Fiber>> fibers;
inline thread_local jmp_buf scheduler;
inline thread_local unsigned running = 0, arrivals_turn = 0;
inline thread_local Barrier block, warps[32], arrivals;
inline thread_local bool arrived[1024], moved = false;  // moved: some thread went on since the scheduler last looked
inline thread_local unsigned phase[1024];               // of the cluster's barrier when the thread arrived
inline thread_local std::string fault;
inline thread_local uint32_t slot[2][1024];
inline thread_local std::function<void()> body;
struct Free {
  void operator()(unsigned char* p) const { std::free(p); }
};
inline thread_local std::unique_ptr<unsigned char[], Free> dynamic_shared;
inline thread_local std::set<const void*> poisoned;
inline thread_local Cluster* cluster = nullptr;
inline thread_local unsigned rank_in_cluster = 0;
inline thread_local char local_mark = 0;  // offsets from here are the same in every thread
inline std::string last_fault;            // of the latest launch that failed

// Shared memory holds NaN (in every format; -1 as an integer) until a thread of this block writes to it.
template <class V> void poison(V& variable) {
  if (poisoned.insert(&variable).second) std::memset(static_cast<void*>(&variable), 0xff, sizeof variable);
}

inline void yield() {
  const dim3 me = threadIdx;
  if (_setjmp(fibers[running]->at) == 0) _longjmp(scheduler, 1);
  threadIdx = me;
}
inline void fail(const std::string& why) {
  if (fault.empty()) fault = why + " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ")";
  for (;;) yield();  // the scheduler ends the block
}
inline void pass(Barrier& b) { b.count = b.line = 0, ++b.turn, moved = true; }
inline void leave(Barrier& b) {
  if (--b.size > 0 && b.count == b.size) pass(b);
}
inline void wait(Barrier& b, int line) {
  const unsigned now = b.turn;
  if (b.count > 0 && b.line != line)
    fail("threads meet at different lines, " + std::to_string(b.line) + " and " + std::to_string(line));
  b.line = line, moved = true;
  if (++b.count == b.size) pass(b);
  while (b.turn == now) yield();
}
// The last of a block's threads to arrive at the cluster's barrier, or to end instead, arrives for the block.
inline void arrive_if_all() {
  if (arrivals.count > 0 && arrivals.count == arrivals.size) pass(arrivals), arrivals_turn = cluster->arrive();
}
inline void enter() {
  threadIdx = dim3(running);
  body();
  if (arrived[running]) fail("a thread ends between arriving at the cluster's barrier and waiting there");
  slot[0][running] = slot[1][running] = ~0u;  // what others read of it is NaN
  fibers[running]->done = moved = true;
  leave(block), leave(warps[running / 32]);
  --arrivals.size, arrive_if_all();
  _longjmp(scheduler, 1);
}

inline void run_block(unsigned threads) {
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  block = arrivals = {int(threads), 0, 0, 0};
  for (unsigned w = 0; w < threads / 32; ++w) warps[w] = {32, 0, 0, 0};
  poisoned.clear(), fault.clear();
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = *fibers[i];
    f.started = f.done = arrived[i] = false;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get(), f.start.uc_stack.ss_size = Fiber::kStack, f.start.uc_link = nullptr;
    makecontext(&f.start, enter, 0);
  }
  for (bool any = true; any && fault.empty();) {
    any = moved = false;
    for (running = 0; running < threads && fault.empty(); ++running) {
      Fiber& f = *fibers[running];
      if (f.done) continue;
      any = true;
      if (_setjmp(scheduler) != 0) continue;  // back from the fiber
      if (f.started) _longjmp(f.at, 1);
      f.started = moved = true;
      setcontext(&f.start);
    }
    if (any && !moved && fault.empty()) fault = "threads wait for each other at different barriers";
  }
}

// Every lane of the warp gives a word and sees all of them.
inline const uint32_t* exchange(uint32_t word, int line) {
  static thread_local unsigned turn[1024];
  const unsigned me = threadIdx.x;
  uint32_t* here = slot[turn[me]++ & 1];
  here[me] = word;
  wait(warps[me / 32], line);
  return here + me / 32 * 32;
}

}  // namespace cuda_on_cpu

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::wait(cuda_on_cpu::block, line); }
template <class V> V shuffled(unsigned mask, V v, unsigned lane, int line) {
  static_assert(sizeof v == 4, "words");
  if (mask != 0xffffffffu) cuda_on_cpu::fail("a shuffle of a part of the warp, which is not made here");
  uint32_t word;
  std::memcpy(&word, &v, 4);
  const uint32_t* all = cuda_on_cpu::exchange(word, line);
  std::memcpy(&v, &all[lane < 32 ? lane : threadIdx.x % 32], 4);
  return v;
}
template <class V> V __shfl_down_sync(unsigned mask, V v, unsigned by, int line = __builtin_LINE()) {
  return shuffled(mask, v, threadIdx.x % 32 + by, line);
}
template <class V> V __shfl_xor_sync(unsigned mask, V v, unsigned by, int line = __builtin_LINE()) {
  return shuffled(mask, v, threadIdx.x % 32 ^ by, line);
}
inline unsigned __ballot_sync(unsigned, bool flag, int line = __builtin_LINE()) {
  const uint32_t* all = cuda_on_cpu::exchange(flag, line);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (all[i] & 1) << i;
  return votes;
}
inline int __syncthreads_or(int flag, int line = __builtin_LINE()) {
  static thread_local int any[2];
  int& here = any[cuda_on_cpu::block.turn & 1];
  if (cuda_on_cpu::block.count == 0) here = 0;
  here |= flag != 0;
  __syncthreads(line);
  return here;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class V> V atomicAdd(V* at, V by) {
  const V before = *at;
  *at += by;
  return before;
}
template <class V> V atomicMin(V* at, V other) {
  const V before = *at;
  *at = std::min(before, other);
  return before;
}

// ---- csrc/cuda/bulk_copy.cuh ------------------------------------------------------------------------------------------

#define PU_BULK_COPY
namespace pu::cuda {

struct Arrival {  // the copy is made when it is waited for: what is read before is NaN
  enum State : uint32_t { kPrepared = 1, kAsked, kThere } state;
  uint32_t bytes;
  void* to;
  const void* from;

  void prepare() { state = kPrepared; }
  static void publish() {}
  void copy(void* target, const void* source, uint32_t count) {
    if (state != kPrepared) cuda_on_cpu::fail("a copy whose arrival was not prepared");
    if ((reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source) | count) % 16 != 0 || count == 0)
      cuda_on_cpu::fail("a copy of no whole 16 bytes");
    to = target, from = source, bytes = count, state = kAsked;
  }
  void wait() {
    while (state != kAsked && state != kThere) cuda_on_cpu::yield();
    if (state == kAsked) std::memcpy(to, from, bytes), state = kThere;
  }
};

}  // namespace pu::cuda

// ---- the runtime --------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
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
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? cuda_on_cpu::last_fault.c_str() : "invalid value";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : attribute == cudaDevAttrClusterLaunch ? 1 : 227 << 10;
  return cudaSuccess;
}
namespace cuda_on_cpu {
inline std::map<const void*, size_t> allowed;  // dynamic shared memory that a kernel was let have
constexpr size_t kUsualShared = 48 << 10, kMostShared = 227 << 10;
}  // namespace cuda_on_cpu
template <class... Formal> cudaError_t cudaFuncSetAttribute(void (*kernel)(Formal...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > cuda_on_cpu::kMostShared) return cudaErrorInvalidValue;
  cuda_on_cpu::allowed[reinterpret_cast<const void*>(kernel)] = size_t(bytes);
  return cudaSuccess;
}

template <class... Formal, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Formal...), Actual&&... actual) {
  using namespace cuda_on_cpu;
  const std::tuple<Formal...> arguments(std::forward<Actual>(actual)...);
  const unsigned together = config->numAttrs ? config->attrs[0].val.clusterDim.y : 1;
  const dim3 grid = config->gridDim, threads = config->blockDim;
  const auto known = allowed.find(reinterpret_cast<const void*>(kernel));
  last_fault.clear();
  if (grid.x < 1 || grid.y < 1 || grid.x > 0x7fffffffu || grid.y > 65535) last_fault = "the grid is beyond a GPU's";
  if (together < 1 || together > 8 || grid.y % together != 0) last_fault = "the cluster is none of a GPU's";
  if (threads.x < 32 || threads.x > 1024 || threads.x % 32 != 0)
    last_fault = "the block is none of whole warps to 1024";
  if (config->dynamicSmemBytes > (known == allowed.end() ? kUsualShared : known->second))
    last_fault = "more dynamic shared memory than the kernel was let have";
  if (!last_fault.empty()) return cudaErrorLaunchFailure;
  auto run = [&](Cluster& shared, dim3 at, unsigned rank) {
    blockIdx = at, gridDim = grid, blockDim = threads;
    cluster = &shared, rank_in_cluster = rank;
    shared.local[rank] = &local_mark;
    dynamic_shared.reset(
        static_cast<unsigned char*>(std::aligned_alloc(128, (config->dynamicSmemBytes + 128) / 128 * 128)));
    std::memset(dynamic_shared.get(), 0xff, config->dynamicSmemBytes);  // NaN in every format
    body = [&] { std::apply(kernel, arguments); };
    run_block(threads.x);
    shared.leave(fault);
  };
  for (unsigned x = 0; x < grid.x; ++x)
    for (unsigned y = 0; y < grid.y; y += together) {
      Cluster shared;
      shared.size = together;
      shared.local.resize(together);
      if (together == 1) {
        run(shared, dim3(x, y), 0);
      } else {
        std::vector<std::thread> blocks;
        for (unsigned rank = 0; rank < together; ++rank)
          blocks.emplace_back(run, std::ref(shared), dim3(x, y + rank), rank);
        for (std::thread& t : blocks) t.join();
      }
      if (!shared.fault.empty()) {
        last_fault = shared.fault;
        return cudaErrorLaunchFailure;
      }
    }
  return cudaSuccess;
}
