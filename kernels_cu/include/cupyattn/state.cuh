// The attention state: what is known of one query row after some set of keys.
//
// A row's state is (out, max, sum) with `out` not yet divided by `sum`; its log-sum-exp is
// max + log2(sum). States over disjoint sets of keys merge associatively, with the identity
// max = -inf, sum = 0, out = 0. A finished pair (out, lse) is the state (out, max = lse, sum = 1).
// Everything here is in base 2: scale logits by log2(e) on the way in, lse by ln(2) on the way out.
#pragma once

#include "cupyattn/types.cuh"

namespace cupyattn {

// ex2.approx: 2 ulp, exp2(-inf) = 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx: 1 ulp; 0 for infinity.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh through exp2: 1 - 2 / (1 + e^2x). tanh.approx would cost 2^-11 of the cap, too much for fp16 output.
__device__ __forceinline__ float tanh_accurate(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(fminf(2.0f * kLog2E * x, 126.0f)));
}

struct SoftmaxState {
  float max = neg_infinity();
  float sum = 0.0f;

  // What to subtract from logits. While every key seen was masked, max is -inf and -inf - -inf
  // would be NaN: 0 makes those keys weigh exp2(-inf) = 0 instead.
  __device__ __forceinline__ float offset() const { return max == neg_infinity() ? 0.0f : max; }

  // Raises the maximum to cover `logit_max`; returns the factor for what was accumulated before.
  __device__ __forceinline__ float raise(float logit_max) {
    const float old_max = max;
    max = fmaxf(max, logit_max);
    const float factor = exp2_approx(old_max - offset());
    sum *= factor;
    return factor;
  }

  // Weight of a key; the caller has raised the maximum and adds weight * value to its `out`.
  __device__ __forceinline__ float weight(float logit) const { return exp2_approx(logit - offset()); }

  // 1 / sum, or 0 for the empty state, so that an empty row gives out = 0. A sum that is NaN is not empty: it stays NaN.
  __device__ __forceinline__ float inverse_sum() const { return sum == 0.0f ? 0.0f : reciprocal_approx(sum); }

  __device__ __forceinline__ float lse_log2() const {
    return sum == 0.0f ? neg_infinity() : max + log2_approx(sum);
  }
};

}  // namespace cupyattn
