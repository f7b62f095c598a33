// How the work of one decode step is dealt out: contiguous runs of KV tiles, equal for every CTA.
//
// A *group* is what shares one read of the keys: (request, KV head, tile of query rows). Its keys are cut
// into tiles of kTileKV tokens. All tiles of all groups, in that order, form one line of units, which is cut
// into equal runs, one a CTA. So one long request beside many short ones costs the same per byte as equal
// ones, and nothing but lengths on the device is needed to know who does what.
//
//     group 0        group 1  group 2
//     [t t t t t t t][t t t t][t t t t t t t]      7 + 4 + 7 = 18 units on 4 CTAs: 5 + 5 + 4 + 4
//      CTA 0    | CTA 1     | CTA 2  | CTA 3
//
// A group inside one CTA is finished there. A group over several CTAs leaves one partial state per CTA, which
// are merged in a tree: of the CTAs that share a node, the last to arrive merges their partials, in CTA
// order, so that results do not depend on who was last. A CTA has at most two partial states: one of the
// group that it enters halfway (slot 0), one of the group that it leaves halfway (slot 1); the first
// partial's slot also names a node's arrival counter. The last arriver sets the counter back to 0.
//
// Units are counted in 32 bits: a step of up to 2^31 tiles (1 M keys x 128 KV heads x 1000 requests).
// Every group has at least one tile, so that a request without keys still gets its out = 0, lse = -inf.
#pragma once

#include "cupyattn/divide.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

// What of a step decides the work: the same on every CTA.
struct Problem {
  const int* qo_indptr;  // [batch_size + 1], or null: one query token a request
  const int* kv_lens;    // [batch_size]
  int batch_size;
  int num_kv_heads;
  Divisor group_size;  // query heads per KV head
  int window_left;     // keys before a query's own that it sees; -1: all
};

// One request's share of the line.
template <int kTileKV, int kTileQ>
struct Request {
  int qo_begin;  // first query token
  int qo_len;    // query tokens
  int kv_begin;  // first key that any of them sees
  int kv_len;    // keys, the query tokens' own included

  __device__ __forceinline__ Request() {}
  __device__ __forceinline__ Request(const Problem& problem, int b) {
    qo_begin = problem.qo_indptr != nullptr ? problem.qo_indptr[b] : b;
    qo_len = problem.qo_indptr != nullptr ? problem.qo_indptr[b + 1] - qo_begin : 1;
    kv_len = max(problem.kv_lens[b], 0);
    kv_begin = problem.window_left < 0 ? 0 : max(max(kv_len - qo_len, 0) - problem.window_left, 0);
  }
  // Computed where they are needed: registers are scarcer than instructions.
  __device__ __forceinline__ int num_tiles() const { return max(ceil_div(kv_len - kv_begin, kTileKV), 1); }
  __device__ __forceinline__ int num_q_tiles(const Problem& problem) const {
    return ceil_div(qo_len * problem.group_size.value, kTileQ);
  }
  __device__ __forceinline__ int num_units(const Problem& problem) const {
    return problem.num_kv_heads * num_q_tiles(problem) * num_tiles();
  }
};

// The line cut into runs: the first `num_longer` CTAs have `quota` + 1 units, the others `quota`.
struct Partition {
  int num_ctas;
  int quota;
  int num_longer;
  float ctas_per_unit;

  __device__ __forceinline__ Partition() {}
  __device__ __forceinline__ Partition(int total, int max_ctas) {
    // Two units a CTA at least: the second one's copy hides behind the first's, and there is half as much to
    // merge.
    num_ctas = min(max_ctas, ceil_div(total, 2));
    quota = static_cast<u32>(total) / static_cast<u32>(max(num_ctas, 1));
    num_longer = total - quota * num_ctas;
    ctas_per_unit = __fdividef(static_cast<float>(num_ctas), static_cast<float>(total));
  }
  __device__ __forceinline__ int begin(int cta) const { return cta * quota + min(cta, num_longer); }
  // The CTA whose run holds `unit`: a guess that is at most one or two off, and steps from there. An integer
  // division would cost more.
  __device__ __forceinline__ int cta_of(int unit) const {
    int cta = min(static_cast<int>(unit * ctas_per_unit), num_ctas - 1);
#pragma unroll 1
    while (begin(cta) > unit) --cta;
#pragma unroll 1
    while (begin(cta + 1) <= unit) ++cta;
    return cta;
  }
};

// Walks one CTA's run, tile by tile, through groups and requests.
template <int kTileKV, int kTileQ>
struct Cursor {
  Request<kTileKV, kTileQ> request;
  int request_idx;
  int kv_head;
  int q_tile;
  int tile;  // inside the group
  int unit;  // on the line
  int unit_end;

  __device__ __forceinline__ bool done() const { return unit >= unit_end; }
  __device__ __forceinline__ int token_begin() const { return request.kv_begin + tile * kTileKV; }
  __device__ __forceinline__ bool last_of_segment() const {
    return tile + 1 == request.num_tiles() || unit + 1 == unit_end;
  }

  // To the next tile; true where that starts another group.
  __device__ __forceinline__ bool advance(const Problem& problem) {
    ++unit;
    if (++tile < request.num_tiles()) return false;
    tile = 0;
    if (++q_tile < request.num_q_tiles(problem)) return true;
    q_tile = 0;
    if (++kv_head < problem.num_kv_heads) return true;
    kv_head = 0;
    if (unit < unit_end) {
      do {  // requests without query tokens have no groups
        request = Request<kTileKV, kTileQ>(problem, ++request_idx);
      } while (request.qo_len == 0);
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

// This CTA's place on the line. False where the line is too short to reach it.
template <int kThreads, int kTileKV, int kTileQ>
__device__ __forceinline__ bool begin_run(const Problem& problem, Cursor<kTileKV, kTileQ>& cursor,
                                          Partition& partition) {
  __shared__ int smem_warp_sums[kThreads / 32];
  __shared__ int smem_start[2];  // request, its first unit

  const auto units_of = [&](int b) {
    return b < problem.batch_size ? Request<kTileKV, kTileQ>(problem, b).num_units(problem) : 0;
  };
  const int tid = threadIdx.x;

  // The length of the line. A batch of up to kThreads requests is one chunk, whose prefix sum serves below
  // too.
  const int first_units = units_of(tid);
  int other_units = 0;
#pragma unroll 1
  for (int b = tid + kThreads; b < problem.batch_size; b += kThreads) other_units += units_of(b);
  int first_total;
  int other_total = 0;
  const int first_end = block_inclusive_sum<kThreads>(first_units, smem_warp_sums, first_total);
  if (problem.batch_size > kThreads) block_inclusive_sum<kThreads>(other_units, smem_warp_sums, other_total);

  partition = Partition(first_total + other_total, gridDim.x);
  const int cta = blockIdx.x;
  if (cta >= partition.num_ctas) return false;
  cursor.unit = partition.begin(cta);
  cursor.unit_end = partition.begin(cta + 1);

  int units = first_units;
  int unit_end = first_end;
  int chunk_end = first_total;
#pragma unroll 1
  for (int b = tid;; b += kThreads) {
    if (unit_end - units <= cursor.unit && cursor.unit < unit_end) {
      smem_start[0] = b;
      smem_start[1] = unit_end - units;
    }
    if (cursor.unit < chunk_end) break;
    int chunk_units;
    units = units_of(b + kThreads);
    unit_end = chunk_end + block_inclusive_sum<kThreads>(units, smem_warp_sums, chunk_units);
    chunk_end += chunk_units;
  }
  __syncthreads();
  cursor.request_idx = smem_start[0];
  cursor.request = Request<kTileKV, kTileQ>(problem, cursor.request_idx);
  const u32 unit_in_request = cursor.unit - smem_start[1];
  const u32 num_tiles = cursor.request.num_tiles();
  const u32 num_q_tiles = cursor.request.num_q_tiles(problem);
  const u32 group = unit_in_request / num_tiles;
  cursor.tile = unit_in_request - group * num_tiles;
  cursor.kv_head = group / num_q_tiles;
  cursor.q_tile = group - cursor.kv_head * num_q_tiles;
  return true;
}

}  // namespace cupyattn
