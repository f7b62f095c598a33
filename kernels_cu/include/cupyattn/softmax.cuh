// The softmax of a tile's logits where accumulators have them (wgmma.cuh): a quad has a row, each thread some keys of two, of
// which it has the states.
#pragma once

#include "cupyattn/state.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

// From products to logits of base 2, where these are not the products times a positive factor. A capped logit is
// cap * tanh(s * sm_scale / cap).
template <int kLogits>
__device__ __forceinline__ void finish_logits(float (&s)[kLogits], float sm_scale, float logits_soft_cap) {
  const float inverse_cap = reciprocal_approx(logits_soft_cap);
#pragma unroll
  for (int i = 0; i < kLogits; ++i) {
    s[i] = logits_soft_cap > 0.0f ? logits_soft_cap * kLog2E * tanh_accurate(s[i] * (sm_scale * inverse_cap))
                                  : s[i] * (sm_scale * kLog2E);
  }
}

// Raises the maxima of both rows to cover the logits s * scale; returns whether what has been accumulated is to be
// multiplied by `factor`, the same in all lanes of a warp. Weights up to 2^8 are as exact as those up to 1, so a maximum is
// left alone until a logit is so far above it.
template <int kLogits>
__device__ __forceinline__ bool raise_maxima(const float (&s)[kLogits], float scale, SoftmaxState (&state)[2],
                                             float (&factor)[2]) {
  constexpr float kSlack = 8.0f;
  float logit_max[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    logit_max[half] = neg_infinity();
#pragma unroll
    for (int n = 0; n < kLogits / 4; ++n) {
      logit_max[half] = fmaxf(logit_max[half], fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]));
    }
    logit_max[half] *= scale;
  }
  if (!__any_sync(0xffffffffu,
                  logit_max[0] > state[0].max + kSlack || logit_max[1] > state[1].max + kSlack)) {
    return false;
  }
  bool has_values = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& x = logit_max[half];
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    has_values |= state[half].max != neg_infinity();
    factor[half] = state[half].raise(x);
  }
  return __any_sync(0xffffffffu, has_values);
}

// The keys' weights, as the A operand of each 16 keys, and their sum over this thread's.
template <typename T, int kLogits>
__device__ __forceinline__ void weigh_keys(const float (&s)[kLogits], float scale, SoftmaxState (&state)[2],
                                           u32 (&p)[kLogits / 8][4]) {
  const float offset[2] = {state[0].offset(), state[1].offset()};
#pragma unroll
  for (int i = 0; i < kLogits; i += 2) {
    const int half = i / 2 % 2;
    const float x = exp2_approx(fmaf(s[i], scale, -offset[half]));
    const float y = exp2_approx(fmaf(s[i + 1], scale, -offset[half]));
    state[half].sum += x + y;
    p[i / 8][i / 4 % 2 * 2 + half] = pack2<T>(x, y);
  }
}

}  // namespace cupyattn
