// Programmatic dependent launch: a kernel that starts while its predecessor on the stream is still finishing.
// Instructions of sm_90 and up; below, and in an ordinary launch, they do nothing.
#pragma once

namespace cupyattn {

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

}  // namespace cupyattn
