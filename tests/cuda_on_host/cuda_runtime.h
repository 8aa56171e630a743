// Stands in for CUDA's header when csrc/*.cu is compiled for the CPU: a test harness, not a backend.
//
// A launch runs its blocks one after another. The threads of a block are fibers that run from barrier to
// barrier, in ascending order in every other block and in descending order between, so that a missing
// barrier shows as a wrong result; a barrier that not all threads reach ends the program. Memory
// accesses through __ldcs and __stcs are counted.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another
#define LONGACT_LAUNCH(kernel, grid, block, stream, ...) \
  cuda_on_host::launch(grid, block, [&] { kernel(__VA_ARGS__); }), static_cast<void>(stream)
#define __syncthreads() cuda_on_host::barrier(__LINE__)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct dim3 {
  unsigned x;
};
using cudaStream_t = void*;

namespace cuda_on_host {

inline dim3 thread_index, block_index, grid_size;
inline int64_t bytes_loaded = 0, bytes_stored = 0, accesses = 0;
// A step that may change as soon as a block has said that it is done with it: other blocks may all have
// come to their end by then, and the last one counts. Spoilt from there to the end of the block.
inline float* watched = nullptr;
inline float watched_value = 0.0f;
inline bool spoilt = false;

// One thread of a block, kept for the next block when its body is done.
struct Fiber {
  ucontext_t context;  // where it begins; with sanitizers also where it stands
  jmp_buf stands;
  std::vector<char> stack;
  int line = 0;  // of the barrier it waits at
  bool begun = false, done = false;
};
inline Fiber* current = nullptr;
inline const std::function<void()>* body = nullptr;

constexpr size_t kStack = 256 * 1024;

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer must know which stack is in use, and cannot follow a jump between two.
inline ucontext_t scheduler;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;
inline void arrive(void* fake) { __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_size); }
inline void to_scheduler(Fiber& fiber) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_stack_size);
  swapcontext(&fiber.context, &scheduler);
  arrive(fake);
}
inline void to_fiber(Fiber& fiber) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.data(), kStack);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
#else
// Ten times as fast as swapcontext, which asks the kernel for the signal mask.
inline jmp_buf scheduler;
inline void arrive(void*) {}
__attribute__((noinline)) inline void to_scheduler(Fiber& fiber) {
  if (_setjmp(fiber.stands) == 0) _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void to_fiber(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.stands, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}
#endif

inline void run_fiber() {
  arrive(nullptr);
  for (;;) {
    (*body)();
    current->done = true;
    to_scheduler(*current);
  }
}

inline void barrier(int line) {
  current->line = line;
  to_scheduler(*current);
}

inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

inline void run_block(std::vector<Fiber>& fibers, bool descending) {
  const size_t threads = fibers.size();
  for (Fiber& fiber : fibers) fiber.done = false;
  for (size_t done = 0; done < threads;) {
    for (size_t i = 0; i < threads; ++i) {
      const size_t thread = descending ? threads - 1 - i : i;
      current = &fibers[thread];
      thread_index.x = static_cast<unsigned>(thread);
      to_fiber(*current);
      done += current->done;
    }
    if (done != 0 && done != threads) fail("some threads ended while others wait at a barrier");
    for (const Fiber& fiber : fibers) {
      if (done == 0 && fiber.line != fibers[0].line) fail("threads wait at different barriers");
    }
  }
}

inline void launch(unsigned grid, unsigned block, const std::function<void()>& kernel) {
  static std::vector<Fiber> fibers;
  static unsigned launches = 0;
  if (fibers.empty()) {
    fibers = std::vector<Fiber>(block);
    for (Fiber& fiber : fibers) {
      fiber.stack.resize(kStack);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, run_fiber, 0);
    }
  }
  if (fibers.size() != block) fail("blocks of one size only");
  body = &kernel;
  grid_size.x = grid;
  ++launches;
  for (unsigned i = 0; i < grid; ++i) {
    block_index.x = i;
    run_block(fibers, (launches + i) % 2 == 0);
    if (spoilt) *watched = watched_value;
    spoilt = false;
  }
}

// A GPU faults there; the CPU that plays it only with some instructions.
template <typename T>
void aligned(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) fail("misaligned access");
}

template <typename T>
T load(const T* from) {
  aligned(from);
  bytes_loaded += static_cast<int64_t>(sizeof(T));
  ++accesses;
  return *from;
}
template <typename T>
void store(T* to, T value) {
  aligned(to);
  bytes_stored += static_cast<int64_t>(sizeof(T));
  ++accesses;
  *to = value;
}

}  // namespace cuda_on_host

// For ctypes: the bytes counted since the last call.
extern "C" __attribute__((used, visibility("default"))) inline int64_t cuda_on_host_bytes() {
  const int64_t bytes = cuda_on_host::bytes_loaded + cuda_on_host::bytes_stored;
  cuda_on_host::bytes_loaded = cuda_on_host::bytes_stored = 0;
  return bytes;
}

// The same for the number of accesses.
extern "C" __attribute__((used, visibility("default"))) inline int64_t cuda_on_host_accesses() {
  const int64_t accesses = cuda_on_host::accesses;
  cuda_on_host::accesses = 0;
  return accesses;
}

extern "C" __attribute__((used, visibility("default"))) inline void cuda_on_host_watch(float* step) {
  cuda_on_host::watched = step;
}

#define threadIdx cuda_on_host::thread_index
#define blockIdx cuda_on_host::block_index
#define gridDim cuda_on_host::grid_size
#define __ldcs cuda_on_host::load
#define __stcs cuda_on_host::store

inline void __threadfence() {}
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  const uint32_t old = *address;
  *address += value;
  if (cuda_on_host::watched != nullptr && old + value < gridDim.x) {
    cuda_on_host::watched_value = *cuda_on_host::watched;
    *cuda_on_host::watched = 1e6f;
    cuda_on_host::spoilt = true;
  }
  return old;
}

#define CUDART_VERSION 13000
enum cudaError_t {
  cudaSuccess,
  cudaErrorInsufficientDriver,
  cudaErrorNoDevice,
  cudaErrorInvalidDevice,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidDeviceFunction,
  cudaErrorUnsupportedPtxVersion,
  cudaErrorUnknown,
};
struct cudaDeviceProp {
  int major, minor;
};
struct cudaFuncAttributes {};

// What the fake runtime answers, set by the environment: an error's number, and the driver's version.
inline int cuda_on_host_setting(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? 0 : std::atoi(value);
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return static_cast<cudaError_t>(cuda_on_host_setting("CUDA_ON_HOST_ERROR"));
}
inline cudaError_t cudaSetDevice(int device) {
  const auto error = static_cast<cudaError_t>(cuda_on_host_setting("CUDA_ON_HOST_ERROR"));
  return error != cudaSuccess ? error : device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = cuda_on_host_setting("CUDA_ON_HOST_DRIVER");
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {7, 5};
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the fake runtime"; }
