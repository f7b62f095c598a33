// Division by a number that the host knows: a multiplication and a shift instead of some 30 dependent
// instructions.
#pragma once

#include "cupyattn/types.cuh"

namespace cupyattn {

// Granlund and Montgomery, "Division by invariant integers using multiplication", 1994, figure 4.1.
struct Divisor {
  int value;
  u32 multiplier;  // floor(2^32 * (2^shift - value) / value) + 1
  int shift;       // ceil(log2(value))

  // n / value for 0 <= n < 2^31.
  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>((__umulhi(static_cast<u32>(n), multiplier) + static_cast<u32>(n)) >> shift);
  }
  __device__ __forceinline__ int modulo(int n, int quotient) const { return n - quotient * value; }
};

}  // namespace cupyattn
