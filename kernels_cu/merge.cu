// Merge of attention states over disjoint sets of keys: the operator behind split-KV, cascades and sinks.
//
// One warp per row. State 0 lies at (first_out, first_lse), state s >= 1 at (rest_out, rest_lse) plus (s - 1)
// state strides: so an array of states along any axis and a pair of separate arrays are the same call.
// A row r is (outer, inner) = (r / num_inner, r % num_inner) and lies at outer * outer_stride + inner, in
// rows. In place is safe: a warp reads a row of every state before it writes the row (per chunk of head_dim,
// and writes only what it alone has read).

#include "cupyattn/launch.cuh"
#include "cupyattn/state.cuh"

namespace cupyattn {

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Vec {
  T x[kVec];
};

// clang-format off
template <typename T, int kVec>
__global__ void __launch_bounds__(128, 8)
    merge_states_kernel(const T* first_out, const float* first_lse,  // [rows, head_dim], [rows]
                        const T* rest_out, const float* rest_lse,    // the same, num_states - 1 times
                        T* out, float* lse,                          // may be one of the inputs
                        i64 num_rows, int num_states, int head_dim,
                        i64 num_inner,
                        i64 state_stride,  // rows between states of `rest`
                        i64 outer_stride,  // rows between outer indices of the inputs
                        i64 out_outer_stride) {  // and of the output
  // clang-format on
  wait_for_predecessor();
  launch_dependents();
  const int lane = threadIdx.x % 32;
  const i64 row = blockIdx.x * 4ll + threadIdx.x / 32;
  if (row >= num_rows) return;
  const i64 in_row = row / num_inner * outer_stride + row % num_inner;
  const i64 out_row = row / num_inner * out_outer_stride + row % num_inner;

  const auto lse_of = [&](int s) {
    return s == 0 ? first_lse[in_row] : rest_lse[in_row + (s - 1) * state_stride];
  };
  float lse_max = neg_infinity();
  for (int s = lane; s < num_states; s += 32) lse_max = fmaxf(lse_max, lse_of(s));
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) {
    lse_max = fmaxf(lse_max, __shfl_xor_sync(0xffffffffu, lse_max, delta));
  }
  // Differences first, then base 2: log-sum-exps may be far from 0, where a product would lose their last bits.
  const float offset = lse_max == neg_infinity() ? 0.0f : lse_max;
  const auto weight_of = [&](int s) { return exp2_approx((lse_of(s) - offset) * kLog2E); };
  SoftmaxState total;  // of what exceeds `offset`
  total.max = 0.0f;
  for (int s = 0; s < num_states; ++s) total.sum += weight_of(s);
  const float inverse = total.inverse_sum();

  for (int dim = lane * kVec; dim < head_dim; dim += 32 * kVec) {
    float acc[kVec] = {};
    for (int s = 0; s < num_states; ++s) {
      const float weight = weight_of(s) * inverse;
      if (weight == 0.0f) continue;  // `out` of an empty state may be anything, NaN included
      const T* gmem =
          (s == 0 ? first_out + in_row * head_dim : rest_out + (in_row + (s - 1) * state_stride) * head_dim) +
          dim;
      const Vec<T, kVec> value = *reinterpret_cast<const Vec<T, kVec>*>(gmem);
#pragma unroll
      for (int i = 0; i < kVec; ++i) acc[i] += weight * to_float(value.x[i]);
    }
    Vec<T, kVec> merged;
#pragma unroll
    for (int i = 0; i < kVec; ++i) merged.x[i] = from_float<T>(acc[i]);
    *reinterpret_cast<Vec<T, kVec>*>(out + out_row * head_dim + dim) = merged;
  }
  __syncwarp();  // every lane has read the lse that may be overwritten here
  if (lane == 0) lse[out_row] = offset + total.lse_log2() * kLn2;
}

}  // namespace cupyattn
