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
// The four warps of warpgroup `group`.
__device__ __forceinline__ void sync_warpgroup(int group) {
  asm volatile("bar.sync %0, 128;" : : "r"(2 + group) : "memory");
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
// Arrives, and lets the phase wait for so many bytes of asynchronous stores.
__device__ __forceinline__ void mbarrier_expect(u32 smem_barrier, u32 num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(smem_barrier), "r"(num_bytes)
               : "memory");
}
// Waits for the phase of this parity to be over: 0 for the first one.
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

// CTAs of a cluster. Addresses of another one's shared memory are made from those of one's own; volatile, because it is
// cheaper to make them again than to keep them.
__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ u32 address_in_cluster(u32 smem_address, u32 rank) {
  u32 address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address), "r"(rank));
  return address;
}
// The thread that has initialized barriers which other CTAs will use, before cluster_arrive.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// All threads of the cluster that have not exited; whole warps. No CTA may exit while others write to it.
// Relaxed: after fence_mbarrier_init; it does not wait for loads under way.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Of another CTA's barrier. Not .release.cluster, which waits for all that the thread has under way, in global memory
// too: it tells what is free, not what has been written.
__device__ __forceinline__ void mbarrier_arrive_in_cluster(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" : : "r"(barrier) : "memory");
}
// Stores 16 bytes, of which the barrier in the same shared memory learns.
__device__ __forceinline__ void store_async(u32 address, float x, float y, float z, float w, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               :
               : "r"(address), "f"(x), "f"(y), "f"(z), "f"(w), "r"(barrier)
               : "memory");
}

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
