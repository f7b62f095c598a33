// Partial states of a group, merged in the same launch by the CTAs that have left them.
//
// Each CTA writes its state and adds itself to the group's counter. Few states are merged by the last CTA to
// arrive. Many are cut into slices of columns: the last CTAs to arrive, as many as there are slices, take one each
// and wait for the others. None waits for long: a CTA that has waited in vain, or has other work to do, leaves its
// slice to the very last. So nothing depends on CTAs that could not start yet, and other kernels cannot block it.
//
// States are merged in their order whoever does it, so results do not depend on who came when. The last CTA to
// leave sets the counter back to 0: nothing needs to be cleared between launches, and a captured graph can be
// replayed.
#pragma once

#include "cupyattn/state.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

// Adds, releases what this thread has seen written (its CTA's writes too, after a barrier), acquires what
// other adders have released.
__device__ __forceinline__ u64 atomic_add_acq_rel(u64* gmem, u64 value) {
  u64 old;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(old)
               : "l"(gmem), "l"(value)
               : "memory");
  return old;
}
__device__ __forceinline__ u64 load_acquire(const u64* gmem) {
  u64 value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(gmem) : "memory");
  return value;
}

__device__ __forceinline__ u64 atomic_cas(u64* gmem, u64 expected, u64 value) {
  u64 old;
  asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(old)
               : "l"(gmem), "l"(expected), "l"(value)
               : "memory");
  return old;
}

// What a group's counter holds: states that have arrived, slices left to the last arriver (a bit each), CTAs that
// have left after their slices.
struct GroupCount {
  static constexpr int kMaxSlices = 32;
  static constexpr u64 kArrived = 1;
  static constexpr int kSliceShift = 20;
  static constexpr u64 kLeft = 1ull << (kSliceShift + kMaxSlices);

  u64 bits;

  __device__ __forceinline__ int arrived() const { return bits & ((1 << kSliceShift) - 1); }
  __device__ __forceinline__ u32 abandoned() const { return static_cast<u32>(bits >> kSliceShift); }
  __device__ __forceinline__ int left() const { return bits / kLeft; }
  static __device__ __forceinline__ u64 slice_bit(int slice) { return 1ull << (kSliceShift + slice); }
};

// Scratch memory of a launch, by slots.
template <int kHeadDim, int kTileQ>
struct Partials {
  float* out;       // [num_slots, kTileQ, kHeadDim]
  float* lse_log2;  // [num_slots, kTileQ]
  u64* counters;    // [num_slots], 0 between launches; a group's goes by its first slot

  __device__ __forceinline__ float* out_at(int slot, int row) const {
    return out + static_cast<i64>(slot * kTileQ + row) * kHeadDim;
  }
  __device__ __forceinline__ float* lse_at(int slot, int row) const { return lse_log2 + slot * kTileQ + row; }
};

// Where the states of one group lie: state j in slot first + j * step, but for state 0.
struct GroupSlots {
  int first;
  int step;  // 2 where the slots are CTAs': 2c of the group that CTA c enters halfway, 2c + 1 of the one it leaves
  int num_partials;

  __device__ __forceinline__ int first_slot() const { return first + step - 1; }
  __device__ __forceinline__ int slot(int j) const { return j == 0 ? first_slot() : first + j * step; }
};

// Merges up to 32 states, all rows of them: a warp takes two rows, its lanes the rows' columns, and lane j state j's
// weight. Less code than merge_lines, which is what counts here: it runs once, and waits for its instructions more
// than for the states. `write(row, dim, value, lse_log2)`.
template <int kThreads, int kHeadDim, int kTileQ, typename Write>
__device__ __forceinline__ void merge_few(const Partials<kHeadDim, kTileQ>& partials, const GroupSlots& group,
                                          int num_rows, const Write& write) {
  const int num_partials = group.num_partials;
  constexpr int kVecs = kHeadDim / 4;
  constexpr int kInFlight = 8;  // partials of each of two rows that one round trip to L2 brings
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32;
  // What does not exist is read from a neighbour and weighs 0, or is not written: branches and predicates
  // would cost more than the reads.
  const auto slot_at = [&](int j) { return group.slot(min(j, num_partials - 1)); };
#pragma unroll 1
  for (int first_row = threadIdx.x / 32; first_row < num_rows; first_row += 2 * kWarps) {
    const int rows[2] = {first_row, min(first_row + kWarps, num_rows - 1)};
    float lse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) lse[i] = __ldcg(partials.lse_at(slot_at(lane), rows[i]));
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

__device__ __forceinline__ void merge_into(SoftmaxState& state, float4& acc, float max, float sum,
                                           const float4& x) {
  const float own = state.raise(max);
  const float theirs = state.weight(max);
  state.sum += theirs * sum;
  acc.x = own * acc.x + theirs * x.x, acc.y = own * acc.y + theirs * x.y;
  acc.z = own * acc.z + theirs * x.z, acc.w = own * acc.w + theirs * x.w;
}

// Merges any number of states, lines `first_line` .. + `num_lines` - 1 of their rows; a line is 8 items, 128 bytes, and
// an item 4 columns of a row. 8 lanes take two lines at a time; where there are fewer, several times 8 lanes share
// the states.
// `scratch`: shared memory, 3 floats a thread. `write(row, dim, value, lse_log2)`.
constexpr int kLineItems = 8;
constexpr __host__ __device__ int log2_of(int power) { return power == 1 ? 0 : 1 + log2_of(power / 2); }
template <int kThreads, int kHeadDim, int kTileQ, typename Write>
__device__ __forceinline__ void merge_lines(const Partials<kHeadDim, kTileQ>& partials,
                                            const GroupSlots& group, int first_line, int num_lines,
                                            int num_items, float* scratch, const Write& write) {
  constexpr int kVecs = kHeadDim / 4;
  constexpr int kInFlight = 4;  // states of each item that one round trip to L2 brings
  constexpr int kGroups = kThreads / kLineItems;
  constexpr int kGroupsLog2 = log2_of(kGroups);
  constexpr int kGroupsInWarp = 32 / kLineItems;
  const int lane = threadIdx.x % 32;
  const int num_pairs = ceil_div(num_lines, 2);
  const int pairs_log2 = min(32 - __clz(num_pairs - 1), kGroupsLog2);  // at once; the next power of two
  const int pairs_at_once = 1 << pairs_log2;
  const int num_parts = kGroups >> pairs_log2;  // of the states, each read by 8 lanes
  const int part = threadIdx.x / kLineItems & (num_parts - 1);
  const int last = group.num_partials - 1;
#pragma unroll 1
  for (int first = 0; first < num_pairs; first += pairs_at_once) {
    // What does not exist is read from a neighbour and weighs 0, or is not written: branches and predicates
    // would cost more than the reads.
    const int pair = first + (threadIdx.x / kLineItems >> (kGroupsLog2 - pairs_log2));
    int item[2];
    const float* lse_begin[2];
    const float4* out_begin[2];
    SoftmaxState state[2];
    float4 acc[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int line = first_line + min(pair + i * num_pairs, num_lines - 1);
      item[i] = min(line * kLineItems + lane % kLineItems, num_items - 1);
      lse_begin[i] = partials.lse_log2 + item[i] / kVecs;
      out_begin[i] = reinterpret_cast<const float4*>(partials.out) + item[i];
    }
#pragma unroll 1
    for (int begin = part; begin <= last; begin += kInFlight * num_parts) {
      float lse[kInFlight][2];
      float4 value[kInFlight][2];
      // States come from other SMs: __ldcg reads L2, where they are; L1 could hold an older launch's.
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        int slot = group.first + min(begin + j * num_parts, last) * group.step;
        if (j == 0 && begin == 0) slot = group.first_slot();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          lse[j][i] = __ldcg(lse_begin[i] + slot * kTileQ);
          value[j][i] = __ldcg(out_begin[i] + slot * (kTileQ * kVecs));
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float lse_max = neg_infinity();
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (begin + j * num_parts > last) lse[j][i] = neg_infinity();
          lse_max = fmaxf(lse_max, lse[j][i]);
        }
        const float factor = state[i].raise(lse_max);
        acc[i].x *= factor, acc[i].y *= factor, acc[i].z *= factor, acc[i].w *= factor;
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const float weight = state[i].weight(lse[j][i]);
          state[i].sum += weight;
          acc[i].x += weight * value[j][i].x, acc[i].y += weight * value[j][i].y;
          acc[i].z += weight * value[j][i].z, acc[i].w += weight * value[j][i].w;
        }
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int delta = kLineItems; delta < min(num_parts, kGroupsInWarp) * kLineItems; delta *= 2) {
      const auto other = [&](float x) { return __shfl_xor_sync(0xffffffffu, x, delta); };
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        merge_into(state[i], acc[i], other(state[i].max), other(state[i].sum),
                   make_float4(other(acc[i].x), other(acc[i].y), other(acc[i].z), other(acc[i].w)));
      }
    }
    if (num_parts > kGroupsInWarp) {  // all pairs are under way: this is the only round
      float* own = scratch + (threadIdx.x / 32 * kLineItems + lane % kLineItems) * 12;
      if (lane < kLineItems) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          *reinterpret_cast<float4*>(own + i * 4) = acc[i];
          *reinterpret_cast<float2*>(own + 8 + i * 2) = make_float2(state[i].max, state[i].sum);
        }
      }
      __syncthreads();
      if (part == 0) {
#pragma unroll 1
        for (int w = 1; w < num_parts / kGroupsInWarp; ++w) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float* theirs = own + w * kLineItems * 12;
            const float2 max_sum = *reinterpret_cast<const float2*>(theirs + 8 + i * 2);
            merge_into(state[i], acc[i], max_sum.x, max_sum.y,
                       *reinterpret_cast<const float4*>(theirs + i * 4));
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int line = pair + i * num_pairs;
      if (part == 0 && pair < num_pairs && line < num_lines &&
          (first_line + line) * kLineItems + lane % kLineItems < num_items) {
        const float inverse = state[i].inverse_sum();
        acc[i].x *= inverse, acc[i].y *= inverse, acc[i].z *= inverse, acc[i].w *= inverse;
        write(item[i] / kVecs, item[i] % kVecs * 4, acc[i], state[i].lse_log2());
      }
    }
  }
}

// Called by all threads of a CTA that has written one of a group's states. `is_done`: it has nothing else to do,
// and may wait for others. `scratch`, `write` as above, for the result.
template <int kThreads, int kHeadDim, int kTileQ, typename Write>
__device__ __forceinline__ void arrive_and_merge(const Partials<kHeadDim, kTileQ>& partials,
                                                 const GroupSlots& group, int num_rows, bool is_done,
                                                 float* scratch, const Write& write) {
  // States of items in a slice, which a CTA reads in two round trips to L2. Up to twice as many the last arriver
  // merges alone: for the others, waiting and being waited for costs as much.
  constexpr int kSlice = 16 * kThreads;
  constexpr long long kMaxWait = 1 << 15;  // clocks
  __shared__ u32 smem_slices;              // that this CTA merges, a bit each
  const int n = group.num_partials;
  const int num_items = num_rows * (kHeadDim / 4);
  const int num_lines = ceil_div(num_items, kLineItems);
  int num_slices = 1;
  int lines_per_slice = num_lines;
  if (n * num_items > 2 * kSlice) {
    const u32 most = min(min(ceil_div(n * num_items, kSlice), GroupCount::kMaxSlices), min(num_lines, n));
    lines_per_slice = (num_lines + most - 1) / most;
    num_slices = static_cast<u32>(num_lines + lines_per_slice - 1) / static_cast<u32>(lines_per_slice);
  }
  u64* counter = partials.counters + group.first_slot();
  __syncthreads();  // all of the CTA's state is written before thread 0 says so
  if (threadIdx.x == 0) {
    GroupCount count{atomic_add_acq_rel(counter, GroupCount::kArrived)};
    const int slice = count.arrived() - (n - num_slices);
    u32 slices = slice < 0 ? 0 : 1u << slice;
    if (slice == num_slices - 1) {
      slices |= count.abandoned();
      if (num_slices == 1) *counter = 0;
    } else if (slice >= 0) {
      const long long begin = clock64();
      for (;;) {
        count.bits = load_acquire(counter);
        if (count.arrived() == n) break;
        if (is_done && clock64() - begin < kMaxWait) {
          __nanosleep(32);
        } else if (atomic_cas(counter, count.bits, count.bits | GroupCount::slice_bit(slice)) == count.bits) {
          slices = 0;
          break;
        }
      }
    }
    smem_slices = slices;
  }
  __syncthreads();
  u32 slices = smem_slices;
  if (slices == 0) return;
  if (num_slices == 1 && n <= 32) {
    merge_few<kThreads>(partials, group, num_rows, write);
    return;
  }
#pragma unroll 1
  for (; slices != 0; slices &= slices - 1) {
    const int first_line = (__ffs(slices) - 1) * lines_per_slice;
    merge_lines<kThreads>(partials, group, first_line, min(lines_per_slice, num_lines - first_line),
                          num_items, scratch, write);
    __syncthreads();  // the scratch memory is free again
  }
  if (num_slices > 1 && threadIdx.x == 0) {
    const GroupCount count{atomic_add_acq_rel(counter, GroupCount::kLeft)};
    if (count.left() + 1 + __popc(count.abandoned()) == num_slices) *counter = 0;
  }
}

}  // namespace cupyattn
