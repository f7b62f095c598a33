// Partial states of a group, merged in the same launch by the CTAs that have left them.
//
// Nobody counts who has arrived. Memory for states is all zero bits between launches, and no word of a state is
// written as zero bits (+0 is written as -0): a word that is not zero is there. So readers need no fence, no counter
// and no barrier, and merge what is there while they wait for the rest.
//
// Of large states that would cost too much: every word is written twice and asked for more than once. They are *packed*:
// columns of 16 bits, and a *flag* for every 64 of them, which alone is such a word; what it stands for is written before,
// and need not be zero at first.
//
// A *line* is 16 columns of a row (64 bytes, four lanes with 16 each), or 64 of a packed one, and a copy of the row's
// lse. The CTAs that share a group share its lines. Each takes its own when its run is done; it reads them in all
// states of the group and sets them back to zero, so that a captured graph can be replayed.
//
// Nobody waits before it has written all that others wait for, nor for a CTA that has not started: that one may need
// the place of those that wait. Where other kernels hold SMs for so long that a CTA is done before all have started,
// it departs, and leaves its lines to those that are done later.
//
// States are merged in an order that their number decides (and how many lines a CTA has, but for fixed splits), so
// results do not depend on who came when.
#pragma once

#include "cupyattn/barrier.cuh"
#include "cupyattn/cp_async.cuh"
#include "cupyattn/state.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

// Words that other CTAs read or write at the same time; in L2, where all SMs see the same.
__device__ __forceinline__ float load_relaxed(const float* gmem) {
  float x;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(gmem) : "memory");
  return x;
}
__device__ __forceinline__ float4 load_relaxed(const float4* gmem) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(gmem)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_relaxed(float* gmem, float x) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" : : "l"(gmem), "f"(x) : "memory");
}
__device__ __forceinline__ void store_relaxed(float4* gmem, const float4& x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(gmem), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

__device__ __forceinline__ u64 load_relaxed(const u64* gmem) {
  u64 x;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(gmem) : "memory");
  return x;
}
__device__ __forceinline__ void store_relaxed(u64* gmem, u64 x) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" : : "l"(gmem), "l"(x) : "memory");
}
__device__ __forceinline__ void store_relaxed(u32* gmem, u32 x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" : : "l"(gmem), "r"(x) : "memory");
}
// Returns nothing, so nobody waits for it.
__device__ __forceinline__ void add(u64* gmem, u64 x) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" : : "l"(gmem), "l"(x) : "memory");
}
__device__ __forceinline__ u32 atomic_add(u32* gmem, u32 x) {
  u32 old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(gmem), "r"(x) : "memory");
  return old;
}
__device__ __forceinline__ u64 atomic_cas(u64* gmem, u64 expected, u64 x) {
  u64 old;
  asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(old)
               : "l"(gmem), "l"(expected), "l"(x)
               : "memory");
  return old;
}

__device__ __forceinline__ uint2 load_relaxed(const uint2* gmem) {
  uint2 x;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(gmem) : "memory");
  return x;
}

// Before a flag is written, and after one has been read.
__device__ __forceinline__ void fence_acq_rel() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ __forceinline__ bool is_there(float word) { return __float_as_uint(word) != 0; }
__device__ __forceinline__ float never_zero_bits(float x) { return is_there(x) ? x : -0.0f; }

// Scratch memory of a launch, by slots.
template <int kHeadDim, int kTileQ>
struct Partials {
  static constexpr int kLineDims = 16;
  static constexpr int kRowLines = kHeadDim / kLineDims;

  float* out;       // [num_slots, kTileQ, kHeadDim]
  float* lse_log2;  // [num_slots, kTileQ, kRowLines]: the row's, once a line

  // Lines are counted over all slots: up to 2^31, of 64 bytes or more.
  __device__ __forceinline__ float4* line_at(int line) const {
    return reinterpret_cast<float4*>(out + static_cast<i64>(line) * kLineDims);
  }
  __device__ __forceinline__ float* lse_at(int line) const { return lse_log2 + line; }
  __device__ __forceinline__ int line_of(int slot, int line) const {
    return slot * (kTileQ * kRowLines) + line;
  }
  __device__ __forceinline__ float* row_at(int row) const { return out + static_cast<i64>(row) * kHeadDim; }
  __device__ __forceinline__ float* lse_at_row(int row, int dim) const {
    return lse_log2 + static_cast<i64>(row) * kRowLines + dim / kLineDims;
  }

  // Four columns of a row from `dim` on. Rows are counted over all slots.
  __device__ __forceinline__ void write(int row, int dim, const float4& x, float row_lse_log2) const {
    write4(row_at(row) + dim, x);
    if (dim % kLineDims == 0) write_lse(row, dim, row_lse_log2);
  }

  // The same in steps. First, in a row:
  __device__ __forceinline__ void write4(float* target, float4 x) const {
    x = make_float4(never_zero_bits(x.x), never_zero_bits(x.y), never_zero_bits(x.z), never_zero_bits(x.w));
    store_relaxed(reinterpret_cast<float4*>(target), x);
  }
  // And each line's lse.
  __device__ __forceinline__ void write_lse(int row, int dim, float row_lse_log2) const {
    store_relaxed(lse_at_row(row, dim), never_zero_bits(row_lse_log2));
  }
};

// By what a warp's numbers are multiplied before they are packed, `factor` and a power of two, of which the latter is
// returned: the largest then is near the top of what half_t holds, so that those up to 2^-29 of it are as exact, and
// those of less than 2^-39 of it become 0. Infinities and NaN stay what they are.
__device__ __forceinline__ float scale_to_pack(const float4& x, const float4& y, float factor) {
  const float numbers[] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
  constexpr u32 kInfinity = 0x7f800000;
  u32 largest = 0;  // as bits, which are in the same order
  bool all_finite = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const u32 bits = __float_as_uint(fabsf(numbers[i] * factor));
    all_finite &= bits < kInfinity;
    largest = max(largest, bits < kInfinity ? bits : 0);
  }
  const int exponent = static_cast<int>(__reduce_max_sync(0xffffffffu, largest) >> 23);
  // Beside an infinity no more than 2^14: what it is to be multiplied by must not become 0 when it has been weighed.
  const int most = __all_sync(0xffffffffu, all_finite) ? 253 : 127 + 14;
  return __uint_as_float(static_cast<u32>(min(2 * 127 + 14 - exponent, most)) << 23);
}
__device__ __forceinline__ float reciprocal_of_power(float x) {
  return __uint_as_float((254u << 23) - __float_as_uint(x));
}

// The same of packed states.
template <int kHeadDim, int kTileQ>
struct PackedPartials {
  static constexpr int kLineDims = 64;
  static constexpr int kRowLines = kHeadDim / kLineDims;

  half_t* out;  // [num_slots, kTileQ, kHeadDim], to be multiplied by
  // [num_slots, kTileQ, kRowLines]: low word the row's lse in base 2, high word the factor, which is not 0
  u64* flags;

  __device__ __forceinline__ int line_of(int slot, int line) const {
    return slot * (kTileQ * kRowLines) + line;
  }
  __device__ __forceinline__ half_t* line_at(int line) const {
    return out + static_cast<i64>(line) * kLineDims;
  }
  __device__ __forceinline__ half_t* row_at(int row) const { return out + static_cast<i64>(row) * kHeadDim; }
  // After a barrier of those who have written the line and fence_acq_rel.
  __device__ __forceinline__ void write_flag(int row, int dim, float row_lse_log2, float factor) const {
    const u64 bits = static_cast<u64>(__float_as_uint(factor)) << 32 | __float_as_uint(row_lse_log2);
    store_relaxed(flags + static_cast<i64>(row) * kRowLines + dim / kLineDims, bits);
  }
};

// Where the states of one group lie: state j in slot first + j * step, but for state 0.
struct GroupSlots {
  int first;
  int step;  // 2 where the slots are CTAs': 2c of the group that CTA c enters halfway, 2c + 1 of the one it leaves
  int num_partials;

  __device__ __forceinline__ int slot(int j) const { return first + (j == 0 ? step - 1 : j * step); }
};

// CTAs that have started, and those that have departed since. One thread of a CTA asks.
//
// To know which CTA starts last or is done last takes an atomic that returns something, and for what it returns a
// CTA would wait 0.2 to 1.3 us. So nobody knows, where no CTA has departed: starts and ends are added to one word, such
// that whoever reads it sees whether all have started, and all of it adds up to zero.
template <typename Share>
struct Departures {
  // Three numbers in the word. An end takes its start back and leaves a mark, which CTA 0 takes back for all: so
  // until all are done there are marks after the first end. No CTA ends before it has seen that all have started.
  static constexpr u64 kStart = 1;
  static constexpr u64 kDeparture = 1ull << 16;
  static constexpr u64 kMark = 1ull << 32;
  static constexpr int kMaxCtas = 4096;

  struct alignas(16) Memory {  // all zero between launches; its size is _DEPARTURES_BYTES of runs.py
    u64 counts;
    // Where CTAs have departed, and there are no marks:
    u32 num_taken;
    u32 num_done;
    u64 is_written[kMaxCtas];
    Share shares[kMaxCtas][2];  // of those that have departed, in that order
  };
  static_assert(sizeof(Memory) == 16 + kMaxCtas * (8 + 2 * sizeof(Share)), "_DEPARTURES_BYTES of runs.py");
  Memory* memory;
  u32 num_ctas;

  __device__ __forceinline__ void start() const { add(&memory->counts, kStart); }

  // For a CTA that has started and not ended. Counts may be late: they then say too little.
  __device__ __forceinline__ bool all_started(u64 counts) const {
    return counts >= kMark || counts % kDeparture == num_ctas;
  }
  // And that none has departed.
  __device__ __forceinline__ bool all_are_there(u64 counts) const {
    return counts >= kMark || counts == num_ctas;
  }

  // Ends a run where all are there.
  __device__ __forceinline__ void end() const {
    add(&memory->counts, (blockIdx.x == 0 ? (1ull - num_ctas) * kMark : kMark) - kStart);
  }

  // Ends a run otherwise, with the counts as seen during it. Returns how many CTAs have departed, if all have started;
  // else this one departs too, leaves its two shares to the others, and the result is -1.
  __device__ __forceinline__ int end(u64 seen, const Share (&shares)[2]) const {
    while (!all_started(seen)) {
      const u64 before = seen;
      seen = atomic_cas(&memory->counts, before, before + kDeparture);
      if (seen != before) continue;
      const u32 i = num_departed(before);
      for (int j = 0; j < 2; ++j) memory->shares[i][j] = shares[j];
      __threadfence();
      store_relaxed(&memory->is_written[i], 1);
      return -1;
    }
    const int departed = seen >= kMark ? 0 : num_departed(seen);
    if (departed == 0) end();
    return departed;
  }

  // Takes what one of `departed` CTAs has left; false if others have taken all.
  __device__ __forceinline__ bool take(int departed, Share (&shares)[2]) const {
    const u32 i = atomic_add(&memory->num_taken, 1);
    if (i >= departed) {
      if (atomic_add(&memory->num_done, 1) == num_ctas - departed - 1) {
        store_relaxed(&memory->counts, 0);
        store_relaxed(&memory->num_taken, 0);
        store_relaxed(&memory->num_done, 0);
      }
      return false;
    }
    while (load_relaxed(&memory->is_written[i]) == 0) __nanosleep(100);
    __threadfence();
    memory->is_written[i] = 0;
    for (int j = 0; j < 2; ++j) {
      shares[j] = memory->shares[i][j];
      memory->shares[i][j] = Share{};
    }
    return true;
  }

 private:
  static __device__ __forceinline__ u32 num_departed(u64 counts) {
    return static_cast<u32>(counts) / static_cast<u32>(kDeparture);
  }
};

// The states of a group as merge_lines asks for them, line by line.
template <typename Partials>
struct GroupStates {
  // Whether a line is set back to zero as soon as it has been read, or when the result has been written.
  static constexpr bool kClearsAtOnce = false;

  const Partials& partials;
  const GroupSlots& group;

  // As many times four lanes as share the states of a line, in powers of two: four lanes take four states, eight if
  // there are many.
  __device__ __forceinline__ int parts_log2() const {
    return group.num_partials <= 4 ? 0 : min(30 - __clz(group.num_partials - 1), 3);
  }
  // To a line of the group; false if nothing is to be done for it.
  __device__ __forceinline__ bool enter(int line, bool exists) { return exists; }
  // States of that line, and of any line of the warp at most.
  __device__ __forceinline__ int count() const { return group.num_partials; }
  __device__ __forceinline__ int most() const { return group.num_partials; }
  // Whether what they make is to be written.
  __device__ __forceinline__ bool has_result() const { return true; }
  // Where states begin, begin + step, ... have the line, for `line_at` to say of each; those that do not exist are taken
  // for the last one. Here it is found anew each time, which takes no registers.
  struct Lines {
    int begin, step, line;
  };
  template <int kCount>
  __device__ __forceinline__ Lines find_lines(int begin, int step, int line) const {
    return {begin, step, line};
  }
  __device__ __forceinline__ int line_at(const Lines& lines, int i) const {
    const int state = min(lines.begin + i * lines.step, group.num_partials - 1);
    return partials.line_of(group.slot(state), lines.line);
  }
};

constexpr int kHotPolls = 4;        // then other CTAs' copies come first
constexpr int kPatience = 1 << 25;  // polls, some 20 s: more is a workspace that two launches share

// Merges lines `line` .. `end_line` - 1 of all their states (GroupStates), and clears them; threads 0 .. kThreads - 1
// call it. `wide`: all warps share the states of one line, for many states of few lines. A lane asks for kInFlight
// states at once. `scratch`: shared memory, 24 floats a warp.
// `find(row, dim)` says where four columns of the result go (Output::Row).
template <int kThreads, int kInFlight, int kHeadDim, int kTileQ, typename States, typename Find>
__device__ __forceinline__ void merge_lines(const Partials<kHeadDim, kTileQ>& partials, States states,
                                            bool wide, int line, int end_line, float* scratch,
                                            const Find& find) {
  constexpr int kRowLines = Partials<kHeadDim, kTileQ>::kRowLines;
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  // A warp has as many lines at once as there is room for.
  const int parts_log2 = states.parts_log2();
  const int stride = wide ? 8 * kWarps : 1 << parts_log2;
  const int part = threadIdx.x / 4 & (stride - 1);
  const int lines_at_once = wide ? 1 : kWarps * 8 >> parts_log2;
#pragma unroll 1
  for (line += wide ? 0 : threadIdx.x / 4 >> parts_log2;; line += lines_at_once) {
    // Lanes beyond the last line help to read it, and write nothing.
    bool exists = line < end_line;
    if (!__any_sync(0xffffffffu, exists)) break;
    const int own_line = min(line, end_line - 1);
    exists = states.enter(own_line, exists);
    const int num_states = states.count();
    auto target = find(own_line / kRowLines, own_line % kRowLines * partials.kLineDims + lane % 4 * 4);
    pin(target.out), pin(target.lse);  // not when all is there
    SoftmaxState state;
    float4 acc = {};
#pragma unroll 1
    for (int begin = part; begin - part < states.most(); begin += kInFlight * stride) {
      float lse[kInFlight];
      float4 value[kInFlight];
      const auto lines = states.template find_lines<kInFlight>(begin, stride, own_line);
      const auto line_of = [&](int j) { return states.line_at(lines, j); };  // of none, weighs 0
#pragma unroll 1
      for (int polls = 0;; ++polls) {
        bool all_there = true;
        const float* missing = nullptr;
#pragma unroll
        for (int first = 0; first < kInFlight; first += 4) {
          const bool any = begin - part + first * stride < num_states;
#pragma unroll
          for (int j = first; j < first + 4; ++j) {
            lse[j] = neg_infinity();
            value[j] = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
            if (any) lse[j] = load_relaxed(partials.lse_at(line_of(j)));
            if (any) value[j] = load_relaxed(partials.line_at(line_of(j)) + lane % 4);
          }
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (!is_there(lse[j])) missing = partials.lse_at(line_of(j));
          all_there &= is_there(lse[j]) && is_there(value[j].x) && is_there(value[j].y) &&
                       is_there(value[j].z) && is_there(value[j].w);
        }
        if (__all_sync(0xffffffffu, all_there || !exists)) break;
        if (polls < kHotPolls) continue;
        if (polls > kPatience) __trap();
        if (exists && missing != nullptr) {
          while (!is_there(load_relaxed(missing))) {
            __nanosleep(200);
            if (++polls > kPatience) __trap();
          }
        }
        __syncwarp();
      }
      if (States::kClearsAtOnce && exists) {
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (begin + j * stride >= num_states) break;
          store_relaxed(partials.line_at(line_of(j)) + lane % 4, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
          if (lane % 4 == 0) store_relaxed(partials.lse_at(line_of(j)), 0.0f);
        }
      }
      float lse_max = neg_infinity();
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (begin + j * stride >= num_states) lse[j] = neg_infinity();
        lse_max = fmaxf(lse_max, lse[j]);
      }
#pragma unroll 1
      for (int delta = 4; delta < 4 << parts_log2; delta *= 2) {
        lse_max = fmaxf(lse_max, __shfl_xor_sync(0xffffffffu, lse_max, delta));
      }
      const float factor = state.raise(lse_max);
      acc.x *= factor, acc.y *= factor, acc.z *= factor, acc.w *= factor;
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const float weight = state.weight(lse[j]);
        state.sum += weight;
        acc.x += weight * value[j].x, acc.y += weight * value[j].y;
        acc.z += weight * value[j].z, acc.w += weight * value[j].w;
      }
    }
#pragma unroll 1
    for (int delta = 4; delta < 4 << parts_log2; delta *= 2) {  // their maximum is the same
      const auto add = [&](float& x) { x += __shfl_xor_sync(0xffffffffu, x, delta); };
      add(state.sum), add(acc.x), add(acc.y), add(acc.z), add(acc.w);
    }
    if (wide) {
      float* own = scratch + (warp * 4 + lane % 4) * 6;
      if (lane < 4) {
        own[0] = acc.x, own[1] = acc.y, own[2] = acc.z, own[3] = acc.w, own[4] = state.max,
        own[5] = state.sum;
      }
      sync_threads<kThreads>();
      if (threadIdx.x < 4) {
#pragma unroll 1
        for (int w = 1; w < kWarps; ++w) {
          const float* theirs = own + w * 24;
          const float factor = state.raise(theirs[4]);
          const float weight = state.weight(theirs[4]);
          state.sum += weight * theirs[5];
          acc.x = factor * acc.x + weight * theirs[0], acc.y = factor * acc.y + weight * theirs[1];
          acc.z = factor * acc.z + weight * theirs[2], acc.w = factor * acc.w + weight * theirs[3];
        }
      }
    }
    if (exists && part == 0 && states.has_result()) {
      const float inverse = state.inverse_sum();
      acc.x *= inverse, acc.y *= inverse, acc.z *= inverse, acc.w *= inverse;
      target.write(0, acc);
      target.write_lse(state.lse_log2());
    }
    // All who read the line have what they need.
    __syncwarp();
    if (!States::kClearsAtOnce && exists) {
#pragma unroll 1
      for (int j = part; j < num_states; j += stride) {
        const int at = states.line_at(states.template find_lines<1>(j, stride, own_line), 0);
        store_relaxed(partials.line_at(at) + lane % 4, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        if (lane % 4 == 0) store_relaxed(partials.lse_at(at), 0.0f);
      }
    }
    if (wide) sync_threads<kThreads>();  // the scratch memory is free again
  }
}

// The sum over states of weight x line, for lines `line`, `line` + `line_step`, ... (kLines of those before
// `end_line`) and states `part`, `part` + `num_parts`, ...; 16 lanes share a line.
template <int kLines, int kStates, int kHeadDim, int kTileQ>
__device__ __forceinline__ void add_lines(const PackedPartials<kHeadDim, kTileQ>& partials,
                                          const GroupSlots& group, const float* weights, int line,
                                          int line_step, int end_line, int part, int num_parts,
                                          float4 (&acc)[kLines]) {
#pragma unroll 1
  for (int begin = part; begin < group.num_partials; begin += kStates * num_parts) {
    uint2 value[kLines][kStates];
#pragma unroll
    for (int j = 0; j < kStates; ++j) {
      const int state = begin + j * num_parts;
      const uint2* source =
          reinterpret_cast<const uint2*>(partials.line_at(partials.line_of(group.slot(state), 0))) +
          threadIdx.x % 16;
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
        value[l][j] = make_uint2(0, 0);
        if (state < group.num_partials && line + l * line_step < end_line) {
          value[l][j] = load_relaxed(source + (line + l * line_step) * 16);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kStates; ++j)
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
        const int state = min(begin + j * num_parts, group.num_partials - 1);
        const float weight = weights[l * line_step * group.num_partials + state];
        const float2 first = unpack2(value[l][j].x);
        const float2 second = unpack2(value[l][j].y);
        acc[l].x += weight * first.x, acc[l].y += weight * first.y;
        acc[l].z += weight * second.x, acc[l].w += weight * second.y;
      }
  }
}

// As merge_lines, of packed states: first all flags, which become weights; then the lines, of which there is one at
// least. `scratch`: 16 bytes a thread; for every line a float, and for every state of it two.
template <int kThreads, int kHeadDim, int kTileQ, typename Find>
__device__ __forceinline__ void merge_packed_lines(const PackedPartials<kHeadDim, kTileQ>& partials,
                                                   const GroupSlots& group, int first_line, int end_line,
                                                   float* scratch, const Find& find) {
  constexpr int kRowLines = PackedPartials<kHeadDim, kTileQ>::kRowLines;
  constexpr int kTeams = kThreads / 16;
  const int num_lines = end_line - first_line;
  const int num_states = group.num_partials;
  float4* sums = reinterpret_cast<float4*>(scratch);  // [kThreads]
  float* line_lse = scratch + kThreads * 4;           // [num_lines]
  float* weights = line_lse + num_lines;              // [num_lines][num_states]
  float* factors = weights + num_lines * num_states;  // alike
#pragma unroll 1
  for (int i = threadIdx.x; i < num_lines * num_states; i += kThreads) {
    const int state = static_cast<u32>(i) / static_cast<u32>(num_lines);
    const int line = i - state * num_lines;
    u64* flag = partials.flags + partials.line_of(group.slot(state), first_line + line);
    u64 x = load_relaxed(flag);
    for (int polls = 0; x == 0; ++polls) {
      if (polls > kPatience) __trap();
      if (polls >= kHotPolls) __nanosleep(100);
      x = load_relaxed(flag);
    }
    store_relaxed(flag, 0);
    weights[line * num_states + state] = __uint_as_float(static_cast<u32>(x));
    factors[line * num_states + state] = __uint_as_float(static_cast<u32>(x >> 32));
  }
  fence_acq_rel();
  sync_threads<kThreads>();
  // With few lines, a warp has one, else a thread.
  const bool by_warp = num_lines < 32;
  const int lane = by_warp ? threadIdx.x % 32 : 0;
  const int num_lanes = by_warp ? 32 : 1;
#pragma unroll 1
  for (int line = by_warp ? threadIdx.x / 32 : threadIdx.x; line < num_lines; line += kThreads / num_lanes) {
    float* own = weights + line * num_states;
    SoftmaxState state;
    float lse_max = neg_infinity();
    for (int j = lane; j < num_states; j += num_lanes) lse_max = fmaxf(lse_max, own[j]);
    if (by_warp) {
#pragma unroll
      for (int delta = 1; delta < 32; delta *= 2) {
        lse_max = fmaxf(lse_max, __shfl_xor_sync(0xffffffffu, lse_max, delta));
      }
    }
    state.raise(lse_max);
    for (int j = lane; j < num_states; j += num_lanes) state.sum += own[j] = state.weight(own[j]);
    if (by_warp) {
#pragma unroll
      for (int delta = 1; delta < 32; delta *= 2) {
        state.sum += __shfl_xor_sync(0xffffffffu, state.sum, delta);
      }
    }
    const float inverse = state.inverse_sum();
    for (int j = lane; j < num_states; j += num_lanes) own[j] *= inverse * own[num_lines * num_states + j];
    if (lane == 0) line_lse[line] = state.lse_log2();
  }
  sync_threads<kThreads>();
  // Sixteen lanes are a team. With fewer lines than teams, several share the states of a line.
  const auto finish = [&](int line, const float4& x) {
    const int at = first_line + line;
    const auto target = find(at / kRowLines, at % kRowLines * partials.kLineDims + threadIdx.x % 16 * 4);
    target.write(0, x);
    target.write_lse(line_lse[line]);
  };
  const int team = threadIdx.x / 16;
  if (num_lines >= kTeams) {
    constexpr int kLines = 4;
#pragma unroll 1
    for (int line = team; line < num_lines; line += kLines * kTeams) {
      float4 acc[kLines] = {};
      add_lines<kLines, 4>(partials, group, weights + line * num_states, first_line + line, kTeams, end_line,
                           0, 1, acc);
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
        if (line + l * kTeams < num_lines) finish(line + l * kTeams, acc[l]);
      }
    }
  } else {
    const int num_parts = kTeams / num_lines;
    const int line = team / num_parts;
    float4 acc[1] = {};
    if (line < num_lines) {
      add_lines<1, 8>(partials, group, weights + line * num_states, first_line + line, kTeams, end_line,
                      team % num_parts, num_parts, acc);
    }
    sums[threadIdx.x] = acc[0];
    sync_threads<kThreads>();
    if (line < num_lines && team % num_parts == 0) {
#pragma unroll 1
      for (int i = 1; i < num_parts; ++i) {
        const float4 x = sums[threadIdx.x + i * 16];
        acc[0].x += x.x, acc[0].y += x.y, acc[0].z += x.z, acc[0].w += x.w;
      }
      finish(line, acc[0]);
    }
  }
  sync_threads<kThreads>();  // the scratch memory is free again
}

}  // namespace cupyattn
