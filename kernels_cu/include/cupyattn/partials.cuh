// Partial states of a group, merged in the same launch by the CTAs that have left them.
//
// Nobody counts who has arrived. Memory for states is all zero bits between launches, and no word of a state is
// written as zero bits (+0 is written as -0): a word that is not zero is there. So readers need no fence, no counter
// and no barrier, and merge what is there while they wait for the rest.
//
// A *line* is 32 columns of a row, half_t with a common factor (64 bytes, four lanes with 16 each), and a word of 64 bits,
// its *flag*: the row's lse, and that factor, which other lines of the row may have in common. The CTAs that share a
// group share its lines. Each takes its own when its run is done; it reads them in all states of the group and sets
// them back to zero, so that a captured graph can be replayed.
//
// Of large states that would cost too much: every word is written twice and asked for more than once. There a line is 64
// columns, and its flag alone is such a word; what it stands for is written before, and need not be zero at first
// (FlaggedPartials in flagged.cuh).
//
// No thread that has states to write, or that such a thread waits for, waits for another CTA's before; and nobody for a CTA
// that has not started: that one may need the place of those that wait. Where other kernels hold SMs for so long that a CTA is
// done before all have started, it departs, and leaves its lines to those that are done later.
//
// States are merged in an order that their number decides (and, but for fixed splits, how many lines a CTA has, and whether
// of two groups), so results do not depend on who came when.
#pragma once

#include "cupyattn/barrier.cuh"
#include "cupyattn/cp_async.cuh"
#include "cupyattn/state.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

// Words that other CTAs read or write at the same time; in L2, where all SMs see the same.
__device__ __forceinline__ uint4 load_relaxed(const uint4* gmem) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(gmem)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_relaxed(uint4* gmem, const uint4& x) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(gmem), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
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

// Before a flag is written.
__device__ __forceinline__ void fence_acq_rel() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ __forceinline__ void fence_acq_rel_cta() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

// Adds eight columns that have been packed.
__device__ __forceinline__ void add_eight(float (&acc)[8], float weight, const uint4& packed) {
  const u32 words[] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2(words[i]);
    acc[2 * i] += weight * pair.x, acc[2 * i + 1] += weight * pair.y;
  }
}

// By what numbers of a row are multiplied before they are packed, a power of two: `largest`, of the finite ones, then is
// near the top of what half_t holds, so that those down to 2^-28 of it are as exact, and those of less than 2^-40 of it
// become 0. Infinities and NaN stay what they are.
__device__ __forceinline__ float scale_to_pack(float largest, bool all_finite) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);
  // Beside an infinity no more than 2^14: what it is to be multiplied by must not become 0 when it has been weighed.
  const int most = all_finite ? 253 : 127 + 14;
  return __uint_as_float(static_cast<u32>(min(2 * 127 + 14 - exponent, most)) << 23);
}
__device__ __forceinline__ float reciprocal_of_power(float x) {
  return __uint_as_float((254u << 23) - __float_as_uint(x));
}
// The same for parts of a row of which four lanes have eight numbers each, times `factor`, which is not negative. All lanes
// of a warp call it.
template <int kCount>
__device__ __forceinline__ float scale_of_lines(const float (&x)[kCount][8], float factor) {
  const auto largest_of = [&](u32 lanes, auto of_finite) {
    float largest[8] = {};
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool counts = !of_finite.value || fabsf(x[j][i]) * factor < -neg_infinity();
        if (counts) largest[i] = fmaxf(largest[i], fabsf(x[j][i]));
      }
#pragma unroll
    for (int half = 4; half > 0; half /= 2)
#pragma unroll
      for (int i = 0; i < half; ++i) largest[i] = fmaxf(largest[i], largest[i + half]);
    largest[0] = fmaxf(largest[0], __shfl_xor_sync(lanes, largest[0], 1));
    largest[0] = fmaxf(largest[0], __shfl_xor_sync(lanes, largest[0], 2));
    return largest[0] == 0.0f ? 0.0f : largest[0] * factor;
  };
  float largest = largest_of(0xffffffffu, Bool<false>());
  const bool all_finite = largest < -neg_infinity();
  if (__builtin_expect(!all_finite, 0)) largest = largest_of(0xfu << (lane_id() & 28), Bool<true>());
  return scale_to_pack(largest, all_finite);
}

// A line's flag: low word the row's lse in base 2, high word the factor of its numbers, which is not 0.
__device__ __forceinline__ u64 line_flag(float row_lse_log2, float factor) {
  return static_cast<u64>(__float_as_uint(factor)) << 32 | __float_as_uint(row_lse_log2);
}
__device__ __forceinline__ float lse_of(u64 flag) { return __uint_as_float(static_cast<u32>(flag)); }
__device__ __forceinline__ float factor_of(u64 flag) { return __uint_as_float(static_cast<u32>(flag >> 32)); }

// Scratch memory of a launch, by slots. A lane of a line has eight of its columns: as the quads of an MMA have them of a row
// (kOfQuads), pairs that are eight apart; or else as they are read from shared memory.
template <int kHeadDim, int kTileQ, bool kOfQuads = false>
struct Partials {
  static constexpr bool kHasFlags = false;  // of lines
  static constexpr int kLineDims = 32;
  static constexpr int kRowLines = ceil_div(kHeadDim, kLineDims);
  static constexpr int kRowDims = kRowLines * kLineDims;  // the last line may be half empty
  static constexpr int kRowVecs = kRowDims / 8;           // eight columns are a lane's
  // Four of a lane's columns lie side by side, the other four kSpan further: so lanes read rows of floats in shared memory
  // without conflicts. In halves of 512 columns each has its own.
  static constexpr int kSpan = (kRowDims < 256 ? kRowDims : 256) / 2;
  static_assert(!kOfQuads || kRowDims == kHeadDim);

  half_t* out;  // [num_slots, kTileQ, kRowDims], by lines and lanes
  u64* flags;   // [num_slots, kTileQ, kRowLines]

  // Lines are counted over all slots: up to 2^31.
  static __device__ __forceinline__ int line_of(int slot, int line) {
    return slot * (kTileQ * kRowLines) + line;
  }

  // The first of a lane's columns; lane `vec` of a row's kRowVecs, `vec` % 4 of a line's.
  static constexpr __device__ __forceinline__ int first_dim(int vec) {
    if constexpr (kOfQuads) return vec / 4 * kLineDims + vec % 4 * 2;
    return vec / (kSpan / 4) * (2 * kSpan) + vec % (kSpan / 4) * 4;
  }
  // Whether a lane's other four columns exist.
  static __device__ __forceinline__ bool has_more(int first_dim) {
    return kRowDims == kHeadDim || first_dim + kSpan < kHeadDim;
  }
  // Writes a lane's columns of the result to a row of it (Output::Row) that begins at the first.
  template <typename Row>
  static __device__ __forceinline__ void write_result(const Row& row, int first_dim, const float (&x)[8]) {
    if constexpr (kOfQuads) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) row.write(i * 4, x[i], x[i + 1]);
    } else {
      row.write(0, make_float4(x[0], x[1], x[2], x[3]));
      if (has_more(first_dim)) row.write(kSpan, make_float4(x[4], x[5], x[6], x[7]));
    }
  }

  // A lane's columns of kCount lines of a row, kStep apart, `lane` % 4 of each, times `factor`, which is not negative. Rows
  // are counted over all slots. All lanes of a warp call it, whether or not theirs `exists`, but the four of a line alike.
  template <int kStep = 1, int kCount>
  __device__ __forceinline__ void write_lines(int row, int first_line, int lane, const float (&x)[kCount][8],
                                              float factor, float row_lse_log2, bool exists) const {
    const float scale = scale_of_lines(x, factor);
    if (!exists) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const auto word = [&](int i) {
        const u32 packed = pack2<half_t>(x[j][2 * i] * (factor * scale), x[j][2 * i + 1] * (factor * scale));
        return packed != 0 ? packed : 0x80000000u;
      };
      const i64 line = static_cast<i64>(row) * kRowLines + first_line + j * kStep;
      store_relaxed(reinterpret_cast<uint4*>(out + line * kLineDims) + lane,
                    make_uint4(word(0), word(1), word(2), word(3)));
      if (lane == 0) store_relaxed(flags + line, line_flag(row_lse_log2, reciprocal_of_power(scale)));
    }
  }
  // Those of one line, `first` and `second`.
  __device__ __forceinline__ void write(int row, int vec, const float4& first, const float4& second,
                                        float factor, float row_lse_log2, bool exists) const {
    const float x[1][8] = {{first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w}};
    write_lines(row, vec / 4, vec % 4, x, factor, row_lse_log2, exists);
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
  // until all have ended there are marks after the first end. No CTA ends before it has seen that all have started.
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
    unsigned char unused[112];  // so that what lies behind it, of whole sectors, begins at one
  };
  static_assert(sizeof(Memory) == 128 + kMaxCtas * (8 + 2 * sizeof(Share)), "_DEPARTURES_BYTES of runs.py");
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

  // The same, looked up; after a while it is not waited for any more.
  __device__ __forceinline__ bool all_are_there() const {
    constexpr int kMostPolls = 16;
    for (int polls = 0; polls < kMostPolls; ++polls) {
      if (all_are_there(load_relaxed(&memory->counts))) return true;
    }
    return false;
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
  // Whether all lines are set back to zero as soon as they have been read, or (most) when the result has been written.
  static constexpr bool kClearsAtOnce = false;
  static constexpr bool kMayBeNone = false;  // of a line

  GroupSlots group;
  int parts;  // log2

  // As many times four lanes as share the states of a line, in powers of two.
  __device__ __forceinline__ int parts_log2() const { return parts; }
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
    return Partials::line_of(group.slot(state), lines.line);
  }
};

constexpr int kMergeScratch = 40;
constexpr int kHotPolls = 4;  // then other CTAs' copies come first
// Polls, some 80 s: more is a workspace that two launches share. (A sanitizer makes seconds of a launch.)
constexpr int kPatience = 1 << 27;

// Merges lines `line` .. `end_line` - 1 of all their states (GroupStates), and clears them; all threads of `team` call
// it. `wide`: all warps share the states of one line, for many states of few lines. A lane asks for kInFlight states at
// once, or fewer. `scratch`: shared memory of the team, kMergeScratch floats a warp.
// `find(row, dim)` says where columns of the result go (Output::Row), of which `dim` is a lane's first.
template <int kInFlight, int kNumThreads, int kHeadDim, int kTileQ, bool kOfQuads, typename States,
          typename Find>
__device__ __forceinline__ void merge_lines(const Team<kNumThreads>& team,
                                            const Partials<kHeadDim, kTileQ, kOfQuads>& partials,
                                            States states, bool wide, int line, int end_line, float* scratch,
                                            const Find& find) {
  using Slots = Partials<kHeadDim, kTileQ, kOfQuads>;
  constexpr int kWarps = Team<kNumThreads>::kWarps;
  u32 tid = team.tid;
  pin(tid);  // what follows from it is found here, not somewhere before, and kept
  const int lane = tid % 32;
  const int warp = tid / 32;
  // A warp has as many lines at once as there is room for.
  const int parts_log2 = states.parts_log2();
  const int stride = wide ? 8 * kWarps : 1 << parts_log2;
  const int part = tid / 4 & (stride - 1);
  const int lines_at_once = wide ? 1 : kWarps * 8 >> parts_log2;
  // In registers, or they would be read from constant memory for each state.
  half_t* own_out = partials.out + lane % 4 * (Slots::kLineDims / 4);
  u64* flags = partials.flags;
  pin(own_out), pin(flags);
  const auto words_at = [&](int at) {
    return reinterpret_cast<uint4*>(own_out + static_cast<i64>(at) * Slots::kLineDims);
  };
  const auto clear = [&](int at) {
    store_relaxed(words_at(at), make_uint4(0, 0, 0, 0));
    if (lane % 4 == 0) store_relaxed(flags + at, 0);
  };
#pragma unroll 1
  for (line += wide ? 0 : tid / 4 >> parts_log2;; line += lines_at_once) {
    // Lanes beyond the last line help to read it, and write nothing.
    bool exists = line < end_line;
    if (!__any_sync(0xffffffffu, exists)) break;
    const int own_line = min(line, end_line - 1);
    exists = states.enter(own_line, exists);
    const int num_states = states.count();
    // Two states of a line are cleared where they are read, for heads of 256: with narrower ones that took longer. Not
    // if several warps share them: states that do not exist are read as the last one, and others may still wait for it.
    const bool clears_at_once =
        States::kClearsAtOnce || (kHeadDim == 256 && !wide && states.most() <= 2 * stride);
    const int dim = Slots::first_dim(static_cast<u32>(own_line) % Slots::kRowLines * 4 + lane % 4);
    decltype(find(0, 0)) target;
    const auto find_target = [&]() {
      target = find(static_cast<u32>(own_line) / Slots::kRowLines, dim);
      pin(target.out), pin(target.lse);
    };
    if (kInFlight == 2) find_target();  // there are few registers
    SoftmaxState state;
    float acc[8] = {};
    // The next `count` states, or fewer, of each lane. Code that runs once takes longer to fetch than to run, so there is no
    // more of it than is needed.
    const auto take = [&](int begin, auto count) {
      constexpr int kCount = count.value;
      constexpr int kGroup = kCount < 4 ? kCount : 4;
      u64 flag[kCount];
      uint4 value[kCount];
      const auto lines = states.template find_lines<kCount>(begin, stride, own_line);
      const auto line_of = [&](int j) { return states.line_at(lines, j); };
      const auto ask = [&]() {
#pragma unroll
        for (int first = 0; first < kCount; first += kGroup) {
          const bool any = !States::kMayBeNone || begin - part + first * stride < num_states;
#pragma unroll
          for (int j = first; j < first + kGroup; ++j) {
            flag[j] = line_flag(neg_infinity(), 1.0f);  // of none: weighs 0
            value[j] = make_uint4(1, 1, 1, 1);
            if (any) flag[j] = load_relaxed(flags + line_of(j));
            if (any) value[j] = load_relaxed(words_at(line_of(j)));
          }
        }
      };
      const auto all_there = [&]() {
        u32 least = ~0u;  // of words that are not zero where they are there
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const uint4& x = value[j];
          least = min(least, min(min(min(x.x, x.y), min(x.z, x.w)), static_cast<u32>(flag[j] >> 32)));
        }
        return __all_sync(0xffffffffu, least != 0 || !exists);
      };
      ask();
      if (kInFlight > 2) find_target();  // while they are under way
#pragma unroll 1
      for (int polls = 0; !all_there(); ++polls) {
        if (polls >= kHotPolls) {
          if (polls > kPatience) __trap();
          const u64* missing = nullptr;
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            if (flag[j] == 0) missing = flags + line_of(j);
          }
          if (exists && missing != nullptr) {
            while (load_relaxed(missing) == 0) {
              __nanosleep(200);
              if (++polls > kPatience) __trap();
            }
          }
          __syncwarp();
        }
        ask();
      }
      if ((States::kClearsAtOnce || kCount == 2) && clears_at_once && exists) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          if (begin + j * stride >= num_states) break;
          clear(line_of(j));
        }
      }
      float lse[kCount];
      float lse_max = neg_infinity();
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        lse[j] = begin + j * stride < num_states ? lse_of(flag[j]) : neg_infinity();
        lse_max = fmaxf(lse_max, lse[j]);
      }
#pragma unroll 1
      for (int delta = 4; delta < 4 << parts_log2; delta *= 2) {
        lse_max = fmaxf(lse_max, __shfl_xor_sync(0xffffffffu, lse_max, delta));
      }
      const float factor = state.raise(lse_max);
      if (begin != part) {
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] *= factor;
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float weight = state.weight(lse[j]);
        state.sum += weight;
        // What is read instead of a state that does not exist may be an infinity.
        if (begin + j * stride < num_states) add_eight(acc, weight * factor_of(flag[j]), value[j]);
      }
    };
#pragma unroll 1
    for (int begin = part; begin - part < states.most(); begin += kInFlight * stride) {
      const int left = states.most() - begin + part;
      if (kInFlight == 2 || left <= 2 * stride) {
        take(begin, Int<2>());
      } else if (kInFlight == 4 || left <= 4 * stride) {
        take(begin, Int<4>());
      } else {
        take(begin, Int<kInFlight>());
      }
    }
#pragma unroll 1
    for (int delta = 4; delta < 4 << parts_log2; delta *= 2) {  // their maximum is the same
      state.sum += __shfl_xor_sync(0xffffffffu, state.sum, delta);
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[i] += __shfl_xor_sync(0xffffffffu, acc[i], delta);
    }
    if (wide) {
      float* own = scratch + (warp * 4 + lane % 4) * 10;
      if (lane < 4) {
#pragma unroll
        for (int i = 0; i < 8; ++i) own[i] = acc[i];
        own[8] = state.max, own[9] = state.sum;
      }
      team.sync();
      if (tid < 4) {
#pragma unroll 1
        for (int w = 1; w < kWarps; ++w) {
          const float* theirs = own + w * kMergeScratch;
          const float factor = state.raise(theirs[8]);
          const float weight = state.weight(theirs[8]);
          state.sum += weight * theirs[9];
#pragma unroll
          for (int i = 0; i < 8; ++i) acc[i] = factor * acc[i] + weight * theirs[i];
        }
      }
    }
    if (exists && part == 0 && states.has_result()) {
      const float inverse = state.inverse_sum();
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[i] *= inverse;
      Slots::write_result(target, dim, acc);
      target.write_lse(state.lse_log2());
    }
    // All who read the line have what they need.
    __syncwarp();
    if (!clears_at_once && exists) {
#pragma unroll 1
      for (int j = part; j < num_states; j += stride) {
        clear(states.line_at(states.template find_lines<1>(j, stride, own_line), 0));
      }
    }
    if (wide) team.sync();  // the scratch memory is free again
  }
}

}  // namespace cupyattn
