// MLA decode attention for sm_90a: the job of mla.cu, by the tensor cores' asynchronous products.
//
// Grid: one CTA an SM (persistent), each with an equal, contiguous run of KV tiles (schedule.cuh). A tile is 64 keys; a
// query tile kTileQ rows, padded to the 64 of a product, which costs nothing where memory is the limit.
//
// Three warpgroups of 128 threads:
//   scores   one: S = Q K^T over all 576 = 512 + 64 columns, the softmax, and so the weights P and by what O is to be
//            multiplied before. It copies the queries of a segment into the one buffer there is for them.
//   values   two, each with 256 of the 512 columns of O += P V. As soon as it has added half of a tile's keys, it copies
//            its columns of the keys to come into their place: S has been computed of them by then, and nobody else
//            reads these columns. So no place needs to be told empty.
//
//     scores  | S of tile n + 1       | softmax | (waits for the copy) | S of tile n + 2 ...
//     values  | P V of n | copy n + 2           | P V of n + 1 | copy n + 3 ...
//
// Weights pass through shared memory as the registers that the products take them in, once for both warpgroups of
// values, which hold them in registers by the time they say that their place is free. All threads that write or read
// what is told so arrive at its barrier: racecheck does not follow one that arrives for its warp, nor bar.arrive.
//
// Shared memory, in blocks of 64 columns (wgmma.cuh), nine of which are a row:
//   queries            64 rows, 72 KiB
//   keys, values       2 tiles x 64 rows, 72 KiB each; where a segment ends, its results in the place of its last tile
//   weights            8 KiB
// A row of the query tile is (query token, query head): row = token * num_heads + head.
// Partial states are packed (partials.cuh), but for cascades, whose merge takes single rows from all over.

#include "cupyattn/barrier.cuh"
#include "cupyattn/cascade.cuh"
#include "cupyattn/cp_async.cuh"
#include "cupyattn/divide.cuh"
#include "cupyattn/launch.cuh"
#include "cupyattn/paged.cuh"
#include "cupyattn/partials.cuh"
#include "cupyattn/run.cuh"
#include "cupyattn/schedule.cuh"
#include "cupyattn/state.cuh"
#include "cupyattn/wgmma.cuh"

namespace cupyattn {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A call, which nothing in registers outlives: inlined, it would leave the loop before it too few of them. Copies,
// because what a call gets by reference is in memory, and read there again after every asm statement.
template <int kThreads, int kTileKV, typename Problem, typename Ctas, typename Slots, typename Results>
__device__ __noinline__ void merge_apart(RunEnd& run_end, const Problem& problem_in_memory,
                                         const Partition& partition_in_memory, const Ctas& ctas_in_memory,
                                         const Slots& partials_in_memory, const Results& output_in_memory,
                                         float* scratch) {
  const Ctas ctas = ctas_in_memory;
  const Slots partials = partials_in_memory;
  const Results output = output_in_memory;
  if constexpr (Problem::kIsCascade) {
    const Problem problem = problem_in_memory;
    const Partition partition = partition_in_memory;
    run_end.merge<kThreads>(ctas, [&](const TileInfo& share) {
      merge_rows<kThreads, kTileKV>(problem, partition, partials, output, share, scratch);
    });
  } else {
    run_end.merge<kThreads>(
        ctas, [&](const TileInfo& share) { merge_share<kThreads, false>(partials, output, share, scratch); });
  }
}

// What the values must know of a tile's weights, in one word a warp of the scores.
struct TileNote {
  static constexpr u32 kRaises = 1;       // what is there of O is to be multiplied by smem_factors
  static constexpr u32 kEndsSegment = 2;  // smem_stats and smem_tiles say how
  static constexpr u32 kEndsRun = 4;
  u32 bits;

  __device__ __forceinline__ bool raises() const { return bits & kRaises; }
  __device__ __forceinline__ bool ends_segment() const { return bits & kEndsSegment; }
  __device__ __forceinline__ bool ends_run() const { return bits & kEndsRun; }
};

// clang-format off
template <typename T, int kTileQ, typename... Cascade>
__global__ void __launch_bounds__(384, 1)
    mla_sm90_kernel(const T* __restrict__ q_ckv,        // [num_tokens, num_qo_heads, 512], strided
                    const T* __restrict__ q_kpe,        // [num_tokens, num_qo_heads, 64], strided
                    const T* __restrict__ ckv_pages,    // [num_pages, page_size, 512], strided
                    const T* __restrict__ kpe_pages,    // [num_pages, page_size, 64], strided
                    const int* __restrict__ qo_indptr,  // [batch_size + 1] or null
                    const int* __restrict__ kv_indptr,  // [batch_size + 1] or null
                    const int* __restrict__ kv_indices, // page ids
                    const int* __restrict__ kv_lens,    // [batch_size]
                    T* __restrict__ out,                // as q_ckv
                    float* __restrict__ lse,            // [num_tokens, num_qo_heads] or null, natural log
                    float* partial_out,                 // [num_slots, kTileQ, 512], see Partials, PackedPartials
                    float* partial_lse,                 // [num_slots, kTileQ, 32 or 8 pairs], base 2
                    Departures<TileInfo>::Memory* departures,  // all zero between launches, as partial_lse
                                                               // and, if not packed, partial_out
                    i64 q_ckv_stride_token, i64 q_ckv_stride_head,
                    i64 q_kpe_stride_token, i64 q_kpe_stride_head,
                    i64 ckv_stride_page, i64 ckv_stride_token,
                    i64 kpe_stride_page, i64 kpe_stride_token,
                    i64 out_stride_token, i64 out_stride_head,
                    i64 lse_stride_token, i64 lse_stride_head,
                    int batch_size,
                    int num_qo_heads, u32 heads_multiplier, int heads_shift,  // Divisor
                    int page_size, u32 page_multiplier, int page_shift,       // Divisor
                    int table_row_stride,
                    int num_table_entries,              // of kv_indices, to prefetch
                    int split_shift,                    // fixed splits are mla.cu's
                    int max_splits,
                    int window_left,                    // -1: unbounded
                    float sm_scale,
                    float logits_soft_cap,              // 0: none
                    const __grid_constant__ Cascade... cascade) {  // as decode.cu
  // clang-format on
  constexpr int kRows = 64;  // of a product
  constexpr int kTileKV = 64;
  constexpr int kStages = 2;
  constexpr int kThreads = 384;
  constexpr int kValueThreads = 256;
  constexpr int kColumns = 256;    // of O, a warpgroup's
  constexpr int kKpeColumns = 32;  // that it copies
  constexpr int kBlocks = kColumns / kBlockColumns;
  constexpr int kRowBlocks = 2 * kBlocks + 1;  // of all columns
  constexpr int kBlockBytes = kRows * kBlockRowBytes;
  constexpr int kTileBytes = kRowBlocks * kBlockBytes;
  static_assert(kTileKV == kRows, "tiles of keys and of queries are alike");
  constexpr int kLogits = kTileKV / 2;  // of a tile, a thread's
  constexpr int kSteps = kTileKV / 16;  // of P V
  static_assert(kTileQ <= kRows);

  const Divisor heads{num_qo_heads, heads_multiplier, heads_shift};
  const Divisor page{page_size, page_multiplier, page_shift};
  constexpr bool kIsCascade = sizeof...(Cascade) > 0;
  extern __shared__ __align__(1024) unsigned char smem_q[];  // blocks are aligned to 1024 bytes
  const auto make_problem = [&]() {
    return problem_of(departures, smem_q, PageTable{kv_indptr, kv_indices, table_row_stride}, qo_indptr,
                      kv_lens, batch_size, 1, heads, window_left, split_shift, max_splits, cascade...);
  };
  const auto problem = make_problem();
  // Functions: what has an address, for a call to read, is in memory everywhere.
  constexpr bool kPacks = !kIsCascade;
  const auto slots = [&]() {
    if constexpr (kPacks) {
      return PackedPartials<2 * kColumns, kTileQ>{reinterpret_cast<half_t*>(partial_out),
                                                  reinterpret_cast<u64*>(partial_lse)};
    } else {
      return Partials<2 * kColumns, kTileQ>{partial_out, partial_lse};
    }
  };
  using Slots = decltype(slots());
  const auto results = [&]() {
    return Output<T, kTileQ>{out,  lse, out_stride_token, out_stride_head, lse_stride_token, lse_stride_head,
                             heads};
  };

  unsigned char* smem_kv = smem_q + kTileBytes;                                    // [kStages] tiles
  uint4* smem_weights = reinterpret_cast<uint4*>(smem_kv + kStages * kTileBytes);  // [4 warps][kSteps][32]
  // What comes with them: written when weights_empty says so, read before it is said again.
  __shared__ u32 smem_notes[4];  // TileNote, of each warp of the scores
  __shared__ float smem_factors[kRows];
  __shared__ float2 smem_stats[kRows];  // of a segment: 1 / sum, lse in base 2
  // Flags of a segment's packed rows, of each warpgroup of values.
  __shared__ u64 smem_flags[kPacks ? 2 : 1][kTileQ];
  // The last tile of each segment, written with S. Of two at most there are readers: S of a tile waits for the copy, which
  // values start when they are done with the tile before the last, results and all.
  constexpr int kSegments = 4;
  __shared__ TileInfo smem_tiles[kSegments];
  __shared__ RunEnd smem_run_end;
  __shared__ Partition smem_partition;
  __shared__ Positions<kTileQ, kIsCascade ? 1 : 0> smem_positions;  // the scores' own
  __shared__ __align__(8) u64 smem_barriers[kStages + 2];
  const auto full_at = [&](int stage) { return smem_address_of(smem_barriers + stage); };
  const u32 weights_full = smem_address_of(smem_barriers + kStages);
  const u32 weights_empty = weights_full + 8;

  const int tid = threadIdx.x;
  const int warp = uniform(tid / 32);

  // As in decode.cu: offsets and page ids are in L2 when the lengths have come from DRAM.
  problem.template prefetch<kThreads>(num_table_entries);
  touch(q_ckv_stride_token);
  touch(ckv_stride_page);
  touch(lse_stride_head);
  touch(logits_soft_cap);
  if (tid == 0) {
    for (int stage = 0; stage < kStages; ++stage) mbarrier_init(full_at(stage), kValueThreads);
    mbarrier_init(weights_full, kThreads - kValueThreads);
    mbarrier_init(weights_empty, kValueThreads);
  }
  if (tid < 2) smem_run_end.clear();

  using Tiles = Cursor<kTileKV, kTileQ, false, !kIsCascade>;
  __shared__ Tiles smem_run;
  Partition partition;
  Tiles run;
  // With barriers, after which all that is said above is there.
  const bool has_run = begin_run<kThreads>(problem, run, partition);
  if (!has_run) {
    wait_for_predecessor();  // or this kernel could be done before the one that its successor relies on
    return;
  }
  partition.number_ctas();
  if (tid == 0) smem_partition = partition, smem_run = run;
  __syncthreads();

  if (warp >= kValueThreads / 32) {
    // --- Scores ---
    give_registers<104>();
    Tiles load = smem_run;
    const int lane = lane_id();
    const int warp_row = (warp - kValueThreads / 32) * 16;  // the warp's first row
    const int quad_row = lane / 4;
    const int quad_col = lane % 4 * 2;
    const auto num_rows_of = [&]() {
      return min(load.request.qo_len * num_qo_heads - load.q_tile * kTileQ, kTileQ);
    };
    // The queries of the segment that the cursor points at. Rows of a warp that has others are zeros; those of other
    // warps are nobody's.
    const auto copy_queries = [&]() {
      const int lane = lane_id();  // anew, or what follows from it would be kept all the time
      const int num_rows = num_rows_of();
      const int rows_each = ceil_div(num_rows, 16) * 4;
      const int first = (warp - kValueThreads / 32) * rows_each;
      const int own_row = load.q_tile * kTileQ + min(first + lane, num_rows - 1);  // a lane finds a row
      const int token_in_request = heads.divide(own_row);
      const int head = heads.modulo(own_row, token_in_request);
      const i64 token = problem.row_of(load.request.qo_begin + token_in_request);
      const u64 ckv_row =
          reinterpret_cast<u64>(q_ckv + token * q_ckv_stride_token + head * q_ckv_stride_head);
      const u64 kpe_row =
          reinterpret_cast<u64>(q_kpe + token * q_kpe_stride_token + head * q_kpe_stride_head);
#pragma unroll 1
      for (int i = lane / 8; i < rows_each; i += 4) {  // eight lanes a row, 128 bytes at once
        const int row = first + i;
        const u32 target = smem_address_of(smem_q) + block_offset(row, lane % 8);
        const T* source = reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, ckv_row, i)) + lane % 8 * 8;
#pragma unroll
        for (int block = 0; block < kRowBlocks - 1; ++block) {
          cp_async_16(target + block * kBlockBytes, source + block * kBlockColumns, row < num_rows);
        }
        source = reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, kpe_row, i)) + lane % 8 * 8;
        cp_async_16(target + (kRowBlocks - 1) * kBlockBytes, source, row < num_rows);
      }
      cp_async_commit();
    };
    wait_for_predecessor();
    copy_queries();

    SoftmaxState state[2];  // rows quad_row and quad_row + 8 of the warp; `sum` over this lane's keys only
    int last[2];            // the last key that they see, or in a cascade where they stand
    int2 seen;              // the first and last key that all rows see
    bool has_rows = false;  // else a warp takes part in products alone
    bool begins_segment = true;
    int segment = 0;
    int stage = 0;
    u32 full_parity = 0;
    u32 parity = 0;
#pragma unroll 1
    while (true) {
      if (begins_segment) {
        const int num_rows = num_rows_of();
        has_rows = warp_row < num_rows;
        state[0] = state[1] = SoftmaxState();
        if constexpr (kIsCascade) {
          if (warp == kValueThreads / 32) smem_positions.template write<true>(problem, load, 0);
        } else {
          const int first_row = load.q_tile * kTileQ;
          const auto last_key_of = [&](int row) {
            return load.request.kv_len - load.request.qo_len +
                   heads.divide(first_row + min(row, num_rows - 1));
          };
          last[0] = last_key_of(warp_row + quad_row);
          last[1] = last_key_of(warp_row + quad_row + 8);
          seen = make_int2(window_left < 0 ? 0 : last_key_of(num_rows - 1) - window_left, last_key_of(0));
        }
        cp_async_wait<0>();
        sync_warpgroup(2);  // the queries are there
        if constexpr (kIsCascade) {
          // Beyond kTileQ are rows of zeros.
          last[0] = smem_positions.rows[0][min(warp_row + quad_row, kTileQ - 1)];
          last[1] = smem_positions.rows[0][min(warp_row + quad_row + 8, kTileQ - 1)];
          seen = smem_positions.seen[0];
        }
      }
      mbarrier_wait(full_at(stage), full_parity);
      float s[kLogits];
      {
        const Operand q_operand = swizzled_operand(uniform(smem_address_of(smem_q)), 0);
        const Operand k_operand = swizzled_operand(uniform(smem_address_of(smem_kv) + stage * kTileBytes), 0);
        fence_async_proxy();
        wgmma_fence();
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            wgmma_ss<T>(s, advance(q_operand, block * kBlockBytes + step * 32),
                        advance(k_operand, block * kBlockBytes + step * 32), block + step > 0);
          }
        wgmma_commit();
      }
      // Meanwhile, what the tile is, and on to the next one.
      const int token_begin = load.token_begin();
      const int kv_len = load.request.kv_len;
      const bool all_seen = token_begin >= seen.x && token_begin + kTileKV - 1 <= seen.y;
      const bool ends_segment = uniform(load.ends_segment(problem));
      const bool begins = begins_segment;
      if (ends_segment && warp == kValueThreads / 32) {
        TileInfo tile =
            TileInfo::of<Slots::kRowLines>(load, problem, smem_partition, begins_segment, true, 0);
        if (lane == 0) {
          smem_tiles[segment % kSegments] = tile;
          if (!kIsCascade && tile.group.num_partials > 1) smem_run_end.add(tile);
        }
      }
      begins_segment = ends_segment;
      segment += ends_segment;
      load.advance(problem);
      const bool ends_run = uniform(load.done());
      wgmma_wait<0>();
      if (ends_segment && !ends_run) {
        sync_warpgroup(2);  // all four warps are done with the queries
        copy_queries();
      }

      u32 note = (ends_segment ? TileNote::kEndsSegment : 0) | (ends_run ? TileNote::kEndsRun : 0);
      float factor[2] = {1.0f, 1.0f};
      float scale = sm_scale * kLog2E;  // logits of base 2 are s * scale
      if (has_rows) {
        if (logits_soft_cap > 0.0f || !(sm_scale > 0.0f)) {
          // A capped logit is cap * tanh(s * sm_scale / cap).
          const float inverse_cap = reciprocal_approx(logits_soft_cap);
#pragma unroll
          for (int i = 0; i < kLogits; ++i) {
            s[i] = logits_soft_cap > 0.0f
                       ? logits_soft_cap * kLog2E * tanh_accurate(s[i] * (sm_scale * inverse_cap))
                       : s[i] * scale;
          }
          scale = 1.0f;
        }
        // What a row must not see is -inf. Most tiles are seen whole by every row.
        if (!all_seen) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto is_hidden = [&](int token) {
              if constexpr (kIsCascade) return problem.is_hidden(token, last[half], kv_len);
              return token > last[half] || (window_left >= 0 && token < last[half] - window_left);
            };
#pragma unroll
            for (int n = 0; n < kTileKV / 8; ++n)
#pragma unroll
              for (int column = 0; column < 2; ++column) {
                if (is_hidden(token_begin + n * 8 + quad_col + column)) {
                  s[n * 4 + half * 2 + column] = neg_infinity();
                }
              }
          }
        }

        // Online softmax. The four lanes of a quad have a row. Weights up to 2^8 are as exact as those up to 1, so the
        // maximum is left alone until a logit is so far above it.
        constexpr float kSlack = 8.0f;
        float logit_max[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          logit_max[half] = neg_infinity();
#pragma unroll
          for (int n = 0; n < kTileKV / 8; ++n) {
            logit_max[half] = fmaxf(logit_max[half], fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]));
          }
          logit_max[half] *= scale;
        }
        if (__any_sync(0xffffffffu,
                       logit_max[0] > state[0].max + kSlack || logit_max[1] > state[1].max + kSlack)) {
          if (!begins) note |= TileNote::kRaises;  // there is nothing of O yet
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = logit_max[half];
            x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
            x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
            factor[half] = state[half].raise(x);
          }
        }
      }
      mbarrier_wait(weights_empty, parity ^ 1);
      parity ^= 1;
      if (has_rows) {
        const float offset[2] = {state[0].offset(), state[1].offset()};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          u32 p[4];  // the A operand of 16 keys
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float* pair = s + (step * 2 + n) * 4 + half * 2;
              const float x = exp2_approx(fmaf(pair[0], scale, -offset[half]));
              const float y = exp2_approx(fmaf(pair[1], scale, -offset[half]));
              state[half].sum += x + y;
              p[n * 2 + half] = pack2<T>(x, y);
            }
          smem_weights[((warp - kValueThreads / 32) * kSteps + step) * 32 + lane] =
              make_uint4(p[0], p[1], p[2], p[3]);
        }
        if (note & TileNote::kRaises && quad_col == 0) {
          smem_factors[warp_row + quad_row] = factor[0];
          smem_factors[warp_row + quad_row + 8] = factor[1];
        }
        if (ends_segment) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            state[half].sum += __shfl_xor_sync(0xffffffffu, state[half].sum, 1);
            state[half].sum += __shfl_xor_sync(0xffffffffu, state[half].sum, 2);
            if (quad_col == 0) {
              smem_stats[warp_row + half * 8 + quad_row] =
                  make_float2(state[half].inverse_sum(), state[half].lse_log2());
            }
          }
        }
      }
      if (lane == 0) smem_notes[warp - kValueThreads / 32] = note;
      mbarrier_arrive(weights_full);
      if (ends_run) break;
      stage ^= 1;
      full_parity ^= stage == 0;
    }
    return;
  }

  // --- Values: two warpgroups, each with half of the columns ---
  take_registers<200>();
  Tiles load = smem_run;  // anew: registers that other warps have not are spilled before
  const int group = warp / 4;
  const auto ctas = [&]() {
    return Departures<TileInfo>{departures, static_cast<u32>(smem_partition.num_ctas)};
  };
  {
    // A warp copies eight rows of each half of a tile, its half of the columns.
    const int warp_row = warp % 4 * 16;
    const auto row_of = [&](int i) { return warp % 4 * 8 + (i < 8 ? i : 24 + i); };
    const PageStrides ckv_strides{ckv_stride_page, ckv_stride_token, 0};
    const PageStrides kpe_strides{kpe_stride_page, kpe_stride_token, 0};
    // Lanes 0 .. 15 find rows of ckv, the others those of kpe, one tile before the copy.
    const auto keys_left = [&]() { return load.done() ? 0 : load.request.kv_len - load.token_begin(); };
    int found_page = 0;
    int found_token = 0;
    const auto find_row = [&]() {  // starts the read of the page table
      const int row = row_of(lane_id() % 16);
      if (row >= keys_left()) return;
      const int token = load.token_begin() + row;
      const int entry = page.divide(token);
      found_page = static_cast<int>(load_early(load.pages + entry));
      found_token = page.modulo(token, entry);
    };
    const auto found_row = [&]() {
      return reinterpret_cast<u64>(
          lane_id() >= 16 ? kpe_pages + group * kKpeColumns + kpe_strides.offset(found_page, found_token, 0)
                          : ckv_pages + group * kColumns + ckv_strides.offset(found_page, found_token, 0));
    };
    // Where CTAs with other query tiles read the same keys, these must stay in L2 for a while.
    const bool reads_once = smem_partition.num_parts == 1;
    find_row();
    if (const int lane = lane_id();
        row_of(lane % 16) < keys_left() &&
        (!kIsCascade || window_left < 0)) {  // the first keys are on their way into L2
      const char* row = reinterpret_cast<const char*>(found_row());
#pragma unroll 1
      for (int i = 0; i < (lane < 16 ? kColumns : kKpeColumns) * 2; i += 128) prefetch_l2(row + i);
    }
    wait_for_predecessor();
    // Not earlier: the next kernel may rely on all before us having finished once we have.
    launch_dependents();
    if (tid == 0) ctas().start();

    // The tile to copy, while the cursor is at the next one.
    bool begins_segment = true;
    int first_seen = 0;  // of a cascade's segment, the first key in anybody's window
    u64 row_address = 0;
    int num_keys = 0;
    int num_hidden = 0;  // before first_seen
    u64 policy = 0;
    const auto take_tile = [&]() {
      if (uniform(load.done())) return false;
      row_address = found_row();
      num_keys = keys_left();
      const bool reads_this_once = kIsCascade ? load.request.qo_len * num_qo_heads <= kTileQ : reads_once;
      policy = reads_this_once ? evict_first_policy() : evict_normal_policy();
      if constexpr (kIsCascade) {
        if (window_left >= 0) {
          if (begins_segment) first_seen = problem.template first_seen<kTileQ>(load);
          num_hidden = first_seen - load.token_begin();
        }
      }
      begins_segment = load.ends_segment(problem);
      load.advance(problem);
      find_row();
      return true;
    };
    // Half of its keys. Those past the end read nothing and become zeros: what lies there may be NaN, and 0 * NaN leaks.
    const auto copy_half = [&](int half, int stage) {
      const int lane = lane_id();
      const u32 smem_tile = smem_address_of(smem_kv) + stage * kTileBytes;
      const auto is_read = [&](int row) { return row < num_keys && (!kIsCascade || row >= num_hidden); };
#pragma unroll
      for (int i = half * 8; i < half * 8 + 8; i += 4) {  // eight lanes a row, 128 bytes at once
        const int row = row_of(i + lane / 8);
        const bool exists = is_read(row);
        const T* source =
            reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, row_address, i + lane / 8)) + lane % 8 * 8;
        if (!exists) source = ckv_pages;
        u32 target = smem_tile + group * kBlocks * kBlockBytes + block_offset(row, lane % 8);
        pin(target);  // ptxas (13.0) encodes a sum with a uniform register wrongly
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          cp_async_16(target + block * kBlockBytes, exists ? source + block * kBlockColumns : source, exists,
                      policy);
        }
      }
      // Four lanes a row of kpe.
      const int row = row_of(half * 8 + lane / 4);
      const bool exists = is_read(row);
      const T* source =
          reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, row_address, 16 + half * 8 + lane / 4)) +
          lane % 4 * 8;
      cp_async_16(
          smem_tile + 2 * kBlocks * kBlockBytes + block_offset(row, group * (kKpeColumns / 8) + lane % 4),
          exists ? source : ckv_pages, exists, policy);
    };
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) {
      if (!take_tile()) break;
      copy_half(0, stage);
      copy_half(1, stage);
      mbarrier_arrive_after_copies(full_at(stage));
    }

    float acc[kColumns / 2] = {};  // [kColumns / 8][4]
    int segment = 0;
    int stage = 0;
    u32 full_parity = 0;
    u32 parity = 0;
#pragma unroll 1
    while (true) {
      mbarrier_wait(full_at(stage), full_parity);  // it is over when the weights are there
      fence_async_proxy();
      mbarrier_wait(weights_full, parity);
      parity ^= 1;
      const TileNote note{static_cast<u32>(uniform(smem_notes[warp % 4]))};
      const int lane = lane_id();
      u32 p[kSteps][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint4 x = smem_weights[(warp % 4 * kSteps + step) * 32 + lane];
        p[step][0] = x.x, p[step][1] = x.y, p[step][2] = x.z, p[step][3] = x.w;
      }
      if (note.raises()) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float factor = smem_factors[warp_row + half * 8 + lane / 4];
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n)
            acc[n * 4 + half * 2] *= factor, acc[n * 4 + half * 2 + 1] *= factor;
        }
      }
      if (!note.ends_segment()) mbarrier_arrive(weights_empty);
      // O += P V
      const int tile_offset = kTileBytes + stage * kTileBytes + group * kBlocks * kBlockBytes;
      const Operand v_operand = swizzled_operand(uniform(smem_address_of(smem_q) + tile_offset), kBlockBytes);
      wgmma_fence();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int step = half * kSteps / 2; step < (half + 1) * kSteps / 2; ++step) {
          wgmma_rs<T>(acc, p[step], advance(v_operand, step * 16 * kBlockRowBytes));
        }
        wgmma_commit();
      }
      if (note.ends_run() && warp == 0 && lane == 0) smem_run_end.ask(ctas());
      // The tile's place goes to the one after the next, by halves of the keys.
      const bool copies = take_tile();
      wgmma_wait<1>();
      if (copies && !note.ends_segment()) {
        sync_warpgroup(group);  // all four warps are done with the first half
        copy_half(0, stage);
      }
      wgmma_wait<0>();
      sync_warpgroup(group);
      if (note.ends_segment()) {
        // --- The segment's state is the result or the run's partial state. ---
        const TileInfo& last = smem_tiles[segment % kSegments];
        ++segment;
        const bool is_complete = last.group.num_partials == 1;
        const int lane = lane_id();  // anew, or what follows from it would be kept all the time
        const int num_rows = last.num_rows<kTileQ>(heads);
        constexpr int kWarpRows = kTileQ / 4;  // that a warp writes, where all warps write some
        const int first_row = warp % 4 * kWarpRows;
        const float2 own_stats = smem_stats[first_row + lane % kWarpRows];  // a lane has such a row
        if (kPacks || is_complete) {
          // Its numbers, of 16 bits, take the place of the tile's values: rows of 512 bytes, with chunks of 16 XORed with
          // the row's last three bits, so that neither columns of pairs nor rows are in the same banks.
          constexpr int kRowBytes = kColumns * 2;
          const float2 stats[2] = {smem_stats[warp_row + lane / 4], smem_stats[warp_row + lane / 4 + 8]};
          mbarrier_arrive(weights_empty);
          const u32 place = smem_address_of(smem_q) + tile_offset;
          if (warp_row < num_rows) {
            float factor[2] = {stats[0].x, stats[1].x};
            if (kPacks && !is_complete) {
              // A quad has a row of this half of the columns.
              const auto largest_of = [&](int half, auto of_finite) {
                float largest = 0.0f;
#pragma unroll
                for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
                  for (int i = 0; i < 2; ++i) {
                    const float x = fabsf(acc[n * 4 + half * 2 + i]);
                    if (!of_finite.value || x < -neg_infinity()) largest = fmaxf(largest, x);
                  }
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
                return fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2)) * factor[half];
              };
              float largest[2] = {largest_of(0, Bool<false>()), largest_of(1, Bool<false>())};
              const bool all_finite[2] = {largest[0] < -neg_infinity(), largest[1] < -neg_infinity()};
              if (__any_sync(0xffffffffu, !(all_finite[0] && all_finite[1]))) {
                largest[0] = largest_of(0, Bool<true>());
                largest[1] = largest_of(1, Bool<true>());
              }
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const float scale = scale_to_pack(largest[half], all_finite[half]);
                factor[half] *= scale;
                if (lane % 4 == 0) {
                  smem_flags[group][warp_row + half * 8 + lane / 4] =
                      packed_flag(stats[half].y, reciprocal_of_power(scale));
                }
              }
            }
            const u32 first = place + (warp_row + lane % 16) * kRowBytes + 16 * (lane / 16 ^ lane % 8);
            const auto pack = [&](auto type) {
              using Packed = decltype(type);
#pragma unroll
              for (int n = 0; n < kColumns / 8; n += 2) {
                u32 x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  const float* pair = acc + (n + i / 2) * 4 + i % 2 * 2;
                  x[i] = pack2<Packed>(pair[0] * factor[i % 2], pair[1] * factor[i % 2]);
                }
                stmatrix_x4((first ^ n % 8 * 16) + n / 8 * 128, x);
              }
            };
            if (is_complete) {
              pack(T());
            } else if constexpr (kPacks) {
              pack(half_t());
            }
          }
          if constexpr (kTileQ < kRows) {
            sync_warpgroup(group);
          } else {
            __syncwarp();  // a warp writes the rows that it has packed
          }
          const int own_row = first_row + lane % kWarpRows;
          u64 own_target;
          if (is_complete) {
            const auto result = [&]() {
              const int row = min(own_row, num_rows - 1);
              if constexpr (kIsCascade) return result_row(problem, results(), last, row, 0);
              return results().row_at(last, row, 0);
            }();
            own_target = reinterpret_cast<u64>(result.out + group * kColumns);
            if (group == 0 && lane < kWarpRows && own_row < num_rows) result.write_lse(own_stats.y);
          } else {
            own_target = reinterpret_cast<u64>(slots().row_at(last.state_row + own_row) + group * kColumns);
          }
#pragma unroll 4
          for (int row = first_row; row < first_row + kWarpRows; ++row) {
            const uint4 x = *reinterpret_cast<const uint4*>(smem_q + tile_offset + row * kRowBytes +
                                                            16 * (lane ^ row % 8));
            const u64 target = __shfl_sync(0xffffffffu, own_target, row - first_row);
            if (row < num_rows) store16(target + lane * 16, x);
          }
          if constexpr (kPacks) {
            if (!is_complete) {
              __syncwarp();
              fence_acq_rel();  // flags after what they stand for
              constexpr int kHalfLines = Slots::kRowLines / 2;
#pragma unroll 1
              for (int i = lane; i < kWarpRows * kHalfLines; i += 32) {
                const int row = first_row + i / kHalfLines;
                const int line = group * kHalfLines + i % kHalfLines;
                if (row < num_rows) {
                  store_relaxed(slots().flag_at(0, (last.state_row + row) * Slots::kRowLines + line),
                                smem_flags[group][row]);
                }
              }
            }
          }
        } else if constexpr (!kPacks) {
          // Pairs of columns that a quad has of a row: through shared memory, a warp writes 128 next to each other; and
          // where there are few rows, each warp some of them. Four columns lie in a place that is XORed with twice the
          // row's last two bits, so that rows are in different banks.
          constexpr bool kShares = kTileQ < kRows;
          constexpr int kRowPlaces = kColumns / 4;
          const int quad_row = lane / 4;
          mbarrier_arrive(weights_empty);
          float4* staging =
              reinterpret_cast<float4*>(smem_q + tile_offset) + (kShares ? 0 : warp % 4 * 8 * kRowPlaces);
          const auto stage_rows = [&](int half, int row) {
            float2* pairs[4];  // where columns 8n + 2t, + 1 lie, by n % 4
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              pairs[n] = reinterpret_cast<float2*>(staging + (row + quad_row) * kRowPlaces +
                                                   (n ^ quad_row % 4) * 2) +
                         lane % 4;
            }
#pragma unroll
            for (int n = 0; n < kColumns / 8; ++n) {
              pairs[n % 4][n / 4 * 16] = make_float2(acc[n * 4 + half * 2], acc[n * 4 + half * 2 + 1]);
            }
          };
          if constexpr (kShares) {
            if (warp_row < kTileQ) stage_rows(0, warp_row), stage_rows(1, warp_row + 8);
            sync_warpgroup(group);
          }
          const int rows_left = num_rows - first_row;  // from the warp's first one on
          if (rows_left > 0) {
            const auto partials = slots();
            const int own_row = first_row + min(lane % kWarpRows, rows_left - 1);
            const u64 own_target =
                reinterpret_cast<u64>(partials.row_at(last.state_row + own_row) + group * kColumns);
            // Rows begin .. end - 1 of the warp, from the first place on; several at once, without branches: a row alone
            // is a chain of latencies.
            const auto write = [&](const float4* places, int begin, int end) {
              constexpr int kAtOnce = kShares ? 4 : 2;  // there are no registers for more
#pragma unroll 1
              for (int first = begin; first < end; first += kAtOnce, places += kAtOnce * kRowPlaces) {
                float4 x[kAtOnce][2];
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
                  for (int i = 0; i < 2; ++i)
                    x[j][i] = places[j * kRowPlaces + (i * 32 + lane ^ (first + j) % 4 * 2)];
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) {
                  const float factor = __shfl_sync(0xffffffffu, own_stats.x, first + j);
                  const u64 target = __shfl_sync(0xffffffffu, own_target, first + j);
#pragma unroll
                  for (int i = 0; i < 2; ++i) {
                    if (first + j >= rows_left) continue;
                    partials.write4(reinterpret_cast<float*>(target) + (i * 32 + lane) * 4,
                                    make_float4(x[j][i].x * factor, x[j][i].y * factor, x[j][i].z * factor,
                                                x[j][i].w * factor));
                  }
                }
              }
            };
            if constexpr (kShares) {
              write(staging + first_row * kRowPlaces, 0, kWarpRows);
            } else {
              // One loop for both halves: to fetch code that has not been run takes longer than to run it.
#pragma unroll 1
              for (int half = 0; half * 8 < min(rows_left, 16); ++half) {
                if (half == 0) {
                  stage_rows(0, 0);
                } else {
                  stage_rows(1, 0);
                }
                __syncwarp();
                write(staging, half * 8, half * 8 + 8);
                __syncwarp();
              }
            }
            constexpr int kLines = kColumns / Slots::kLineDims;
#pragma unroll 1
            for (int i = lane; i < kWarpRows * kLines; i += 32) {
              const int row = i / kLines;
              const float row_lse = __shfl_sync(0xffffffffu, own_stats.y, row);
              if (row >= rows_left) continue;
              partials.write_lse(last.state_row + first_row + row,
                                 group * kColumns + i % kLines * Slots::kLineDims, row_lse);
            }
          }
        }
        if (note.ends_run()) break;
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0.0f;
        sync_warpgroup(group);  // the tile's place is free again
        if (copies) copy_half(0, stage);
      }
      if (copies) {
        copy_half(1, stage);
        mbarrier_arrive_after_copies(full_at(stage));
      }
      stage ^= 1;
      full_parity ^= stage == 0;
    }
  }
  if constexpr (kIsCascade) {
    if (tid == 0) smem_run_end.add_lines(problem.num_rows() * Slots::kRowLines, smem_partition);
  }
  merge_apart<kValueThreads, kTileKV>(smem_run_end, make_problem(), smem_partition, ctas(), slots(),
                                      results(), reinterpret_cast<float*>(smem_q));
}

#endif

}  // namespace cupyattn
