// MLA decode attention for sm_90a: the job of mla.cu, by the tensor cores' asynchronous products.
//
// Grid: one CTA an SM (persistent), each with a contiguous run of KV tiles (schedule.cuh). A tile is 64 keys; a query tile
// kTileQ rows, padded to the 64 of a product, which costs nothing where memory is the limit.
//
// Three warpgroups of 128 threads:
//   columns  two groups, each with 256 of the 512 columns of O. Tiles are theirs in turn: the group whose tile it is
//            computes S = Q K^T over all 576 = 512 + 64 columns, the softmax and so the weights P; both add P V.
//   copies   keys, and the queries of all segments but the first; and what a tile is. At the run's end, while others still
//            write this CTA's state: with flagged.cuh, they wait for the states that it merges, and copy them; in a cascade,
//            they find where these lie.
//
//     group 0  | P V of n - 1 | S of n | softmax | P V of n |                       | P V of n + 1 | S of n + 2 ...
//     group 1         | P V of n - 1 |           (keys)     | P V of n | S of n + 1 | softmax | P V of n + 1 | ...
//
// So the tensor cores have one group's products during the other's softmax. What counts is how soon a tile's place is
// free for the tile after the next: it takes 2000 clocks to fill it. A tile's halves of columns have barriers of their
// own, as each is free when its group has added it; and a group adds the other's tile as soon as it has the weights,
// before S of its own, or between the halves of it if keys come first.
//
// Weights pass through shared memory as the registers that the products take them in, each lane's to the same lane of the
// other group, which leaves its own there next: one place, which nobody waits for. With them goes the maximum so far; a
// group follows it before it adds. All threads that write or read what is told so arrive at its barrier: racecheck does
// not follow one that arrives for its warp (as one does at the other CTA's barriers).
//
// Whole tiles of pages of a multiple of eight tokens are copied in boxes (tma.cuh). Where a request has several query tiles of 64
// rows, CTAs come in clusters of two, which in long runs are a *pair*, with the same keys and a query tile each: each copies
// half of a tile to both, or all that the SMs ask L2 for would take longer than the products. Other tiles are copied row by
// row.
//
// Shared memory, in blocks of 64 columns (wgmma.cuh), nine of which are a row:
//   queries            64 rows, 72 KiB; at the end, states that are merged
//   keys, values       2 tiles x 64 rows, 72 KiB each; where a segment ends, its results in the place of its last tile
//   weights            8 KiB
// A row of the query tile is (query token, query head): row = token * num_heads + head.
// Partial states of more than 16 rows have flags (flagged.cuh), but for cascades, whose merge takes single rows from all
// over.

#include "cupyattn/barrier.cuh"
#include "cupyattn/cascade.cuh"
#include "cupyattn/cp_async.cuh"
#include "cupyattn/divide.cuh"
#include "cupyattn/flagged.cuh"
#include "cupyattn/launch.cuh"
#include "cupyattn/paged.cuh"
#include "cupyattn/partials.cuh"
#include "cupyattn/run.cuh"
#include "cupyattn/schedule.cuh"
#include "cupyattn/softmax.cuh"
#include "cupyattn/state.cuh"
#include "cupyattn/tma.cuh"
#include "cupyattn/wgmma.cuh"

namespace cupyattn {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What merge_apart must know.
template <typename Problem, typename Slots, typename Results>
struct MergeInputs {
  Problem problem;  // a cascade's
  Departures<TileInfo> ctas;
  Slots partials;
  Results output;
};

// Of a merge of FlaggedPartials: where states are gathered, and if `all_there` by the threads that copy, round by round. The
// others wait for `full`, and tell `empty`; `number` is that of the first round, of both barriers' phases. Of other states, the
// room alone counts.
struct Gathering {
  FlaggedRound::Room& room;
  bool all_there;
  u32 full;
  u32 empty;
  u32 number;
};

// A call, which nothing in registers outlives: inlined, it would leave the loop before it too few of them. A copy, because
// what a call gets by reference is in memory, and read there again after every asm statement.
template <int kThreads, int kTileKV, bool kIsCascade, typename Inputs>
__device__ __noinline__ void merge_apart(RunEnd& run_end, CountedBarrier barrier,
                                         const Inputs& inputs_in_memory, const Partition& smem_partition,
                                         Gathering gathering) {
  const Inputs inputs = inputs_in_memory;
  __builtin_assume(__isShared(&gathering.room));
  if constexpr (decltype(inputs.partials)::kHasFlags) {
    constexpr int kGroupThreads = kThreads / 2;
    const auto add = [&](const TileInfo& share, const FlaggedRound& round) {
      add_lines<kThreads, decltype(inputs.partials)>(round, gathering.room, barrier, [&](int row, int dim) {
        return inputs.output.row_at(share, row, dim);
      });
      barrier.wait();  // the room is free again
    };
    if (__builtin_expect(gathering.all_there, 1)) {
      for_each_round(run_end.shared, [&](const TileInfo& share, const FlaggedRound& round) {
        mbarrier_wait(gathering.full, gathering.number & 1);
        add(share, round);
        if (threadIdx.x < kGroupThreads) mbarrier_arrive(gathering.empty);
        ++gathering.number;
      });
      return;
    }
    // A CTA had not started yet, or that was seen too late: these threads do it all.
    if (threadIdx.x == 0) run_end.ask(inputs.ctas);
    run_end.merge(inputs.ctas, barrier, [&](const auto& shares) {
      for_each_round(shares, [&](const TileInfo& share, const FlaggedRound& round) {
        if (threadIdx.x < kGroupThreads) {
          gather_lines<kGroupThreads>(inputs.partials, round, gathering.room, threadIdx.x, 0);
        }
        barrier.wait();
        add(share, round);
      });
    });
  } else {
    float* scratch = reinterpret_cast<float*>(&gathering.room);
    bool are_found = true;  // of this CTA's rows; not of others'
    run_end.merge(inputs.ctas, barrier, [&](const auto& shares) {
      if constexpr (kIsCascade) {
        const Partition partition = smem_partition;
        merge_rows<kThreads, kTileKV>(inputs.problem, partition, inputs.partials, inputs.output, shares,
                                      scratch, are_found);
        are_found = false;
      } else {
        merge_shares<8, kThreads, false, Halves::kOfLines>(inputs.partials, inputs.output, shares, scratch);
      }
    });
  }
}

// What must be known of every tile, in one word; of some, more is in smem_tiles.
struct TileNote {
  static constexpr u32 kEndsSegment = 1;
  static constexpr u32 kEndsRun = 2;
  static constexpr u32 kIsMasked = 4;      // some rows do not see some keys
  static constexpr int kSegmentShift = 3;  // one bit: which of smem_positions
  static constexpr int kRowsShift = 4;     // of the query tile, that exist
  u32 bits;

  __device__ __forceinline__ bool ends_segment() const { return bits & kEndsSegment; }
  __device__ __forceinline__ bool ends_run() const { return bits & kEndsRun; }
  __device__ __forceinline__ bool is_masked() const { return bits & kIsMasked; }
  __device__ __forceinline__ int segment() const { return bits >> kSegmentShift & 1; }
  __device__ __forceinline__ int num_rows() const { return bits >> kRowsShift; }
};

// Where a segment's queries are.
struct QueryPlace {
  int qo_begin;
  int qo_len;
  int q_tile;
};

// clang-format off
template <typename T, int kTileQ, typename... Cascade>
__global__ void __launch_bounds__(384, 1)
    mla_sm90_kernel(const T* __restrict__ q_ckv,        // [num_tokens, num_qo_heads, 512], strided
                    const T* __restrict__ q_kpe,        // [num_tokens, num_qo_heads, 64], strided
                    const T* __restrict__ ckv_pages,    // [num_pages, page_size, 512], strided
                    const T* __restrict__ kpe_pages,    // [num_pages, page_size, 64], strided
                    const int* qo_indptr,               // [batch_size + 1] or null
                    const int* kv_indptr,               // [batch_size + 1] or null
                    const int* kv_indices,              // page ids
                    const int* kv_lens,                 // [batch_size]
                    T* __restrict__ out,                // as q_ckv
                    float* __restrict__ lse,            // [num_tokens, num_qo_heads] or null, natural log
                    half_t* partial_out,                // [num_slots, kTileQ, 512], see Partials, FlaggedPartials
                    u64* partial_flags,                 // [num_slots, kTileQ, 16 or 8]
                    Departures<TileInfo>::Memory* departures,  // all zero between launches, as partial_flags
                                                               // and, if states are Partials, partial_out
                    i64 q_ckv_stride_token, i64 q_ckv_stride_head,
                    i64 q_kpe_stride_token, i64 q_kpe_stride_head,
                    i64 ckv_stride_page, i64 ckv_stride_token,
                    i64 kpe_stride_page, i64 kpe_stride_token,
                    i64 out_stride_token, i64 out_stride_head,
                    i64 lse_stride_token, i64 lse_stride_head,
                    int batch_size,
                    int num_qo_heads, u32 heads_multiplier, int heads_shift,  // Divisor
                    int page_size, u32 page_multiplier, int page_shift,       // Divisor
                    int num_pages,                      // that the cache has
                    int table_row_stride,
                    int num_table_entries,              // of kv_indices, to prefetch, and to be guessed from
                    int split_shift,                    // fixed splits are mla.cu's
                    int max_splits,
                    int reads_early,                    // what pdl=True allows, see launch.cuh
                    int window_left,                    // -1: unbounded
                    float sm_scale,
                    float logits_soft_cap,              // 0: none
                    const __grid_constant__ KeyMaps key_maps,  // of ckv and kpe: (column, token of the page, page)
                    const __grid_constant__ Cascade... cascade) {  // as decode.cu
  // clang-format on
  constexpr int kRows = 64;  // of a product
  constexpr int kTileKV = 64;
  constexpr int kStages = 2;
  constexpr int kShortRun = 4;  // tiles
  constexpr int kThreads = 384;
  constexpr int kGroupThreads = 128;
  constexpr int kColumnThreads = 2 * kGroupThreads;
  constexpr int kCopyThreads = kThreads - kColumnThreads;
  constexpr int kColumns = 256;  // of O, a group's
  constexpr int kColumnRegisters = 224;
  constexpr int kCopyRegisters = 56;
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
    return problem_of(departures, smem_q, nullptr, 0, PageTable{kv_indptr, kv_indices, table_row_stride},
                      num_table_entries, qo_indptr, kv_lens, batch_size, 1, heads, window_left, split_shift,
                      max_splits, cascade...);
  };
  // Tiles that a group counts for, where requests differ.
  constexpr int kGroupTiles = kTileQ <= 16 ? 3 : 4;
  auto problem = uneven<kGroupTiles, true, kTileQ == kRows ? 6 : kGroupTiles, (kTileQ > 16)>(make_problem());
  // Functions: what has an address, for a call to read, is in memory everywhere.
  constexpr bool kHasFlags = !kIsCascade && kTileQ > 16;
  const auto slots = [&]() {
    if constexpr (kHasFlags) {
      return FlaggedPartials<2 * kColumns, kTileQ>{partial_out, partial_flags};
    } else {
      return Partials<2 * kColumns, kTileQ, kTileQ == kRows>{partial_out, partial_flags};
    }
  };
  using Slots = decltype(slots());
  const auto results = [&]() {
    return Output<T, kTileQ>{out,  lse, out_stride_token, out_stride_head, lse_stride_token, lse_stride_head,
                             heads};
  };

  unsigned char* smem_kv = smem_q + kTileBytes;                                    // [kStages] tiles
  uint4* smem_weights = reinterpret_cast<uint4*>(smem_kv + kStages * kTileBytes);  // [4 warps][kSteps][32]
  // What comes with them, of the group whose tile it is: each row's maximum so far, and where a segment ends, the sum of
  // the weights that this group has seen, of segments in turn: a group may be at the next one's end.
  __shared__ float smem_max[2][kRows];
  __shared__ float smem_sums[2][2][kRows];
  // Of a tile: written before its halves are full, read until its states are written. Then the third tile after it may have
  // been begun, but not the fourth.
  constexpr int kNotes = 4;
  __shared__ TileNote smem_notes[kNotes];
  __shared__ TileInfo smem_tiles[kNotes];
  __shared__ RunEnd smem_run_end;
  __shared__ Partition smem_partition;
  const auto ctas = [&]() {
    return Departures<TileInfo>{departures, static_cast<u32>(smem_partition.num_ctas)};
  };
  __shared__ int2 smem_seen;  // of the segment whose keys are being copied; not a cascade's
  __shared__ Positions<kTileQ, kIsCascade ? 2 : 0> smem_positions;  // of segments in turn
  // Of each tile's halves of columns.
  __shared__ __align__(8) u64 smem_barriers[4 * kStages + 6];
  const u32 barriers = smem_address_of(smem_barriers);
  const auto full_at = [&](int stage, int half) { return barriers + (stage * 2 + half) * 8; };
  const auto empty_at = [&](int stage, int half) { return barriers + (kStages * 2 + stage * 2 + half) * 8; };
  const auto weights_at = [&](int group) { return barriers + (kStages * 4 + group) * 8; };
  const u32 queries_full = barriers + (kStages * 4 + 2) * 8;
  const u32 queries_empty = queries_full + 8;
  CountedBarrier columns_barrier{queries_full + 16, 0};  // of both groups
  // What the warps that copy say at the end. In a cascade, that rows' states have been found; else, whether all CTAs have
  // started, and none has departed, so that this one can wait for their states as soon as its own keys are copied. Then
  // states go through the queries' place, and take turns there as queries do.
  const u32 is_decided = queries_full + 24;
  __shared__ bool smem_all_there;
  __shared__ u32 smem_first_round;  // of both barriers' phases
  FlaggedRound::Room& room = *reinterpret_cast<FlaggedRound::Room*>(smem_q);
  static_assert(sizeof(room) <= kTileBytes);

  const int tid = threadIdx.x;
  const int warp = uniform(tid / 32);
  const bool in_cluster = !kIsCascade && kTileQ == kRows && cluster_size() == 2;

  // As in decode.cu.
  problem.template prefetch<kThreads>();
  touch(q_ckv_stride_token);
  touch(ckv_stride_page);
  touch(lse_stride_head);
  touch(logits_soft_cap);
  if (tid == 0) {
    for (int i = 0; i < 2 * kStages; ++i) {
      mbarrier_init(full_at(0, i), kCopyThreads / 2 + 32);  // its copies, and who says what the tile is
      mbarrier_init(empty_at(0, i), kGroupThreads + (in_cluster ? kGroupThreads / 32 : 0));
    }
    mbarrier_init(weights_at(0), kGroupThreads);
    mbarrier_init(weights_at(1), kGroupThreads);
    mbarrier_init(queries_full, kCopyThreads);
    mbarrier_init(queries_empty, kGroupThreads);
    mbarrier_init(columns_barrier.smem_barrier, kColumnThreads);
    mbarrier_init(is_decided, kIsCascade ? kCopyThreads : 1);
    fence_mbarrier_init();
    if (key_maps.box_rows > 0) prefetch_map(key_maps.first), prefetch_map(key_maps.second);
  }
  if (in_cluster) cluster_arrive_relaxed();  // this one's barriers are there
  if (tid < 2) smem_run_end.clear();

  using Tiles = Cursor<kTileKV, kTileQ, false, !kIsCascade>;
  // The cursor of each warp that copies, at the first tile of the segment at hand: in shared memory, as these have
  // few registers and look there seldom.
  constexpr int kCopyWarps = kCopyThreads / 32;
  __shared__ Tiles smem_loads[kCopyWarps];
  __shared__ QueryPlace
      smem_queries[1 + kCopyWarps];  // of the first segment; of the one that each of them has begun
  __shared__ int smem_first_seen[kIsCascade ? kCopyWarps : 1];  // there, the first key in anybody's window
  const auto queries_of = [](const Tiles& load) {
    return QueryPlace{load.request.qo_begin, load.request.qo_len, load.q_tile};
  };
  const PageStrides ckv_strides{ckv_stride_page, ckv_stride_token, 0};
  const PageStrides kpe_strides{kpe_stride_page, kpe_stride_token, 0};
  // Of a warp that copies: 32 rows of a half of the columns. Each lane finds one, a tile before the copy.
  const int copy_warp = warp - kColumnThreads / 32;
  const int half = copy_warp / 2;
  const int first_copied = copy_warp % 2 * 32;
  FoundRow found{};
  const auto ckv_row = [&]() {
    return reinterpret_cast<u64>(ckv_pages + half * kColumns +
                                 ckv_strides.offset(found.page, found.token, 0));
  };
  const auto kpe_row = [&]() {
    return reinterpret_cast<u64>(kpe_pages + kpe_strides.offset(found.page, found.token, 0));
  };
  const auto prefetch_row = [&]() {
    const char* row = reinterpret_cast<const char*>(ckv_row());
#pragma unroll 1
    for (int i = 0; i < kColumns * 2; i += 128) prefetch_l2(row + i);
    if (half == 0) prefetch_l2(reinterpret_cast<const char*>(kpe_row()));
  };
  Partition partition;
  Tiles run;
  bool is_long;
  bool in_pair;
  // What threads tell others of the run.
  const auto set_up = [&]() {
    partition.number_ctas();
    // In a short run, the accelerator's longer way to the first keys counts; and that to the other CTA.
    is_long = partition.quota > kShortRun;
    // The two CTAs of a cluster read the same keys, for two query tiles.
    in_pair = in_cluster && is_long && partition.num_parts % 2 == 0;
    if (tid == 0) smem_partition = partition, smem_queries[0] = queries_of(run);
    if (copy_warp >= 0 && tid % 32 == 0) smem_loads[copy_warp] = run;
  };
  // As in decode.cu. Two tiles of more query rows are 19 MB, which gains nothing.
  const auto ask_for_keys = [&]() {
    set_up();
    if (copy_warp < 0) return;
    found.guess(problem, run, page, num_pages, first_copied + lane_id(), kTileQ <= 16 && is_long ? 2 : 1,
                [&]() {
                  if (run.q_tile == 0) prefetch_row();
                });
  };
  const auto look_again = [&]() { found.look_again(); };
  // With barriers, after which all that is said above is there.
  constexpr bool kGuesses = !kIsCascade;  // there it gains nothing
  const Beginning beginning = guess_run<kThreads, kGuesses, true>(
      problem, reads_early, run, partition, ask_for_keys, look_again, in_cluster, blockIdx.x, gridDim.x);
  if (beginning == kNoRun) {
    wait_for_predecessor();  // or this kernel could be done before the one that its successor relies on
    return;
  }
  if (beginning != kGuessed) {
    set_up();
    __syncthreads();
  }
  const bool is_found = found.entry != nullptr && (beginning == kGuessed || reads_early);  // or by look_again
  if (in_cluster) cluster_wait();  // the other's barriers are there

  // A group is done with a half: a pair's also says so to the other CTA, from which keys come too.
  const auto release = [&](int stage, int half) {
    mbarrier_arrive(empty_at(stage, half));
    if (in_cluster) {
      __syncwarp();
      if (lane_id() == 0) {
        if (in_pair) {
          mbarrier_arrive_at(empty_at(stage, half), cluster_rank() ^ 1);
        } else {
          mbarrier_arrive(empty_at(stage, half));
        }
      }
    }
  };
  // Queries, by `num_warps` warps from `first_warp` on. Beyond the last row are zeros, up to a multiple of 4 * num_warps.
  const auto copy_queries = [&](const QueryPlace& place, int first_warp, auto num_warps) {
    constexpr int kRowsEach = 4 * num_warps.value;  // that the warps copy at once, four each
    const int lane = lane_id();  // anew, or what follows from it would be kept all the time
    const int num_rows = min(place.qo_len * num_qo_heads - place.q_tile * kTileQ, kTileQ);
    const int rows_each = ceil_div(num_rows, kRowsEach) * 4;
    const int first = (warp - first_warp) * rows_each;
    const int own_row = place.q_tile * kTileQ + min(first + lane, num_rows - 1);  // a lane finds a row
    const int token_in_request = heads.divide(own_row);
    const int head = heads.modulo(own_row, token_in_request);
    const i64 token = problem.row_of(place.qo_begin + token_in_request);
    const u64 ckv_row = reinterpret_cast<u64>(q_ckv + token * q_ckv_stride_token + head * q_ckv_stride_head);
    const u64 kpe_row = reinterpret_cast<u64>(q_kpe + token * q_kpe_stride_token + head * q_kpe_stride_head);
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
  };

  if (warp >= kColumnThreads / 32) {
    // --- Copies ---
    give_registers<kCopyRegisters>();
    Tiles& smem_load = smem_loads[copy_warp];
    // The tile at hand. Of its segment, with it:
    int tiles_left;
    int num_keys;
    int token_begin;
    const int* pages;
    const auto enter = [&](const Tiles& load) {
      tiles_left = min(load.request.num_tiles() - load.tile, load.unit_end - load.unit);
      token_begin = load.token_begin();
      num_keys = load.request.kv_len - token_begin;
      pages = load.pages;
    };
    enter(smem_load);
    const auto find_row = [&](FoundRow& found, int ahead) {  // starts the read of the page table
      const int row = ahead + first_copied + lane_id();
      if (row >= num_keys) return;
      found.page = static_cast<int>(load_early(found.find(page, pages, token_begin + row)));
    };
    if (!is_found) {
      find_row(found, 0);
      // The first keys are on their way into L2; before the window may be any pages.
      if (first_copied + lane_id() < num_keys && (!kIsCascade || window_left < 0)) prefetch_row();
    }
    wait_for_predecessor();

    bool begins_segment = true;
    int segment = 0;
#pragma unroll 1
    for (u32 t = 0;; ++t) {
      const int stage = t % kStages;
      const bool with_kpe = stage == half;
      const u32 smem_half = smem_address_of(smem_kv) + stage * kTileBytes + half * kBlocks * kBlockBytes;
      const u32 smem_kpe = smem_address_of(smem_kv) + stage * kTileBytes + 2 * kBlocks * kBlockBytes;
      bool reads_once = true;  // or others read the same keys, and these must stay in L2 for a while
      int num_hidden = 0;      // before the first key in anybody's window
      if constexpr (kIsCascade) {
        reads_once = smem_load.request.qo_len * num_qo_heads <= kTileQ;
        if (window_left >= 0) {
          if (begins_segment) {
            const int first_seen = problem.template first_seen<kTileQ>(smem_load);
            if (lane_id() == 0) smem_first_seen[copy_warp] = first_seen;
            __syncwarp();
          }
          num_hidden = smem_first_seen[copy_warp] - token_begin;
        }
      } else {
        reads_once = smem_partition.num_parts == (in_pair ? 2 : 1);
      }
      const u64 policy = reads_once ? evict_first_policy() : evict_normal_policy();
      const u32 full = full_at(stage, half);
      // Whole tiles of whole boxes; what is known of them, the same in all lanes, before their place is free. With few rows,
      // rows one by one are there sooner, which counts in runs of up to eight tiles.
      const int box_rows = key_maps.box_rows;
      const bool in_boxes = uniform(box_rows > 0 && is_long && (kTileQ > 32 || smem_partition.quota > 8) &&
                                    num_keys >= kTileKV && (token_begin & box_rows - 1) == 0 &&
                                    (!kIsCascade || num_hidden <= 0));
      // In a pair, each CTA copies half of the blocks to both. Boxes of 64 rows are dealt out to the two warps.
      const bool are_dealt = box_rows > 32;
      const int rank = in_pair ? cluster_rank() : 0;
      const int first_block = are_dealt ? rank * 2 + copy_warp % 2 : rank * 2;
      const int end_block = in_pair ? rank * 2 + 2 : kBlocks;
      const int block_step = are_dealt ? 2 : 1;
      const bool copies_kpe = with_kpe && (!in_pair || rank == half) && (!are_dealt || copy_warp % 2 == 0);
      int box_page = uniform(found.page);
      int box_token = uniform(found.token) - (are_dealt ? first_copied : 0);
      u32 box_offset = (are_dealt ? 0 : first_copied) * kBlockRowBytes;
      // The second tile only when the first is there, which CTAs that start late would get behind all others' second. With
      // more rows it gains nothing.
      if (!kIsCascade && kTileQ <= 16 && t == 1) mbarrier_wait(full_at(0, half), 0);
      FoundRow next = found;  // of the next tile: read before this one's copies, behind which that would wait
      if (tiles_left > 1) find_row(next, kTileKV);
      mbarrier_wait(empty_at(stage, half), t / kStages & 1 ^ 1);
      if (in_boxes) {
        const bool is_first = lane_id() == 0;
        if (is_first) {
          mbarrier_arrive_expecting(full, 32 * kBlockRowBytes * (kBlocks + with_kpe));
        } else {
          mbarrier_arrive(full);
        }
#pragma unroll 1
        for (int row = 0;;) {
          if (is_first) {
            const auto copy_block = [&](u32 to, const TensorMap& map, int column) {
              if (in_pair) {
                copy_box_to_both(to + box_offset, map, column, box_token, box_page, full, policy);
              } else {
                copy_box(to + box_offset, map, column, box_token, box_page, full, policy);
              }
            };
#pragma unroll 1
            for (int block = first_block; block < end_block; block += block_step) {
              copy_block(smem_half + block * kBlockBytes, key_maps.first,
                         half * kColumns + block * kBlockColumns);
            }
            if (copies_kpe) copy_block(smem_kpe, key_maps.second, 0);
          }
          row += box_rows;
          if (row >= 32) break;
          box_page = __shfl_sync(0xffffffffu, found.page, row);
          box_token = __shfl_sync(0xffffffffu, found.token, row);
          box_offset += box_rows * kBlockRowBytes;
        }
      } else {
        // Keys past the end, or before the first seen, are not read and become zeros: what lies there may be NaN, and
        // 0 * NaN leaks. Eight lanes a row, 128 bytes at once.
        const int lane = lane_id();
        const u64 address = ckv_row();
        const auto is_read = [&](int row) { return row < num_keys && (!kIsCascade || row >= num_hidden); };
#pragma unroll 2
        for (int i = lane / 8; i < 32; i += 4) {
          const bool exists = is_read(first_copied + i);
          const u64 row_address = __shfl_sync(0xffffffffu, address, i);
          const T* source = exists ? reinterpret_cast<const T*>(row_address) + lane % 8 * 8 : ckv_pages;
          u32 target = smem_half + block_offset(first_copied + i, lane % 8);
          pin(target);  // ptxas (13.0) encodes a sum with a uniform register wrongly
#pragma unroll
          for (int block = 0; block < kBlocks; ++block) {
            cp_async_16(target + block * kBlockBytes, exists ? source + block * kBlockColumns : source,
                        exists, policy);
          }
        }
        if (with_kpe) {
          const u64 address = kpe_row();
#pragma unroll 2
          for (int i = lane / 8; i < 32; i += 4) {
            const bool exists = is_read(first_copied + i);
            const u64 row_address = __shfl_sync(0xffffffffu, address, i);
            const T* source = exists ? reinterpret_cast<const T*>(row_address) + lane % 8 * 8 : ckv_pages;
            u32 target = smem_kpe + block_offset(first_copied + i, lane % 8);
            pin(target);
            cp_async_16(target, source, exists, policy);
          }
        }
        mbarrier_arrive_after_copies(full);
      }
      const bool ends_segment = tiles_left == 1;
      const bool copies_queries = begins_segment && t > 0;
      if (begins_segment) {
        const int lane = lane_id();
        __syncwarp();  // all have read the last ones
        if (lane == 0) smem_queries[1 + copy_warp] = queries_of(smem_load);
        if (copy_warp == 0) {
          // The first and last key that all rows see.
          if constexpr (kIsCascade) {
            smem_positions.template write<true>(problem, smem_load, segment % 2);
          } else if (lane == 0) {
            const Tiles load = smem_load;
            const int first_row = load.q_tile * kTileQ;
            const int end_row = min(first_row + kTileQ, load.request.qo_len * num_qo_heads);
            const int first_token = load.request.kv_len - load.request.qo_len;
            smem_seen = make_int2(window_left < 0 ? 0 : first_token + heads.divide(end_row - 1) - window_left,
                                  first_token + heads.divide(first_row));
          }
        }
        __syncwarp();
      }
      if (copy_warp == 0) {
        // What the tile is.
        int2 seen;
        if constexpr (kIsCascade) {
          seen = smem_positions.seen[segment % 2];
        } else {
          seen = smem_seen;
        }
        const bool all_seen = token_begin >= seen.x && token_begin + kTileKV - 1 <= seen.y;
        const QueryPlace place = smem_queries[1 + copy_warp];
        const int num_rows = min(place.qo_len * num_qo_heads - place.q_tile * kTileQ, kTileQ);
        TileNote note{
            static_cast<u32>(num_rows << TileNote::kRowsShift | segment % 2 << TileNote::kSegmentShift)};
        if (!all_seen) note.bits |= TileNote::kIsMasked;
        if (!all_seen || ends_segment) {
          Tiles load = smem_load;
          const int tiles_before =
              min(load.request.num_tiles() - load.tile, load.unit_end - load.unit) - tiles_left;
          load.tile += tiles_before;
          load.unit += tiles_before;
          if (ends_segment)
            note.bits |= TileNote::kEndsSegment | (load.ends_run(problem) ? TileNote::kEndsRun : 0);
          const TileInfo tile =
              TileInfo::of<Slots::kRowLines>(load, problem, smem_partition, begins_segment, ends_segment, 0);
          if (lane_id() == 0) {
            smem_tiles[t % kNotes] = tile;
            if (!kIsCascade && ends_segment && tile.group.num_partials > 1) smem_run_end.add(tile);
          }
        }
        if (lane_id() == 0) smem_notes[t % kNotes] = note;
        mbarrier_arrive(full_at(stage, 0));
        mbarrier_arrive(full_at(stage, 1));
      }
      // On to the next one, whose page ids are here when its place is free.
      begins_segment = ends_segment;
      bool is_last = false;
      if (!ends_segment) {
        --tiles_left;
        token_begin += kTileKV;
        num_keys -= kTileKV;
        found.page = next.page, found.token = next.token;
      } else {
        Tiles load = smem_load;
        const int tiles_before = min(load.request.num_tiles() - load.tile, load.unit_end - load.unit) - 1;
        load.tile += tiles_before;
        load.unit += tiles_before;
        load.advance(problem);
        __syncwarp();  // all have read it
        if (lane_id() == 0) smem_load = load;
        __syncwarp();
        is_last = uniform(load.done());
        if (!is_last) {
          enter(load);
          find_row(found, 0);
        }
      }
      if (copies_queries) {
        mbarrier_wait(queries_empty, segment - 1 & 1);
        copy_queries(smem_queries[1 + copy_warp], kColumnThreads / 32, Int<kCopyWarps>());
        mbarrier_arrive_after_copies(queries_full);
      }
      if (is_last) break;
      segment += ends_segment;
    }
    if (is_long) launch_dependents();
    cp_async_commit();
    cp_async_wait<0>();  // nobody else's memory is written to
    if constexpr (kIsCascade) {
      // Where the rows of this CTA's share have states, while its own are written.
      mbarrier_wait(queries_empty, segment & 1);
      const auto partials = slots();
      const auto output = results();
      const TileInfo share = RunEnd::share_of_lines(problem.num_rows() * Slots::kRowLines, smem_partition);
      const RowMerge<kColumnThreads, kTileKV, false, T, 2 * kColumns, kTileQ, kTileQ == kRows> rows{
          problem,
          smem_partition,
          partials,
          output,
          share.first_line,
          share.end_line,
          reinterpret_cast<float*>(&room)};
      rows.find_early(rows.end_of_part(share.first_line), tid - kColumnThreads, kCopyThreads);
      mbarrier_arrive(is_decided);
    }
    if constexpr (kHasFlags) {
      // Who waits for states must not keep CTAs from starting that are to write some: partials.cuh.
      const int own = tid - kColumnThreads;
      if (own == 0) {
        smem_all_there = ctas().all_are_there();
        if (smem_all_there) ctas().end();
        smem_first_round = segment;
        mbarrier_arrive(is_decided);
      }
      sync_warpgroup(2);
      if (!smem_all_there) return;
      // Before they wait: under a sanitizer the columns' threads, who are to write states, stop where they arrive.
      if (in_pair) cluster_arrive_relaxed();
      for_each_round(smem_run_end.shared, [&](const TileInfo&, const FlaggedRound& round) {
        mbarrier_wait(queries_empty, segment & 1);
        gather_lines<kCopyThreads>(slots(), round, room, own, 2);
        mbarrier_arrive(queries_full);
        ++segment;
      });
      if (in_pair) cluster_wait();
    }
    return;
  }

  // --- Columns ---
  take_registers<kColumnRegisters>();
  const int group = warp / 4;
  wait_for_predecessor();
  // Not earlier: the next kernel may rely on all before us having finished once we have.
  if (reads_early) launch_dependents();
  if (tid == 0) ctas().start();
  copy_queries(smem_queries[0], 0, Int<kColumnThreads / 32>());
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads<kColumnThreads>();
  {
    const int warp_row = warp % 4 * 16;  // the warp's first row
    const u32 queries = uniform(smem_address_of(smem_q));
    const u32 own_half = group * kBlocks * kBlockBytes;
    const u32 other_half = (1 - group) * kBlocks * kBlockBytes;
    // This group's values in a tile's place.
    const auto values_at = [&](int stage) {
      return static_cast<u32>(uniform(queries + kTileBytes + stage * kTileBytes + own_half));
    };
    float acc[kColumns / 2] = {};  // [kColumns / 8][4]
    SoftmaxState state
        [2];  // rows lane / 4 and lane / 4 + 8 of the warp; `sum` over this lane's keys of own tiles only
    int segment = 0;
    u32 t = group;               // this group's next tile
    bool adds_last = group > 0;  // the tile before that, the other's, is to be added
    const auto multiply_values = [&](const float (&factor)[2]) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[n * 4 + i] *= factor[i / 2];
    };
    // The other group's weights of tile t - 1, and its maxima of `num_rows` rows.
    const auto take_weights = [&](u32(&p)[kSteps][4], int num_rows) {
      const int lane = lane_id();
      mbarrier_wait(weights_at(1 - group), (t - 1) / kStages & 1);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint4 x = smem_weights[(warp % 4 * kSteps + step) * 32 + lane];
        p[step][0] = x.x, p[step][1] = x.y, p[step][2] = x.z, p[step][3] = x.w;
      }
      if (warp_row >= num_rows) return;  // nobody's
      float new_max[2];
      bool differs = false;
      bool has_values = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        new_max[half] = smem_max[1 - group][warp_row + half * 8 + lane / 4];
        differs |= new_max[half] != state[half].max;
        has_values |= state[half].max != neg_infinity();
      }
      if (__any_sync(0xffffffffu, differs)) {
        const float factor[2] = {state[0].raise(new_max[0]), state[1].raise(new_max[1])};
        if (__any_sync(0xffffffffu, has_values)) multiply_values(factor);
      }
    };
    const auto add_values = [&](const u32(&p)[kSteps][4], u32 values) {
      const Operand v_operand = swizzled_operand(values, kBlockBytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        wgmma_rs<T>(acc, p[step], advance(v_operand, step * 16 * kBlockRowBytes));
      }
      wgmma_commit();
    };
    // Of the warp's rows, for both groups.
    const auto tell_sums = [&]() {
      const int lane = lane_id();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = state[half].sum;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane % 4 == 0) smem_sums[segment % 2][group][warp_row + half * 8 + lane / 4] = sum;
      }
    };
#pragma unroll 1
    while (true) {
      TileNote note{0};
      if (adds_last) {
        mbarrier_wait(full_at(1 - group, group), (t - 1) / kStages & 1);
        fence_async_proxy();
        note = smem_notes[(t - 1) % kNotes];
        note.bits = uniform(note.bits);
      }
      const bool adds_own = !note.ends_segment();  // or the segment ends with the other's tile
      if (!adds_own) {
        u32 p[kSteps][4];
        take_weights(p, note.num_rows());
        tell_sums();
        add_values(p, values_at(1 - group));
        if (!kHasFlags && note.ends_run() && tid == 0) smem_run_end.ask(ctas());
        wgmma_wait<0>();
        pin(acc);
      } else {
        const u32 parity = t / kStages & 1;
        float s[kLogits];
        const auto multiply_keys = [&](u32 offset, int begin, int end) {
          const Operand q_operand = swizzled_operand(uniform(queries + offset), 0);
          const Operand k_operand =
              swizzled_operand(uniform(queries + kTileBytes + group * kTileBytes + offset), 0);
#pragma unroll
          for (int block = begin; block < end; ++block)
#pragma unroll
            for (int step = 0; step < 4; ++step) {
              const int at = (block - begin) * kBlockBytes + step * 32;
              wgmma_ss<T>(s, advance(q_operand, at), advance(k_operand, at), block + step > 0);
            }
        };
        // What the other has left is added as soon as it is there, before, or between the halves of, S: its place becomes
        // free, for the tile after this one.
        bool adds = adds_last;
        const auto add_last = [&]() {
          u32 last_p[kSteps][4];
          take_weights(last_p, note.num_rows());
          add_values(last_p, values_at(1 - group));
        };
        if (adds) {
          bool is_there;
          do {
            is_there = mbarrier_is_over(weights_at(1 - group), (t - 1) / kStages & 1);
          } while (!is_there && !mbarrier_is_over(full_at(group, group), parity));
          if (any_of_warpgroup(group, is_there)) {
            add_last();
            wgmma_wait<0>();
            pin(acc);
            release(1 - group, group);
            adds = false;
          }
        }
        if (segment > 0) mbarrier_wait(queries_full, segment - 1 & 1);
        mbarrier_wait(full_at(group, group), parity);
        fence_async_proxy();
        wgmma_fence();
        multiply_keys(own_half, 0, kBlocks);
        multiply_keys((kRowBlocks - 1) * kBlockBytes, kBlocks, kBlocks + 1);
        wgmma_commit();
        const auto multiply_other_half = [&]() {
          mbarrier_wait(full_at(group, 1 - group), parity);
          fence_async_proxy();
          wgmma_fence();
          multiply_keys(other_half, kBlocks + 1, kRowBlocks);
          wgmma_commit();
        };
        if (adds) {
          add_last();
          multiply_other_half();
          wgmma_wait<1>();
          pin(acc);
          release(1 - group, group);
          wgmma_wait<0>();
        } else {
          multiply_other_half();
          wgmma_wait<0>();
        }
        note = smem_notes[t % kNotes];
        note.bits = uniform(note.bits);
        pin(s);
        if (note.ends_segment()) mbarrier_arrive(queries_empty);

        const int lane = lane_id();
        u32 p[kSteps][4];
        float factor[2] = {1.0f, 1.0f};
        bool raises = false;
        if (warp_row < note.num_rows()) {
          float scale = sm_scale * kLog2E;  // logits of base 2 are s * scale
          if (logits_soft_cap > 0.0f || !(sm_scale > 0.0f)) {
            finish_logits(s, sm_scale, logits_soft_cap);
            scale = 1.0f;
          }
          // What a row must not see is -inf. Most tiles are seen whole by every row.
          if (note.is_masked()) {
            const TileInfo& tile = smem_tiles[t % kNotes];
            const int kv_len = tile.kv_len;
            const int token_begin = tile.token_begin + lane % 4 * 2;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int row = warp_row + half * 8 + lane / 4;
              // The last key that it sees, or in a cascade where it stands.
              const int last = [&]() {
                if constexpr (kIsCascade) return smem_positions.rows[note.segment()][min(row, kTileQ - 1)];
                return kv_len - tile.qo_len +
                       heads.divide(tile.q_tile * kTileQ + min(row, note.num_rows() - 1));
              }();
              const auto is_hidden = [&](int token) {
                if constexpr (kIsCascade) return problem.is_hidden(token, last, kv_len);
                return token > last || (window_left >= 0 && token < last - window_left);
              };
#pragma unroll
              for (int n = 0; n < kTileKV / 8; ++n)
#pragma unroll
                for (int column = 0; column < 2; ++column) {
                  if (is_hidden(token_begin + n * 8 + column)) s[n * 4 + half * 2 + column] = neg_infinity();
                }
            }
          }

          raises = raise_maxima(s, scale, state, factor);
          weigh_keys<T>(s, scale, state, p);
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            smem_weights[(warp % 4 * kSteps + step) * 32 + lane] =
                make_uint4(p[step][0], p[step][1], p[step][2], p[step][3]);
          }
          if (lane % 4 == 0) {
            smem_max[group][warp_row + lane / 4] = state[0].max;
            smem_max[group][warp_row + lane / 4 + 8] = state[1].max;
          }
          if (note.ends_segment()) tell_sums();
        }
        mbarrier_arrive(weights_at(group));
        if (raises) multiply_values(factor);
        add_values(p, values_at(group));
        if (!kHasFlags && note.ends_run() && tid == 0) smem_run_end.ask(ctas());
        wgmma_wait<0>();
        pin(acc);
        if (!note.ends_segment()) {
          release(group, group);
          t += 2;
          adds_last = true;
          continue;
        }
      }
      const int stage = adds_own ? group : 1 - group;
      const int tile_offset = kTileBytes + stage * kTileBytes + group * kBlocks * kBlockBytes;
      // --- The segment's state is the result or the run's partial state. ---
      columns_barrier.wait();  // all have told their sums, and are done with the values
      // The other's barriers have been told for the last time. Later, this would wait for what is written now.
      if (in_pair && note.ends_run()) cluster_arrive();
      const TileInfo& last = smem_tiles[(adds_own ? t : t - 1) % kNotes];
      const bool is_complete = last.group.num_partials == 1;
      const int lane = lane_id();  // anew, or what follows from it would be kept all the time
      const int num_rows = last.num_rows<kTileQ>(heads);
      constexpr int kWarpRows = kTileQ / 4;  // that a warp writes, where all warps write some
      const int first_row = warp % 4 * kWarpRows;
      const auto stats_of = [&](int row) {  // 1 / sum, lse in base 2
        SoftmaxState of_row;
        of_row.max = smem_max[stage][row];
        of_row.sum = smem_sums[segment % 2][0][row] + smem_sums[segment % 2][1][row];
        return make_float2(of_row.inverse_sum(), of_row.lse_log2());
      };
      if (is_complete) {
        // Its numbers, of 16 bits, take the place of the tile's values: rows of 512 bytes, with chunks of 16 XORed with
        // the row's last three bits, so that neither columns of pairs nor rows are in the same banks.
        constexpr int kRowBytes = kColumns * 2;
        const u32 place = smem_address_of(smem_q) + tile_offset;
        if (warp_row < num_rows) {
          const float factor[2] = {stats_of(warp_row + lane / 4).x, stats_of(warp_row + lane / 4 + 8).x};
          const u32 first = place + (warp_row + lane % 16) * kRowBytes + 16 * (lane / 16 ^ lane % 8);
#pragma unroll
          for (int n = 0; n < kColumns / 8; n += 2) {
            u32 x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float* pair = acc + (n + i / 2) * 4 + i % 2 * 2;
              x[i] = pack2<T>(pair[0] * factor[i % 2], pair[1] * factor[i % 2]);
            }
            stmatrix_x4((first ^ n % 8 * 16) + n / 8 * 128, x);
          }
        }
        if constexpr (kTileQ < kRows) {
          sync_warpgroup(group);
        } else {
          __syncwarp();  // a warp writes the rows that it has packed
        }
        const int own_row = first_row + lane % kWarpRows;  // a lane has such a row
        const float2 own_stats = stats_of(own_row);
        const auto result = [&]() {
          const int row = min(own_row, num_rows - 1);
          if constexpr (kIsCascade) return result_row(problem, results(), last, row, 0);
          return results().row_at(last, row, 0);
        }();
        const u64 own_target = reinterpret_cast<u64>(result.out + group * kColumns);
        if (group == 0 && lane < kWarpRows && own_row < num_rows) result.write_lse(own_stats.y);
#pragma unroll 4
        for (int row = first_row; row < first_row + kWarpRows; ++row) {
          const uint4 x =
              *reinterpret_cast<const uint4*>(smem_q + tile_offset + row * kRowBytes + 16 * (lane ^ row % 8));
          const u64 target = __shfl_sync(0xffffffffu, own_target, row - first_row);
          if (row < num_rows) store16(target + lane * 16, x);
        }
      } else if constexpr (kHasFlags || kTileQ == kRows) {
        // A quad has lines of 8 rows, and then of 8 more, which take the place of the first: code for both would take
        // longer to fetch than this to run.
        const auto partials = slots();
        u64 flags[2] = {};  // of both rows, or of the only one in the second place
#pragma unroll 1
        for (int row = warp_row + lane / 4; row - lane / 4 < min(num_rows, warp_row + 16); row += 8) {
          constexpr int kParts = kColumns / 32;
          float x[kParts][8];
#pragma unroll
          for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int i = 0; i < 8; ++i) x[part][i] = acc[(part * 4 + i / 2) * 4 + i % 2];
          const float2 stats = stats_of(row);
          const auto write = [&]() {
            return partials.write_lines(last.state_row + row, group * (Slots::kRowLines / 2), lane % 4, x,
                                        stats.x, stats.y, row < num_rows);
          };
          if constexpr (kHasFlags) {
            flags[0] = flags[1], flags[1] = write();
          } else {
            write();
          }
#pragma unroll
          for (int i = 0; i < kColumns / 2; ++i) acc[i] = acc[i | 2];
        }
        if constexpr (kHasFlags) {
          // A lane has a line of its quad's rows. Flags come after what they stand for.
          static_assert(Slots::kRowLines == 2 * 4);
          const int row = warp_row + lane / 4;
          u64* target = partials.flags +
                        Slots::line_of(0, (last.state_row + row) * Slots::kRowLines + group * 4 + lane % 4);
          const bool has_both = num_rows - warp_row > 8;
          __syncwarp();
          fence_acq_rel();
          if (row < num_rows) store_relaxed(target, has_both ? flags[0] : flags[1]);
          if (row + 8 < num_rows) store_relaxed(target + 8 * Slots::kRowLines, flags[1]);
        }
      } else {
        // Pairs of columns that a quad has of a row: through shared memory, each warp writes some of the few rows, 128
        // columns next to each other. Four columns lie in a place that is XORed with twice the row's last two bits, so
        // that rows are in different banks.
        constexpr int kRowPlaces = kColumns / 4;
        const int quad_row = lane / 4;
        float4* staging = reinterpret_cast<float4*>(smem_q + tile_offset);
        const auto stage_rows = [&](int half, int row) {
          float2* pairs[4];  // where columns 8n + 2t, + 1 lie, by n % 4
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            pairs[n] =
                reinterpret_cast<float2*>(staging + (row + quad_row) * kRowPlaces + (n ^ quad_row % 4) * 2) +
                lane % 4;
          }
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n) {
            pairs[n % 4][n / 4 * 16] = make_float2(acc[n * 4 + half * 2], acc[n * 4 + half * 2 + 1]);
          }
        };
        if (warp_row < kTileQ) stage_rows(0, warp_row), stage_rows(1, warp_row + 8);
        sync_warpgroup(group);
        const int rows_left = num_rows - first_row;  // from the warp's first one on
        const float2 own_stats = stats_of(first_row + lane % kWarpRows);
        if (rows_left > 0) {
          const auto partials = slots();
          static_assert(kColumns == 2 * partials.kSpan && kColumns == 8 * 32, "a row of a group is a warp's");
          constexpr int kAtOnce = 4;  // without branches: a row alone is a chain of latencies
#pragma unroll 1
          for (int first = 0; first < kWarpRows; first += kAtOnce) {
            const float4* places = staging + (first_row + first) * kRowPlaces;
            float4 x[kAtOnce][2];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
              for (int i = 0; i < 2; ++i)
                x[j][i] = places[j * kRowPlaces + (i * 32 + lane ^ (first + j) % 4 * 2)];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
              const float factor = __shfl_sync(0xffffffffu, own_stats.x, first + j);
              partials.write(last.state_row + first_row + first + j, group * 32 + lane, x[j][0], x[j][1],
                             factor, __shfl_sync(0xffffffffu, own_stats.y, first + j), first + j < rows_left);
            }
          }
        }
      }
      if (note.ends_run()) break;
      fence_async_proxy();  // the next keys are not to be overtaken by what was written here
      if (in_pair) fence_cluster();
      release(stage, group);
      ++segment;
      t += adds_own ? 2 : 0;
      adds_last = adds_own;
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0.0f;
      state[0] = state[1] = SoftmaxState();
    }
  }
  if (smem_partition.quota <= kShortRun) launch_dependents();
  if constexpr (kIsCascade) {
    if (tid == 0) smem_run_end.add_lines(problem.num_rows() * Slots::kRowLines, smem_partition);
  }
  if constexpr (kHasFlags || kIsCascade) mbarrier_wait(is_decided, 0);
  const auto merge = [&](const auto& inputs) {
    merge_apart<kColumnThreads, kTileKV, kIsCascade>(
        smem_run_end, columns_barrier, inputs, smem_partition,
        Gathering{room, kHasFlags && smem_all_there, queries_full, queries_empty, smem_first_round});
  };
  if constexpr (kIsCascade) {
    merge(MergeInputs<decltype(make_problem()), Slots, decltype(results())>{make_problem(), ctas(), slots(),
                                                                            results()});
  } else {
    // In shared memory, in the place of the weights: a stack is read from further away, and half a microsecond later.
    using Inputs = MergeInputs<Int<0>, Slots, decltype(results())>;
    Inputs& inputs = *reinterpret_cast<Inputs*>(smem_weights);
    if (tid == 0) inputs = Inputs{{}, ctas(), slots(), results()};
    columns_barrier.wait();
    merge(inputs);
  }
  if (in_pair) cluster_wait();  // the other may still have told this one's barriers
}

#endif

}  // namespace cupyattn
