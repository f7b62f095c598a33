// How the work of one decode step is dealt out: contiguous runs of KV tiles, equal for every CTA.
//
// A *group* is what shares one read of the keys: (request, KV head, tile of query rows). Its keys are cut into
// tiles of kTileKV tokens. All tiles of all groups, in that order, form one line of `total` units; CTA c of n
// takes units [c * total / n, (c + 1) * total / n). So one long request beside many short ones costs the same
// per byte as equal ones, and nothing but lengths on the device is needed to know who does what.
//
//     group 0        group 1  group 2
//     [t t t t t t t][t t t t][t t t t t t t]      7 + 4 + 7 = 18 units on 4 CTAs
//      CTA 0    CTA 1     CTA 2     CTA 3
//
// A group inside one CTA is finished there. A group over several CTAs leaves one partial state per CTA, which
// are merged in a tree: of the CTAs that share a node, the last to arrive merges their partials, in CTA
// order, so that results do not depend on who was last. A CTA has at most two partial states: one of the group
// that it enters halfway (slot 0), one of the group that it leaves halfway (slot 1); the first partial's
// slot also names a node's arrival counter. The last arriver sets the counter back to 0.
//
// Every group has at least one tile, so that a request without keys still gets its out = 0, lse = -inf.
#pragma once

#include "cupyattn/types.cuh"

namespace cupyattn {

// What of a step decides the work: the same on every CTA.
struct Problem {
  const int* qo_indptr;  // [batch_size + 1], or null: one query token a request
  const int* kv_lens;    // [batch_size]
  int batch_size;
  int num_kv_heads;
  int group_size;   // query heads per KV head
  int window_left;  // keys before a query's own that it sees; -1: all
};

// One request's share of the line.
template <int kTileKV, int kTileQ>
struct Request {
  int qo_begin;     // first query token
  int qo_len;       // query tokens
  int kv_begin;     // first key that any of them sees
  int kv_len;       // keys, the query tokens' own included
  int num_tiles;    // tiles of a group
  int num_q_tiles;  // tiles of query rows
  int num_groups;   // num_kv_heads * num_q_tiles

  __device__ __forceinline__ Request() {}
  __device__ __forceinline__ Request(const Problem& problem, int b) {
    qo_begin = problem.qo_indptr != nullptr ? problem.qo_indptr[b] : b;
    qo_len = problem.qo_indptr != nullptr ? problem.qo_indptr[b + 1] - qo_begin : 1;
    kv_len = max(problem.kv_lens[b], 0);
    kv_begin = problem.window_left < 0 ? 0 : max(kv_len - qo_len - problem.window_left, 0);
    num_tiles = max(ceil_div(kv_len - kv_begin, kTileKV), 1);
    num_q_tiles = ceil_div(qo_len * problem.group_size, kTileQ);
    num_groups = problem.num_kv_heads * num_q_tiles;
  }
  __device__ __forceinline__ int num_units() const { return num_groups * num_tiles; }
};

// The CTA whose run holds `unit`: the inverse of begin(c) = c * total / num_ctas.
__device__ __forceinline__ int cta_of_unit(int unit, int total, int num_ctas) {
  return static_cast<int>(((unit + 1ull) * num_ctas - 1) / static_cast<u32>(total));
}

// Walks one CTA's run, tile by tile, through groups and requests.
template <int kTileKV, int kTileQ>
struct Cursor {
  Request<kTileKV, kTileQ> request;
  int request_idx;
  int group;  // kv_head * num_q_tiles + q_tile
  int tile;   // inside the group
  int unit;   // on the line
  int unit_end;

  __device__ __forceinline__ bool done() const { return unit >= unit_end; }
  __device__ __forceinline__ int kv_head() const { return group / request.num_q_tiles; }
  __device__ __forceinline__ int q_tile() const { return group % request.num_q_tiles; }
  __device__ __forceinline__ int token_begin() const { return request.kv_begin + tile * kTileKV; }
  __device__ __forceinline__ bool last_of_segment() const {
    return tile + 1 == request.num_tiles || unit + 1 == unit_end;
  }

  // To the next tile; true where that starts another group.
  __device__ __forceinline__ bool advance(const Problem& problem) {
    ++unit;
    if (++tile < request.num_tiles) return false;
    tile = 0;
    if (++group == request.num_groups) {
      group = 0;
      if (unit < unit_end) {
        do {  // requests without query tokens have no groups
          request = Request<kTileKV, kTileQ>(problem, ++request_idx);
        } while (request.num_groups == 0);
      }
    }
    return true;
  }
};

// Inclusive prefix sum over the block; `smem_warp_sums` holds one int per warp. All threads must call it.
template <int kThreads>
__device__ __forceinline__ int block_inclusive_sum(int value, int* smem_warp_sums, int& block_total) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, value, delta);
    if (lane >= delta) value += other;
  }
  __syncthreads();  // the sums of an earlier call have been read
  if (lane == 31) smem_warp_sums[warp] = value;
  __syncthreads();
  block_total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) value += smem_warp_sums[w];
    block_total += smem_warp_sums[w];
  }
  return value;
}

// Length of the line, and this CTA's place on it. False where the line is too short to reach this CTA.
template <int kThreads, int kTileKV, int kTileQ>
__device__ __forceinline__ bool begin_run(const Problem& problem, Cursor<kTileKV, kTileQ>& cursor, int& total,
                                          int& num_ctas) {
  __shared__ int smem_warp_sums[kThreads / 32];
  __shared__ int smem_start[2];  // request, its first unit

  const auto units_of = [&](int b) {
    return b < problem.batch_size ? Request<kTileKV, kTileQ>(problem, b).num_units() : 0;
  };
  const int tid = threadIdx.x;

  int thread_units = 0;
  for (int b = tid; b < problem.batch_size; b += kThreads) thread_units += units_of(b);
  block_inclusive_sum<kThreads>(thread_units, smem_warp_sums, total);
  // Two tiles a CTA at least: the second one's copy hides behind the first's, and there is half as much to merge.
  num_ctas = min(static_cast<int>(gridDim.x), ceil_div(total, 2));
  const int cta = blockIdx.x;
  if (cta >= num_ctas) return false;
  cursor.unit = static_cast<int>(static_cast<u64>(cta) * total / num_ctas);
  cursor.unit_end = static_cast<int>((cta + 1ull) * total / num_ctas);

  for (int b_begin = 0, unit_begin = 0;; b_begin += kThreads) {
    int chunk_units;
    const int units = units_of(b_begin + tid);
    const int unit_end = unit_begin + block_inclusive_sum<kThreads>(units, smem_warp_sums, chunk_units);
    if (unit_end - units <= cursor.unit && cursor.unit < unit_end) {
      smem_start[0] = b_begin + tid;
      smem_start[1] = unit_end - units;
    }
    unit_begin += chunk_units;
    if (cursor.unit < unit_begin) break;
  }
  __syncthreads();
  cursor.request_idx = smem_start[0];
  cursor.request = Request<kTileKV, kTileQ>(problem, cursor.request_idx);
  const int unit_in_request = cursor.unit - smem_start[1];
  cursor.group = unit_in_request / cursor.request.num_tiles;
  cursor.tile = unit_in_request % cursor.request.num_tiles;
  return true;
}

}  // namespace cupyattn
