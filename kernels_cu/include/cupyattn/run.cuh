// What kernels that walk runs of KV tiles have in common: what a tile is, where results go, how a run ends.
#pragma once

#include "cupyattn/barrier.cuh"
#include "cupyattn/cp_async.cuh"
#include "cupyattn/divide.cuh"
#include "cupyattn/partials.cuh"
#include "cupyattn/schedule.cuh"
#include "cupyattn/state.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

// What a tile is, from the thread that starts its copy to all that use it.
struct alignas(16) TileInfo {
  int token_begin;  // its first key
  int kv_len;
  int begins_segment;
  int ends_segment;
  int q_buffer;  // where the segment's queries lie
  int q_tile;
  int kv_head;
  int qo_begin;
  int qo_len;
  // Where a segment ends:
  GroupSlots group;
  int state_row;  // where the segment's state goes: its first row (partials.cuh)
  int num_sharers;
  int first_line;  // of the group, this CTA's to merge; no others begin at 0 than the first sharer's
  int end_line;

  // The tile that a cursor points at, whose segment began here or earlier.
  template <int kRowLines, int kTileKV, int kTileQ, bool kFixedSplits, bool kQTilesOutermost,
            typename Problem>
  static __device__ __forceinline__ TileInfo
  of(const Cursor<kTileKV, kTileQ, kFixedSplits, kQTilesOutermost>& load, const Problem& problem,
     const Partition& partition, bool begins_segment, bool ends_segment, int q_buffer) {
    TileInfo tile{load.token_begin(), load.request.kv_len, begins_segment, ends_segment,
                  q_buffer,           load.q_tile,         load.kv_head,   load.request.qo_begin,
                  load.request.qo_len};
    if (ends_segment) {
      const int unit = load.unit_in_group(problem);
      const int group_begin = load.unit - unit;
      const int num_units = load.request.num_units_in_group(problem) - problem.group_overhead;
      const int part = kQTilesOutermost && partition.num_parts > 1 ? load.q_tile : 0;
      const int in_part = group_begin - part * partition.part_units;
      const int first_cta = part * partition.part_ctas + partition.cta_of(in_part);
      const int last_cta = part * partition.part_ctas + partition.cta_of(in_part + num_units - 1);
      const int rank = partition.cta - first_cta;  // among those that have a part of the group
      tile.num_sharers = last_cta + 1 - first_cta;
      tile.group = kFixedSplits ? GroupSlots{group_begin, 1, num_units}
                                : GroupSlots{2 * first_cta, 2, tile.num_sharers};
      tile.state_row = tile.group.slot(kFixedSplits ? unit : rank) * kTileQ;
      if constexpr (Problem::kIsCascade) {
        // All states are merged row by row. Two stands for more: what one CTA has of a group is not all there is, but of
        // a request that shares nothing.
        const int level = problem.level_of(load.request_idx);
        if (tile.num_sharers == 1 &&
            !(problem.is_last(level) && problem.shares_nothing(load.request.qo_begin))) {
          tile.group.num_partials = 2;
          tile.state_row = problem.home_of(level, load.kv_head, load.request.qo_begin) + load.q_tile * kTileQ;
        }
        return tile;
      }
      const int num_lines = tile.num_rows<kTileQ>(problem.group_size) * kRowLines;
      const int lines_each =
          static_cast<u32>(num_lines + tile.num_sharers - 1) / static_cast<u32>(tile.num_sharers);
      tile.first_line = min(rank * lines_each, num_lines);
      tile.end_line = min(tile.first_line + lines_each, num_lines);
    }
    return tile;
  }

  // Where each part of the KV heads has a line of its own: from numbers in the part to those of all.
  __device__ __forceinline__ void enter_part(int first_head, int first_slot, int tile_q) {
    kv_head += first_head;
    group.first += first_slot;
    state_row += first_slot * tile_q;
  }

  // Rows of its query tile that exist.
  template <int kTileQ>
  __device__ __forceinline__ int num_rows(const Divisor& group_size) const {
    return min(qo_len * group_size.value - q_tile * kTileQ, kTileQ);
  }
};
static_assert(sizeof(TileInfo) == 64,
              "_TILE_INFO_BYTES of runs.py; no padding, which Share{} need not clear");

template <typename T>
__device__ __forceinline__ void store4(T* gmem, const float4& x) {
  *reinterpret_cast<uint2*>(gmem) = make_uint2(pack2<T>(x.x, x.y), pack2<T>(x.z, x.w));
}

// To a global address, of which the compiler does not know that it is one.
__device__ __forceinline__ void store16(u64 address, const uint4& x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// Where results go.
template <typename T, int kTileQ>
struct Output {
  T* out;      // [num_tokens, num_qo_heads, head_dim], strided
  float* lse;  // [num_tokens, num_qo_heads] or null, natural log
  i64 stride_token, stride_head;
  i64 lse_stride_token, lse_stride_head;
  Divisor group_size;

  // One row of the tile, from `dim` on.
  struct Row {
    T* out;
    float* lse;  // null where this part of the row does not write it

    __device__ __forceinline__ void write(int dim, const float4& value) const { store4(out + dim, value); }
    __device__ __forceinline__ void write(int dim, float x, float y) const {
      *reinterpret_cast<u32*>(out + dim) = pack2<T>(x, y);
    }
    __device__ __forceinline__ void write_lse(float lse_log2) const {
      if (lse != nullptr) *lse = lse_log2 * kLn2;
    }
  };
  __device__ __forceinline__ Row row_at(const TileInfo& tile, int row, int dim) const {
    const int row_in_request = tile.q_tile * kTileQ + row;
    const int token_in_request = group_size.divide(row_in_request);
    const i64 token = tile.qo_begin + token_in_request;
    const int head = tile.kv_head * group_size.value + group_size.modulo(row_in_request, token_in_request);
    return row_of(token, head, dim);
  }
  __device__ __forceinline__ Row row_of(i64 token, int head, int dim) const {
    return {out + token * stride_token + head * stride_head + dim,
            dim == 0 && lse != nullptr ? lse + token * lse_stride_token + head * lse_stride_head : nullptr};
  }
};

// The states of a warp's rows at the end of a segment, from accumulators (wgmma.cuh): `row`, of those of this lane's quad,
// and with kBlocks == 2 `row + 8`. They are partial states or, if complete, results; `result_at(row)` is where these
// go, from this lane's first column on. The second eight rows take the place of the first: code for both would take longer to
// fetch than this to run.
template <int kBlocks = 2, typename Partials, int kNumbers, typename ResultAt>
__device__ __forceinline__ void write_rows(const TileInfo& tile, const Partials& partials,
                                           SoftmaxState (&state)[2], float (&acc)[kNumbers], int first_row,
                                           int num_rows, int lane, const ResultAt& result_at) {
  const bool is_complete = tile.group.num_partials == 1;
  const int quad_row = lane / 4;
#pragma unroll 1
  for (int row = first_row + quad_row, block = 0; row - quad_row < num_rows && block < kBlocks;
       row += 8, ++block) {
    SoftmaxState own = state[0];
    own.sum += __shfl_xor_sync(0xffffffffu, own.sum, 1);
    own.sum += __shfl_xor_sync(0xffffffffu, own.sum, 2);
    const float inverse = own.inverse_sum();
    const bool exists = row < num_rows;
    float x[Partials::kRowLines][8];
#pragma unroll
    for (int line = 0; line < Partials::kRowLines; ++line)
#pragma unroll
      for (int i = 0; i < 8; ++i) x[line][i] = acc[(line * 4 + i / 2) * 4 + i % 2];
    if (!is_complete) {
      partials.write_lines(tile.state_row + row, 0, lane % 4, x, inverse, own.lse_log2(), exists);
    } else if (exists) {
      const auto target = result_at(row);
#pragma unroll
      for (int i = 0; i < kNumbers / 4; ++i) {
        target.write(i * 8, x[i / 4][i % 4 * 2] * inverse, x[i / 4][i % 4 * 2 + 1] * inverse);
      }
      target.write_lse(own.lse_log2());
    }
    if constexpr (kBlocks == 2) {
      state[0] = state[1];
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) acc[i] = acc[i | 2];
    }
  }
}

// Of the group that `tile` has ended a segment of, lines `first_line` .. `end_line` - 1, by `team`. `scratch`: shared
// memory, kMergeScratch floats a warp.
template <int kInFlight, bool kFixedSplits, int kNumThreads, typename T, int kHeadDim, int kTileQ,
          bool kOfQuads>
__device__ __forceinline__ void merge_share(const Team<kNumThreads>& team,
                                            const Partials<kHeadDim, kTileQ, kOfQuads>& partials,
                                            const Output<T, kTileQ>& output, const TileInfo& tile,
                                            int first_line, int end_line, float* scratch) {
  const int num_states = tile.group.num_partials;
  // Four lanes take two states of a line, or more where there are not as many lanes. (How many lines a CTA has depends on its
  // neighbours, which must not matter for fixed splits: four states.)
  bool wide = num_states > 64;
  int parts_log2 = 30 - __clz(num_states - 1);
  if constexpr (!kFixedSplits) {
    const int num_lines = end_line - first_line;
    wide = num_states > (num_lines == 1 ? 32 : 64 * num_lines);
    constexpr int kTeamsLog2 = kNumThreads >= 256 ? 6 : kNumThreads >= 128 ? 5 : kNumThreads >= 64 ? 4 : 3;
    static_assert(kNumThreads == 4 << kTeamsLog2);
    parts_log2 = min(parts_log2 + 1, kTeamsLog2 - 32 + __clz(num_lines - 1));
  }
  const GroupStates<Partials<kHeadDim, kTileQ, kOfQuads>> states{tile.group,
                                                                 wide ? 3 : min(max(parts_log2, 0), 3)};
  merge_lines<kInFlight>(team, partials, states, wide, first_line, end_line, scratch,
                         [&](int row, int dim) { return output.row_at(tile, row, dim); });
}

// How the shares of a CTA are merged: what each half of its threads does one of, so that it waits for memory once, not
// twice. (Sums with fixed splits must not depend on neighbours.)
enum class Halves {
  kNone,
  kOfShares,  // where there are two
  kOfLines,   // where a share is two lines of many states
};

// The shares of a CTA that have several sharers, by threads 0 .. kThreads - 1.
template <int kInFlight, int kThreads, bool kFixedSplits, Halves kHalves, typename Slots, typename T,
          int kTileQ>
__device__ __forceinline__ void merge_shares(const Slots& partials, const Output<T, kTileQ>& output,
                                             const TileInfo (&shares)[2], float* scratch) {
  const auto merge_half = [&](const auto& share, int first_line, int end_line) {  // used or not even compiled
    const auto team = half_of_threads<kThreads>();
    merge_share<kInFlight, kFixedSplits>(team, partials, output, share, first_line, end_line,
                                         scratch + team.half * team.kWarps * kMergeScratch);
  };
  const int half = half_of_threads<kThreads>().half;
  if constexpr (kHalves == Halves::kOfShares) {
    if (shares[0].num_sharers > 1 && shares[1].num_sharers > 1) {
      return merge_half(shares[half], shares[half].first_line, shares[half].end_line);
    }
  }
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const TileInfo& share = shares[i];
    if (share.num_sharers <= 1) continue;
    if constexpr (kHalves == Halves::kOfLines) {
      if (share.end_line - share.first_line == 2 && share.group.num_partials > kThreads / 4) {
        merge_half(share, share.first_line + half, share.first_line + half + 1);
        continue;
      }
    }
    merge_share<kInFlight, kFixedSplits>(all_threads<kThreads>(), partials, output, share, share.first_line,
                                         share.end_line, scratch);
  }
}

// What a run leaves to its end, in shared memory.
struct RunEnd {
  u64 counts[2];       // the first words of Departures::Memory, as they were when asked for
  TileInfo shared[2];  // of the groups that the run enters and leaves halfway
  int num_departed;

  // Threads 0 and 1, before the first segment ends.
  __device__ __forceinline__ void clear() { shared[threadIdx.x].num_sharers = 0; }
  // One thread, where a segment ends that is not all of its group.
  __device__ __forceinline__ void add(const TileInfo& tile) { shared[tile.first_line == 0] = tile; }
  // The same by threads 0 .. 3.
  __device__ __forceinline__ void add_together(const TileInfo& tile) {
    reinterpret_cast<uint4*>(&shared[tile.first_line == 0])[threadIdx.x] =
        reinterpret_cast<const uint4*>(&tile)[threadIdx.x];
  }
  // One thread of a cascade's, instead.
  __device__ __forceinline__ void add_lines(int num_lines, const Partition& partition) {
    shared[0] = share_of_lines(num_lines, partition);
  }
  // A CTA's lines of the whole result.
  static __device__ __forceinline__ TileInfo share_of_lines(int num_lines, const Partition& partition) {
    const int lines_each =
        static_cast<u32>(num_lines + partition.num_ctas - 1) / static_cast<u32>(partition.num_ctas);
    TileInfo share{};
    share.num_sharers = 2;
    share.first_line = min(partition.cta * lines_each, num_lines);
    share.end_line = min(share.first_line + lines_each, num_lines);
    return share;
  }
  // Thread 0, before `merge`: some time, if it is not to wait for them.
  __device__ __forceinline__ void ask(const Departures<TileInfo>& ctas) {
    cp_async_16(smem_address_of(counts), ctas.memory, true);
    cp_async_commit();
  }

  // The threads that wait at `barrier`, thread 0 among them: this CTA's share of the groups that it has only a part of,
  // and what CTAs that have departed left; `merge_shares(shares)` does those of one CTA.
  template <typename Barrier, typename MergeShares>
  __device__ __forceinline__ void merge(const Departures<TileInfo>& ctas, Barrier&& barrier,
                                        const MergeShares& merge_shares) {
    const bool asks = threadIdx.x == 0;
    if (asks) cp_async_wait<0>();
    barrier.wait();  // the counts and the shares are there
    const u64 seen = counts[0];
    const bool all_there = ctas.all_are_there(seen);
    if (__builtin_expect(!all_there, 0)) {
      if (asks) {
        num_departed = ctas.end(seen, shared);
        if (num_departed < 0) shared[0].num_sharers = shared[1].num_sharers = 0;
      }
      barrier.wait();  // all know what is to be done
    } else if (asks) {
      ctas.end();
    }
    while (true) {
      merge_shares(shared);
      if (all_there || num_departed <= 0) return;
      barrier.wait();  // all are done with the shares
      if (asks && !ctas.take(num_departed, shared)) {
        shared[0].num_sharers = shared[1].num_sharers = num_departed = 0;
      }
      barrier.wait();  // the next ones are there
    }
  }
};

}  // namespace cupyattn
