// Memory reads that overlap with computation: asynchronous 16-byte copies from global to shared memory
// (sm_80 and up), prefetches, early loads.
#pragma once

#include "cupyattn/types.cuh"

namespace cupyattn {

__device__ __forceinline__ u32 smem_address_of(const void* smem) {
  return static_cast<u32>(__cvta_generic_to_shared(smem));
}

// For data that is read once: it leaves L2 before anything that may be used again.
__device__ __forceinline__ u64 evict_first_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ u64 evict_normal_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies 16 bytes.
__device__ __forceinline__ void cp_async_16(u32 smem_address, const void* gmem, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
               :
               : "r"(smem_address), "l"(gmem), "l"(policy)
               : "memory");
}

// Copies 16 bytes, or writes 16 zero bytes and reads nothing where `valid` is false.
__device__ __forceinline__ void cp_async_16(u32 smem_address, const void* gmem, bool valid, u64 policy) {
  const int num_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
               :
               : "r"(smem_address), "l"(gmem), "r"(num_bytes), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void cp_async_16(u32 smem_address, const void* gmem, bool valid) {
  const int num_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(smem_address), "l"(gmem), "r"(num_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* gmem) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(gmem));
}

// A load that starts here. Volatile: the compiler would otherwise sink it to its first use, behind barriers and copies,
// and a load issued early to hide its latency would hide nothing. Not .nc: the kernel before may still have been writing
// there when this one began.
__device__ __forceinline__ u32 load_early(const void* gmem) {
  u32 value;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(value) : "l"(gmem));
  return value;
}

// A number as it is in L2, where all SMs see the same, by no way through L1.
__device__ __forceinline__ int load_from_l2(const int* gmem) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(gmem) : "memory");
  return value;
}
// The same, or read as usual.
template <bool kFromL2>
__device__ __forceinline__ int load(const int* gmem) {
  return kFromL2 ? load_from_l2(gmem) : *gmem;
}

// Makes the compiler read a kernel parameter here.
__device__ __forceinline__ void touch(i64 parameter) { asm volatile("" : : "l"(parameter)); }
__device__ __forceinline__ void touch(float parameter) { asm volatile("" : : "f"(parameter)); }

// Makes the compiler compute a value here, and keep it.
__device__ __forceinline__ void pin(u32& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void pin(i64& value) { asm volatile("" : "+l"(value)); }
template <typename T>
__device__ __forceinline__ void pin(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

}  // namespace cupyattn
