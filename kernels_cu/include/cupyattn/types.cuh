// Element types and fixed-width names, without any system header: sources compile on a machine
// that has NVRTC alone, in well under a second.
#pragma once

namespace cupyattn {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// Storage-only 16-bit floats. Arithmetic is done in float, or on packed pairs by the tensor cores.
struct half_t {
  u16 bits;
};
struct bfloat16_t {
  u16 bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float to_float(bfloat16_t x) {
  return __uint_as_float(static_cast<u32>(x.bits) << 16);
}

// Rounds (lo, hi) to nearest even and packs them, lo in the low half: the order of elements in memory.
template <typename T>
__device__ __forceinline__ u32 pack2(float lo, float hi);
template <>
__device__ __forceinline__ u32 pack2<half_t>(float lo, float hi) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}
template <>
__device__ __forceinline__ u32 pack2<bfloat16_t>(float lo, float hi) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

__device__ __forceinline__ float4 operator*(const float4& x, float factor) {
  return make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
}
__device__ __forceinline__ void operator+=(float4& x, const float4& y) {
  x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
}

// Two of half_t.
__device__ __forceinline__ float2 unpack2(u32 packed) {
  float2 x;
  asm("{\n"
      ".reg .b16 lo, hi;\n"
      "mov.b32 {lo, hi}, %2;\n"
      "cvt.f32.f16 %0, lo;\n"
      "cvt.f32.f16 %1, hi;\n"
      "}\n"
      : "=f"(x.x), "=f"(x.y)
      : "r"(packed));
  return x;
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return T{static_cast<u16>(pack2<T>(x, 0.0f))};
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

// What is the same in all lanes of a warp, so that the compiler knows. Else it keeps the operands of wgmma, and all that
// follows a branch, in registers of threads, from where they take longer than the products.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// A constant that a function can be called with.
template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};
template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// Volatile: where registers are scarce, made again rather than kept.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float neg_infinity() { return __int_as_float(0xff800000); }

constexpr __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace cupyattn
