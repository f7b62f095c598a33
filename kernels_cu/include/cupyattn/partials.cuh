// Partial states of the CTAs that share a group, merged in the same launch.
//
// The CTAs form a tree. Of those that share a node, the last to arrive merges the node's partial states, in
// CTA order, so that results do not depend on who was last; it leaves the merged state in the place of the
// node's first one and goes on to the next level. The root writes the result. A node's arrival counter goes
// by its first partial's slot, and the last arriver sets it back to 0: nothing needs to be cleared between
// launches, and a captured graph can be replayed.
#pragma once

#include "cupyattn/state.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

// Adds, releases what this thread has seen written (its CTA's writes too, after a barrier), acquires what
// other adders have released.
__device__ __forceinline__ u32 atomic_add_acq_rel(u32* gmem, u32 value) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(gmem), "r"(value)
               : "memory");
  return old;
}

__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Scratch memory of a launch, by slots: of CTA c's run, slots 2c and 2c + 1.
template <int kHeadDim, int kTileQ>
struct Partials {
  static constexpr int kMaxLevels = 3;  // MAX_MERGE_LEVELS of kernels.py

  float* out;             // [num_slots, kTileQ, kHeadDim]
  float* lse_log2;        // [kMaxLevels, num_slots, kTileQ]: a level must not write what others read
  u32* arrival_counters;  // [kMaxLevels, num_slots], 0 between launches
  int num_slots;

  __device__ __forceinline__ float* out_at(int slot, int row) const {
    return out + (slot * kTileQ + row) * kHeadDim;
  }
  __device__ __forceinline__ float* lse_at(int level, int slot, int row) const {
    return lse_log2 + (level * num_slots + slot) * kTileQ + row;
  }
};

// The CTAs whose runs share a group, as a tree of nodes of up to `fan_in`. Flat for up to 32, where a second
// level (a release, an atomic, a round trip: 2 us) would cost more than it saves. Beyond, balanced, in two
// levels for up to 32^2: 264 partials are 16 nodes of up to 17, not 9 of 32.
struct MergeTree {
  static constexpr int kMaxFanIn = 32;
  static_assert(kMaxFanIn <= 32, "a lane for each");

  int first_cta;
  int num_partials;
  int fan_in;

  __device__ __forceinline__ MergeTree(int first_cta, int last_cta)
      : first_cta(first_cta), num_partials(last_cta + 1 - first_cta) {
    fan_in = kMaxFanIn;
    if (num_partials > kMaxFanIn) {
      fan_in = min(static_cast<int>(ceilf(sqrt_approx(static_cast<float>(num_partials)))), kMaxFanIn);
    }
  }
  __device__ __forceinline__ int slot_of(int cta) const { return 2 * cta + (cta == first_cta); }
};

// Merges a node's states, of CTAs `node_cta`, + `stride`, + 2 `stride`, ..., row by row: a warp takes two rows,
// its lanes the rows' columns, and lane j partial j's weight. Partials come from other SMs: __ldcg reads L2,
// where they are; L1 could hold an older launch's. `write(row, dim, value, lse_log2)` may replace the columns
// of the first slot's `out`, which its lane has read, but no lse, which other lanes read too.
template <int kThreads, int kHeadDim, int kTileQ, typename Write>
__device__ __forceinline__ void merge_partials(const Partials<kHeadDim, kTileQ>& partials,
                                               const MergeTree& tree, int level, int node_cta, int stride,
                                               int num_partials, int num_rows, Write write) {
  constexpr int kVecs = kHeadDim / 4;
  constexpr int kInFlight = 8;  // partials of each of two rows that one round trip to L2 brings
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32;
  // What does not exist is read from a neighbour and weighs 0, or is not written: branches and predicates
  // would cost more than the reads.
  const auto slot_at = [&](int j) { return tree.slot_of(node_cta + min(j, num_partials - 1) * stride); };
#pragma unroll 1
  for (int first_row = threadIdx.x / 32; first_row < num_rows; first_row += 2 * kWarps) {
    const int rows[2] = {first_row, min(first_row + kWarps, num_rows - 1)};
    float lse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) lse[i] = __ldcg(partials.lse_at(level, slot_at(lane), rows[i]));
#pragma unroll 1
    for (int vec = lane; vec < ceil_div(kVecs, 32) * 32; vec += 32) {  // whole warps: lanes ask each other
      const float4* columns[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        columns[i] = reinterpret_cast<const float4*>(partials.out_at(0, rows[i])) + min(vec, kVecs - 1);
      }
      float4 value[kInFlight][2];
      const auto load = [&](int first) {
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int offset = slot_at(first + j) * (kTileQ * kVecs);
#pragma unroll
          for (int i = 0; i < 2; ++i) value[j][i] = __ldcg(columns[i] + offset);
        }
      };
      load(0);  // under way while the weights are found
      float weight[2];
      float lse_log2[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float own = lane < num_partials ? lse[i] : neg_infinity();
        SoftmaxState state;
        state.max = own;
#pragma unroll
        for (int delta = 16; delta > 0; delta /= 2) {
          state.max = fmaxf(state.max, __shfl_xor_sync(0xffffffffu, state.max, delta));
        }
        weight[i] = state.weight(own);
        state.sum = weight[i];
#pragma unroll
        for (int delta = 16; delta > 0; delta /= 2) {
          state.sum += __shfl_xor_sync(0xffffffffu, state.sum, delta);
        }
        weight[i] *= state.inverse_sum();
        lse_log2[i] = state.lse_log2();
      }
      float4 acc[2] = {};
#pragma unroll 1
      for (int first = 0;;) {
#pragma unroll
        for (int j = 0; j < kInFlight; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float w = __shfl_sync(0xffffffffu, weight[i], first + j);
            acc[i].x += w * value[j][i].x, acc[i].y += w * value[j][i].y;
            acc[i].z += w * value[j][i].z, acc[i].w += w * value[j][i].w;
          }
        first += kInFlight;
        if (first >= num_partials) break;
        load(first);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (first_row + i * kWarps < num_rows && vec < kVecs) write(rows[i], vec * 4, acc[i], lse_log2[i]);
      }
    }
  }
}

// Called by all threads of a CTA that has written its partial state of a group. `write` as above, for the rows
// of the result.
template <int kThreads, int kHeadDim, int kTileQ, typename Write>
__device__ __forceinline__ void arrive_and_merge(const Partials<kHeadDim, kTileQ>& partials,
                                                 const MergeTree& tree, int num_rows, Write write) {
  __shared__ u32 smem_is_last;
  const int cta = blockIdx.x;
  int level = 0;
#pragma unroll 1
  for (int stride = 1; stride < tree.num_partials; stride *= tree.fan_in, ++level) {
    const int span = stride * tree.fan_in;  // CTAs below a node
    const bool is_root = tree.num_partials <= span;
    const int in_node = is_root ? 0 : (cta - tree.first_cta) / span * span;
    const int node_cta = tree.first_cta + in_node;
    const int num_partials = min(ceil_div(tree.num_partials - in_node, stride), tree.fan_in);
    const int node_slot = tree.slot_of(node_cta);
    u32* counter = partials.arrival_counters + level * partials.num_slots + node_slot;
    __syncthreads();  // all of the CTA's partial is written before thread 0 says so
    if (threadIdx.x == 0) {
      smem_is_last = atomic_add_acq_rel(counter, 1u) == static_cast<u32>(num_partials - 1);
      if (smem_is_last) *counter = 0;
    }
    __syncthreads();
    if (!smem_is_last) return;
    merge_partials<kThreads>(partials, tree, level, node_cta, stride, num_partials, num_rows,
                             [&](int row, int dim, const float4& value, float lse_log2) {
                               if (is_root) {
                                 write(row, dim, value, lse_log2);
                               } else {
                                 *reinterpret_cast<float4*>(partials.out_at(node_slot, row) + dim) = value;
                                 if (dim == 0) *partials.lse_at(level + 1, node_slot, row) = lse_log2;
                               }
                             });
  }
}

}  // namespace cupyattn
