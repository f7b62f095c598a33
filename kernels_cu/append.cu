// Appends new tokens to a paged KV cache, with rotary embedding of K (and of Q on the way) if asked for.
//
// One CTA per new token. The token's position follows from the lengths on the device, which count the new
// tokens already: token i of request b's n_b stands at kv_lens[b] - n_b + i.

#include "cupyattn/launch.cuh"
#include "cupyattn/paged.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

enum RopeMode { kNoRope = 0, kHalfSplit = 1, kInterleaved = 2 };

constexpr int kAppendThreads = 128;
constexpr int kMaxPairs = 256;  // head_dim up to 512

// The request that token belongs to: the last b with qo_indptr[b] <= token. Requests may be empty.
__device__ __forceinline__ int request_of_token(const int* qo_indptr, int batch_size, int token) {
  int low = 0;
  int high = batch_size - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (qo_indptr[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Copies one token's heads, rotated: pair i of a head is elements (i, i + rotary_dim / 2) half-split or
// (2i, 2i + 1) interleaved. Dimensions from rotary_dim on pass through.
template <typename T>
__device__ __forceinline__ void copy_heads(const T* source, i64 source_stride_head, T* target,
                                           i64 target_stride_head, int num_heads, int head_dim,
                                           int rotary_dim, RopeMode mode, const float2* smem_cos_sin) {
  const int num_pairs = head_dim / 2;
  for (int i = threadIdx.x; i < num_heads * num_pairs; i += kAppendThreads) {
    const int head = i / num_pairs;
    const int pair = i % num_pairs;
    const bool rotated = mode != kNoRope && pair < rotary_dim / 2;
    const bool half_split = rotated && mode == kHalfSplit;
    const int low = half_split ? pair : 2 * pair;
    const int high = half_split ? pair + rotary_dim / 2 : low + 1;
    const T* from = source + head * source_stride_head;
    T* to = target + head * target_stride_head;
    T x = from[low];
    T y = from[high];
    if (rotated) {
      const float2 cs = smem_cos_sin[pair];
      const float xf = to_float(x);
      const float yf = to_float(y);
      x = from_float<T>(xf * cs.x - yf * cs.y);
      y = from_float<T>(yf * cs.x + xf * cs.y);
    }
    to[low] = x;
    to[high] = y;
  }
}

// clang-format off
template <typename T>
__global__ void __launch_bounds__(kAppendThreads)
    append_kernel(const T* k, const T* v,     // [num_tokens, num_kv_heads, head_dim], strided
                  T* k_pages, T* v_pages,     // paged, PageStrides
                  const T* q, T* q_out,       // [num_tokens, num_qo_heads, head_dim] or null; may be the same
                  const int* qo_indptr,       // [batch_size + 1] or null: token b is request b's
                  const int* kv_indptr,       // [batch_size + 1] or null
                  const int* kv_indices, const int* kv_lens,
                  const double* inv_freq,     // [rotary_dim / 2], in turns per position, or null
                  i64 k_in_stride_token, i64 k_in_stride_head,
                  i64 v_in_stride_token, i64 v_in_stride_head,
                  i64 k_stride_page, i64 k_stride_token, i64 k_stride_head,
                  i64 v_stride_page, i64 v_stride_token, i64 v_stride_head,
                  i64 q_stride_token, i64 q_stride_head,
                  i64 q_out_stride_token, i64 q_out_stride_head,
                  int batch_size, int num_kv_heads, int num_qo_heads,
                  int head_dim, int v_head_dim,  // of k and q; of v
                  int page_size, int table_row_stride, int rotary_dim, int rope_mode) {
  // clang-format on
  wait_for_predecessor();
  launch_dependents();  // decode with pdl=True finds out what it will read meanwhile
  __shared__ float2 smem_cos_sin[kMaxPairs];
  const PageTable pages{kv_indptr, kv_indices, table_row_stride};
  const RopeMode mode = static_cast<RopeMode>(rope_mode);

  const int token = blockIdx.x;
  const int request = qo_indptr != nullptr ? request_of_token(qo_indptr, batch_size, token) : token;
  // Tokens after qo_indptr's end (a padded batch in a CUDA graph) belong to nobody.
  if (qo_indptr != nullptr && token >= qo_indptr[batch_size]) return;
  const int tokens_left = qo_indptr != nullptr ? qo_indptr[request + 1] - token : 1;
  const int position = kv_lens[request] - tokens_left;

  if (mode != kNoRope) {
    for (int i = threadIdx.x; i < rotary_dim / 2; i += kAppendThreads) {
      // In double, whole turns dropped: in float the angle of position 1,000,000 would be off by 0.03.
      const double turns = position * inv_freq[i];
      float2 cs;
      sincospif(2.0f * static_cast<float>(turns - floor(turns)), &cs.y, &cs.x);
      smem_cos_sin[i] = cs;
    }
    __syncthreads();
  }
  if (position >= 0) {  // a request whose length is less than its new tokens: the first ones have no place
    const int page_id = pages.pages_of(request)[position / page_size];
    const int token_in_page = position % page_size;
    const PageStrides k_strides{k_stride_page, k_stride_token, k_stride_head};
    const PageStrides v_strides{v_stride_page, v_stride_token, v_stride_head};
    copy_heads(k + token * k_in_stride_token, k_in_stride_head,
               k_pages + k_strides.offset(page_id, token_in_page, 0), k_stride_head, num_kv_heads, head_dim,
               rotary_dim, mode, smem_cos_sin);
    copy_heads(v + token * v_in_stride_token, v_in_stride_head,
               v_pages + v_strides.offset(page_id, token_in_page, 0), v_stride_head, num_kv_heads, v_head_dim,
               rotary_dim, kNoRope, smem_cos_sin);
  }
  if (q != nullptr) {
    copy_heads(q + token * q_stride_token, q_stride_head, q_out + token * q_out_stride_token,
               q_out_stride_head, num_qo_heads, head_dim, rotary_dim, mode, smem_cos_sin);
  }
}

}  // namespace cupyattn
