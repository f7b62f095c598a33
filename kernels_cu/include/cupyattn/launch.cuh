// Programmatic dependent launch: a kernel that starts while its predecessor on the stream is still finishing.
// Instructions of sm_90 and up; below, and in an ordinary launch, they do nothing.
//
// All kernels are launched so, and wait before they write memory or rely on it. Before, they may ask L2 for what they will
// read, which is where it is written, too. As that may change while they run, it is not read by .nc loads, nor what the
// compiler might read so (tables are not __restrict__). decode and its cascades, and MLA's decode, guess from what lengths
// and tables say then, and read them again when they have waited (guess_run of schedule.cuh): on small steps that is worth
// a microsecond. Where the caller has promised that the kernel before does not write them (`pdl=True`), all of decode's
// kernels read them once, early (`reads_early`).
//
// A kernel lets the next one start only when it has waited itself: whoever has waited for it has waited for all before. How
// much later, is a matter of speed: the next one's first keys are then asked for, beside what this one is still asking for.
#pragma once

#include "cupyattn/types.cuh"

namespace cupyattn {

#if __CUDA_ARCH__ >= 900
constexpr bool kLaunchesEarly = true;
#else
constexpr bool kLaunchesEarly = false;
#endif

// Lets the next kernel start as SMs become free, if it was launched for that. It waits by itself for what it
// reads of ours.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when all of the kernel before this one has finished and is visible.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// SMs of the device, at least.
__device__ __forceinline__ u32 num_sms() {
  u32 count;
  asm("mov.u32 %0, %%nsmid;" : "=r"(count));
  return count;
}

}  // namespace cupyattn
