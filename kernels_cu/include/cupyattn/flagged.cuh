// Partial states whose flags tell of what was written before, and how they are merged: a warpgroup gathers lines of a group in
// all its states, in shared memory, and says what they weigh; others add them up. What they are for, and why nobody waits for
// ever, is said in partials.cuh.
#pragma once

#include "cupyattn/barrier.cuh"
#include "cupyattn/cp_async.cuh"
#include "cupyattn/partials.cuh"
#include "cupyattn/run.cuh"
#include "cupyattn/state.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

// As Partials, whose lanes are those of quads; but a line is 64 columns, of which each half is four lanes'.
template <int kHeadDim, int kTileQ>
struct FlaggedPartials {
  static constexpr bool kHasFlags = true;
  static constexpr int kLineDims = 64;
  static constexpr int kRowLines = kHeadDim / kLineDims;

  half_t* out;  // [num_slots, kTileQ, kHeadDim], by halves of lines and lanes
  u64* flags;   // [num_slots, kTileQ, kRowLines], written after all that they stand for, and fence_acq_rel

  // Lines are counted over all slots.
  static __device__ __forceinline__ int line_of(int slot, int line) {
    return slot * (kTileQ * kRowLines) + line;
  }
  __device__ __forceinline__ half_t* line_at(int line) const {
    return out + static_cast<i64>(line) * kLineDims;
  }

  // A lane's columns of kCount halves of lines of a row, as Partials::write_lines; returns the flag that they have in common.
  template <int kCount>
  __device__ __forceinline__ u64 write_lines(int row, int first_line, int lane, const float (&x)[kCount][8],
                                             float factor, float row_lse_log2, bool exists) const {
    const float scale = scale_of_lines(x, factor);
    uint4* words = reinterpret_cast<uint4*>(line_at(row * kRowLines + first_line)) + lane;
    if (exists) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const auto word = [&](int i) {
          return pack2<half_t>(x[j][2 * i] * (factor * scale), x[j][2 * i + 1] * (factor * scale));
        };
        words[j * 4] = make_uint4(word(0), word(1), word(2), word(3));
      }
    }
    return line_flag(row_lse_log2, reciprocal_of_power(scale));
  }
  // The first column of each of a line's eight lanes.
  static __device__ __forceinline__ int first_dim(int line, int lane) {
    return line * kLineDims + lane / 4 * (kLineDims / 2) + lane % 4 * 2;
  }
};

// Lines of a group, as many as there is room for in all of its states; a line of a state is an *item*. One warpgroup gathers
// them, and others add them up.
struct FlaggedRound {
  // So four lines of 132 states at once; a group has no more states than there are SMs.
  static constexpr int kMostItems = 528;
  struct alignas(128) Room {
    uint4 data[kMostItems][8];
    // lse and factor of an item; then its weight and, of the first state's, 1 / the sum of those of its line, of the second's,
    // the line's lse.
    float2 flags[kMostItems];
  };

  const GroupSlots& group;
  int first_line;
  int num_lines;

  __device__ __forceinline__ int item(int state, int line) const { return state * num_lines + line; }
};

// All that a CTA merges, round by round.
template <typename MergeRound>
__device__ __forceinline__ void for_each_round(const TileInfo (&shares)[2], const MergeRound& merge_round) {
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const TileInfo& share = shares[i];
    if (share.num_sharers <= 1) continue;
    const u32 most = FlaggedRound::kMostItems / static_cast<u32>(share.group.num_partials);
    if (most == 0) __trap();  // rather than to find no room for ever
#pragma unroll 1
    for (int line = share.first_line; line < share.end_line; line += most) {
      merge_round(share, FlaggedRound{share.group, line, min(static_cast<int>(most), share.end_line - line)});
    }
  }
}

// By thread `tid` of warpgroup `warpgroup`: waits for the states, copies them and says what they weigh. When it returns, what it
// has copied is there.
template <int kThreads, typename Slots>
__device__ __forceinline__ void gather_lines(const Slots& partials, const FlaggedRound& round,
                                             FlaggedRound::Room& room, int tid, int warpgroup) {
  const u32 num_lines = round.num_lines;
  const int num_states = round.group.num_partials;
  const int num_items = num_lines * num_states;
  const int lane = tid % 32;
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (int first = tid - lane; first < num_items; first += kAtOnce * kThreads) {
    // A lane finds items and waits for them; then eight lanes copy each.
    u32 state = (first + lane) / num_lines;
    u32 line = first + lane - state * num_lines;
    const u32 states_on = kThreads / num_lines;
    const u32 lines_on = kThreads - states_on * num_lines;
    int at[kAtOnce];  // in memory
    u64 flag[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const bool exists = state < num_states;
      at[k] =
          exists ? Slots::line_of(round.group.slot(state), round.first_line + static_cast<int>(line)) : -1;
      flag[k] = exists ? 0 : 1;
      state += states_on, line += lines_on;
      if (line >= num_lines) line -= num_lines, ++state;
    }
    const auto ask = [&]() {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (flag[k] == 0) flag[k] = load_relaxed(partials.flags + at[k]);
      }
    };
    ask();
#pragma unroll 1
    for (int item = first; item < min(num_items, first + kAtOnce * kThreads);
         item += kThreads) {  // the warp's first
#pragma unroll 1
      for (int polls = 0; !__all_sync(0xffffffffu, flag[0] != 0); ++polls) {
        if (polls > kPatience) __trap();
        if (polls >= kHotPolls) __nanosleep(40);
        ask();
      }
      // What a flag tells of was in L2 before it. Copies of 16 bytes read there, by no way through L1 (as others might), and
      // begin when this branch is taken: a fence of all of the GPU, which would be 0.4 us, has nothing left to do.
      fence_acq_rel_cta();
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        const int source = __shfl_sync(0xffffffffu, at[0], i + lane / 8);
        if (source >= 0) {
          cp_async_16(smem_address_of(&room.data[item + i + lane / 8][lane % 8]),
                      reinterpret_cast<const uint4*>(partials.line_at(source)) + lane % 8, true);
        }
      }
      if (at[0] >= 0) {
        room.flags[item + lane] = make_float2(lse_of(flag[0]), factor_of(flag[0]));
        store_relaxed(partials.flags + at[0], 0);
      }
#pragma unroll
      for (int i = 0; i + 1 < kAtOnce; ++i) at[i] = at[i + 1], flag[i] = flag[i + 1];
    }
  }
  cp_async_commit();
  sync_warpgroup(warpgroup);
  // What states weigh. Lanes share those of a line, in powers of two.
  constexpr int kThreadsLog2 = 7;
  static_assert(kThreads == 1 << kThreadsLog2);
  const int parts_log2 = min(max(__clz(num_lines - 1) - (32 - kThreadsLog2), 0), 5);
  const int parts = 1 << parts_log2;
  const int part = tid & parts - 1;
#pragma unroll 1
  for (int first = 0; first < num_lines; first += kThreads >> parts_log2) {
    const int own_line = first + (tid >> parts_log2);
    const int own_states = own_line < num_lines ? num_states : 0;
    SoftmaxState sums;
    float lse_max = neg_infinity();
#pragma unroll 1
    for (int j = part; j < own_states; j += kAtOnce * parts) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        lse_max = fmaxf(lse_max,
                        room.flags[round.item(j + k * parts < own_states ? j + k * parts : j, own_line)].x);
      }
    }
#pragma unroll 1
    for (int delta = 1; delta < parts; delta *= 2) {
      lse_max = fmaxf(lse_max, __shfl_xor_sync(0xffffffffu, lse_max, delta));
    }
    sums.raise(lse_max);
#pragma unroll 1
    for (int j = part; j < own_states; j += kAtOnce * parts) {
      float2 x[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        x[k] = room.flags[round.item(j + k * parts < own_states ? j + k * parts : j, own_line)];
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const float weight = sums.weight(x[k].x);
        if (j + k * parts >= own_states) continue;
        sums.sum += weight;
        room.flags[round.item(j + k * parts, own_line)].x = weight * x[k].y;
      }
    }
#pragma unroll 1
    for (int delta = 1; delta < parts; delta *= 2) {
      sums.sum += __shfl_xor_sync(0xffffffffu, sums.sum, delta);
    }
    __syncwarp();  // the factors have been read
    if (part == 0 && own_states > 0) {
      room.flags[round.item(0, own_line)].y = sums.inverse_sum();
      room.flags[round.item(1, own_line)].y = sums.lse_log2();
    }
  }
  cp_async_wait<0>();
}

// By threads 0 .. kThreads - 1, which wait for each other at `barrier`, what has been gathered: `find(row, dim)` says where
// columns of the result go (Output::Row), of which `dim` is a lane's first.
template <int kThreads, typename Slots, typename Barrier, typename Find>
__device__ __forceinline__ void add_lines(const FlaggedRound& round, FlaggedRound::Room& room,
                                          Barrier& barrier, const Find& find) {
  constexpr int kTeams = kThreads / 8;
  constexpr int kTeamsLog2 = 5;
  static_assert(kTeams == 1 << kTeamsLog2);
  constexpr int kAtOnce = 4;         // items of a lane, or a chain of latencies for each
  const int lane = threadIdx.x % 8;  // eight are a team, and have a line
  const int team = threadIdx.x / 8;
  const int num_lines = round.num_lines;
  const int num_states = round.group.num_partials;
  const auto write = [&](int own_line, const float (&acc)[8]) {
    const u32 line = round.first_line + own_line;
    const auto target = find(line / Slots::kRowLines, Slots::first_dim(line % Slots::kRowLines, lane));
    const float inverse = room.flags[round.item(0, own_line)].y;
#pragma unroll
    for (int i = 0; i < 8; i += 2) target.write(i * 4, acc[i] * inverse, acc[i + 1] * inverse);
    target.write_lse(room.flags[round.item(1, own_line)].y);
  };
  // With fewer lines than teams, several share the states of a line, in powers of two.
  const int parts_log2 = max(__clz(num_lines - 1) - (32 - kTeamsLog2), 0);
  if (num_lines > kTeams) {
#pragma unroll 1
    for (int first = team; first < num_lines; first += kAtOnce * kTeams) {
      float acc[kAtOnce][8] = {};
#pragma unroll 1
      for (int j = 0; j < num_states; ++j) {
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int item = round.item(j, min(first + k * kTeams, num_lines - 1));
          add_eight(acc[k], room.flags[item].x, room.data[item][lane]);
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (first + k * kTeams < num_lines) write(first + k * kTeams, acc[k]);
      }
    }
    return;
  }
  const int parts = 1 << parts_log2;
  const int part = team & parts - 1;
  const int own_line = min(team >> parts_log2, num_lines - 1);
  float acc[8] = {};
#pragma unroll 1
  for (int j = part; j < num_states; j += kAtOnce * parts) {
    float weight[kAtOnce];
    uint4 x[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int item = round.item(min(j + k * parts, num_states - 1), own_line);
      weight[k] = room.flags[item].x;
      x[k] = room.data[item][lane];
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (j + k * parts < num_states) add_eight(acc, weight[k], x[k]);
    }
  }
#pragma unroll 1
  for (int delta = 8; delta < min(8 * parts, 32); delta *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i] += __shfl_xor_sync(0xffffffffu, acc[i], delta);
  }
  if (parts > 4) {  // and several warps', in the place of what has been added up
    barrier.wait();
    float* sums = reinterpret_cast<float*>(room.data[threadIdx.x / 32 * 2]) + lane;
    if (threadIdx.x % 32 < 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i * 8] = acc[i];
    }
    barrier.wait();
#pragma unroll 1
    for (int warp = 1; warp < parts / 4 && part == 0; ++warp) {
      sums += sizeof(room.data[0]) / sizeof(float) * 2;
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[i] += sums[i * 8];
    }
  }
  if (part == 0 && team >> parts_log2 < num_lines) write(own_line, acc);
}

}  // namespace cupyattn
