// The page walk: from (request, token) to where that token's row lies.
#pragma once

#include "cupyattn/cp_async.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

// One table for both forms. CSR: request b owns kv_indices[kv_indptr[b] .. kv_indptr[b + 1]).
// Dense: kv_indptr is null and row b starts at b * row_stride.
struct PageTable {
  const int* kv_indptr;   // [batch_size + 1] or null
  const int* kv_indices;  // page ids
  int row_stride;         // of the dense form, entries

  // The request's own page ids. 64-bit: a dense table may hold more than 2^31 entries.
  template <bool kFromL2 = false>
  __device__ __forceinline__ const int* pages_of(int request) const {
    return kv_indices + (kv_indptr != nullptr ? static_cast<i64>(load<kFromL2>(kv_indptr + request))
                                              : static_cast<i64>(request) * row_stride);
  }
};

// Strides of a paged cache in elements; the last axis (head_dim) is contiguous. NHD, HND and one array
// that interleaves K and V differ in these numbers only.
struct PageStrides {
  i64 page;
  i64 token;
  i64 head;

  __device__ __forceinline__ i64 offset(int page_id, int token_in_page, int kv_head) const {
    return page_id * page + token_in_page * token + kv_head * head;
  }
};

}  // namespace cupyattn
