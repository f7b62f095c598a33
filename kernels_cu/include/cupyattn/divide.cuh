// Division by a number that is used more than once, or known before what it divides: a multiplication and a shift, or a
// few steps more, instead of some 30 dependent instructions.
#pragma once

#include "cupyattn/types.cuh"

namespace cupyattn {

// A divisor that the host knows. Granlund and Montgomery, "Division by invariant integers using multiplication", 1994,
// figure 4.1.
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

// A divisor that the device alone knows, 1 to 2^30.
struct Reciprocal {
  u32 value;
  u32 inverse;  // 2^32 / value, too small by at most 1.0005

  __device__ __forceinline__ Reciprocal() {}
  __device__ __forceinline__ explicit Reciprocal(u32 value) : value(value) {
    float approx;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(approx) : "f"(__uint2float_ru(value)));
    // Times 2^32, less two units in the last place, so that it is not too large; then one step of Newton's method.
    inverse = __float2uint_rz(__uint_as_float(__float_as_uint(approx) + 0x0ffffffe));
    inverse += __umulhi(inverse, -value * inverse);
  }
  // n / value for n up to 3 * 2^30, where the product is too small by one at most.
  __device__ __forceinline__ u32 divide(u32 n) const {
    const u32 quotient = __umulhi(n, inverse);
    return quotient + (n - quotient * value >= value);
  }
  // Rounded up, for n + value up to as much.
  __device__ __forceinline__ u32 divide_up(u32 n) const { return divide(n + value - 1); }
};

}  // namespace cupyattn
