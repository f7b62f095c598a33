// The tensor memory accelerator (sm_90 and up): boxes of an array in memory, copied by a unit of their own, into the
// shared memory of one CTA or of two that read the same. Clusters of two CTAs.
#pragma once

#include "cupyattn/types.cuh"

namespace cupyattn {

// CUtensorMap: what an array is, and which boxes of it are copied.
struct alignas(64) TensorMap {
  u64 words[16];
};

// Keys and values, or the two parts of latents, in boxes of 64 columns and `box_rows` tokens of a page, which divide the
// page size: as KeyBoxes of tensor_map.py packs them.
struct KeyMaps {
  TensorMap first;
  TensorMap second;
  int box_rows;  // a power of two, 8 at least; 0: none
};

#if __CUDA_ARCH__ >= 900

// Before others, or the accelerator, arrive at barriers that this thread has made.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and says that so many bytes are to come before the phase can end.
__device__ __forceinline__ void mbarrier_arrive_expecting(u32 smem_barrier, u32 num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(smem_barrier), "r"(num_bytes)
               : "memory");
}
// Says so alone; before they come.
__device__ __forceinline__ void mbarrier_expect(u32 smem_barrier, u32 num_bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;"
               :
               : "r"(smem_barrier), "r"(num_bytes)
               : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(&map) : "memory");
}

// Copies the box of a map of three axes that begins at (x, y, z). `map` must be a __grid_constant__ parameter.
__device__ __forceinline__ void copy_box(u32 smem_address, const TensorMap& map, int x, int y, int z,
                                         u32 smem_barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %4}], [%5], %6;"
      :
      : "r"(smem_address), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(smem_barrier), "l"(policy)
      : "memory");
}
// The same of four axes.
__device__ __forceinline__ void copy_box(u32 smem_address, const TensorMap& map, int x, int y, int z, int w,
                                         u32 smem_barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
      :
      : "r"(smem_address), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(smem_barrier), "l"(policy)
      : "memory");
}
// That of three axes to both CTAs of a cluster, at the same place in each, for the same barrier of each.
__device__ __forceinline__ void copy_box_to_both(u32 smem_address, const TensorMap& map, int x, int y, int z,
                                                 u32 smem_barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6, %7;"
      :
      : "r"(smem_address), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(smem_barrier),
        "h"(static_cast<unsigned short>(3)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ u32 cluster_size() {
  u32 size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}
__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Arrives at the same barrier of CTA `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(u32 smem_barrier, u32 rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n"
      :
      : "r"(smem_barrier), "r"(rank)
      : "memory");
}
// For what both CTAs of a cluster access.
__device__ __forceinline__ void fence_cluster() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }
// A barrier of all threads of the cluster that have not exited: each arrives, and later waits. `relaxed` tells the other CTA
// of nothing but what fence_mbarrier_init has.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

#endif

}  // namespace cupyattn
