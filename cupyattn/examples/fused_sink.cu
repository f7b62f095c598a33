// Decode attention with two things of its own: an ALiBi bias, and a sink that takes part in each head's
// softmax.
//
// Grid: one warp per (request, query head). The warp walks the request's pages; a lane holds every 32nd
// dimension of the query and of the output. Simple rather than fast: what counts is that the page walk and
// the online softmax come from cupyattn's headers, and that the two additions are a line each.

#include <cupyattn/paged.cuh>
#include <cupyattn/state.cuh>

using namespace cupyattn;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(32)
    sink_decode(const T* __restrict__ q,           // [batch, num_kv_heads * group_size, head_dim]
                const T* __restrict__ k_pages,     // paged, PageStrides
                const T* __restrict__ v_pages,     // paged, PageStrides
                const int* kv_indptr,              // [batch + 1] or null
                const int* kv_indices,             // page ids
                const int* kv_lens,                // [batch]
                const float* __restrict__ sinks,   // [num_qo_heads] logits
                const float* __restrict__ slopes,  // [num_qo_heads] ALiBi: logit per token of distance
                T* __restrict__ out,               // as q
                i64 k_stride_page, i64 k_stride_token, i64 k_stride_head, i64 v_stride_page,
                i64 v_stride_token, i64 v_stride_head, int num_qo_heads, int group_size, int page_size,
                int table_row_stride, float sm_scale) {
  static_assert(kHeadDim % 32 == 0, "a lane holds whole dimensions");
  constexpr int kDims = kHeadDim / 32;
  const int lane = threadIdx.x;
  const int request = blockIdx.x / num_qo_heads;
  const int head = blockIdx.x % num_qo_heads;
  const i64 row = static_cast<i64>(blockIdx.x) * kHeadDim + lane;

  const PageTable table{kv_indptr, kv_indices, table_row_stride};
  const PageStrides k_strides{k_stride_page, k_stride_token, k_stride_head};
  const PageStrides v_strides{v_stride_page, v_stride_token, v_stride_head};
  const int* pages = table.pages_of(request);
  const int kv_len = kv_lens[request];

  float query[kDims];
  float acc[kDims] = {};
  for (int i = 0; i < kDims; ++i) query[i] = to_float(q[row + 32 * i]);

  // The sink is a state like any other: lse = its logit, out = 0.
  SoftmaxState state;
  state.max = sinks[head] * kLog2E;
  state.sum = 1.0f;

  for (int token = 0; token < kv_len; ++token) {
    const int page = pages[token / page_size];
    const T* k = k_pages + k_strides.offset(page, token % page_size, head / group_size) + lane;
    const T* v = v_pages + v_strides.offset(page, token % page_size, head / group_size) + lane;
    float logit = 0.0f;
    for (int i = 0; i < kDims; ++i) logit += query[i] * to_float(k[32 * i]);
    for (int delta = 16; delta > 0; delta /= 2) logit += __shfl_xor_sync(0xffffffffu, logit, delta);
    logit = logit * sm_scale - slopes[head] * (kv_len - 1 - token);  // ALiBi

    const float factor = state.raise(logit * kLog2E);
    const float weight = state.weight(logit * kLog2E);
    state.sum += weight;
    for (int i = 0; i < kDims; ++i) acc[i] = acc[i] * factor + weight * to_float(v[32 * i]);
  }
  for (int i = 0; i < kDims; ++i) out[row + 32 * i] = from_float<T>(acc[i] * state.inverse_sum());
}
