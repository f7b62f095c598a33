// Barriers of some of a CTA's threads; barriers in shared memory that count arrivals, of threads and of asynchronous
// copies (sm_90 and up); registers that warpgroups pass on to each other.
#pragma once

#include "cupyattn/types.cuh"

namespace cupyattn {

// Threads 0 .. kThreads - 1, whole warps, wait for each other; others may have exited.
template <int kThreads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync 1, %0;" : : "n"(kThreads) : "memory");
}
// The same, for who is told which barrier to wait at.
template <int kThreads>
struct NamedBarrier {
  __device__ __forceinline__ void wait() const { sync_threads<kThreads>(); }
};

// `kNumThreads` of a CTA's threads, whole warps, that have a job together: all from thread 0 on, or one half of those.
template <int kNumThreads>
struct Team {
  static constexpr int kWarps = kNumThreads / 32;
  int tid;  // in the team
  int half;
  // Halves have barriers of their own, as the other one may be at that of all threads already: those of warpgroups, which
  // other kernels have, or where halves are warpgroups.
  int barrier;

  __device__ __forceinline__ void sync() const {
    asm volatile("bar.sync %0, %1;" : : "r"(barrier), "n"(kNumThreads) : "memory");
  }
};
template <int kThreads>
__device__ __forceinline__ Team<kThreads> all_threads() {
  return {static_cast<int>(threadIdx.x), 0, 1};
}
template <int kThreads>
__device__ __forceinline__ Team<kThreads / 2> half_of_threads() {
  const int half = threadIdx.x / (kThreads / 2);
  return {static_cast<int>(threadIdx.x) - half * (kThreads / 2), half, 2 + half};
}
// Two warpgroups take turns: each waits until the other has passed the turn on, as often as that does.
__device__ __forceinline__ void wait_for_turn(int group) {
  asm volatile("bar.sync %0, 256;" : : "r"(4 + group) : "memory");
}
__device__ __forceinline__ void pass_turn_to(int group) {
  asm volatile("bar.arrive %0, 256;" : : "r"(4 + group) : "memory");
}
// The four warps of warpgroup `group`.
__device__ __forceinline__ void sync_warpgroup(int group) {
  asm volatile("bar.sync %0, 128;" : : "r"(2 + group) : "memory");
}

// And say whether `x` holds for any thread of it.
__device__ __forceinline__ bool any_of_warpgroup(int group, bool x) {
  u32 any;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %2, 0;\n"
      "bar.red.or.pred p, %1, 128, p;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(any)
      : "r"(2 + group), "r"(static_cast<u32>(x))
      : "memory");
  return any;
}

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ void mbarrier_init(u32 smem_barrier, u32 num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(smem_barrier), "r"(num_arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 smem_barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(smem_barrier) : "memory");
}
// Arrives when all copies that this thread has started so far have landed.
__device__ __forceinline__ void mbarrier_arrive_after_copies(u32 smem_barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" : : "r"(smem_barrier) : "memory");
}
// Whether the phase of this parity is over: 0 for the first one.
__device__ __forceinline__ bool mbarrier_is_over(u32 smem_barrier, u32 parity) {
  u32 is_over;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(is_over)
      : "r"(smem_barrier), "r"(parity)
      : "memory");
  return is_over;
}
// Waits for that.
__device__ __forceinline__ void mbarrier_wait(u32 smem_barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n"
      "}\n"
      :
      : "r"(smem_barrier), "r"(parity)
      : "memory");
}

// What sync_threads does, by a barrier that all these threads arrive at. After it, racecheck reports no hazards where it
// reported some after a bar.sync of these threads, a warpgroup of the CTA having exited.
struct CountedBarrier {
  u32 smem_barrier;
  u32 parity;  // of its phase

  __device__ __forceinline__ void wait() {
    mbarrier_arrive(smem_barrier);
    mbarrier_wait(smem_barrier, parity);
    parity ^= 1;
  }
};

#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// All warps of a warpgroup: how many registers their threads have from here on.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

#endif

}  // namespace cupyattn
