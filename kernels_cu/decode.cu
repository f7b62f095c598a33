// GQA/MQA/MHA decode attention over a paged KV cache, in one launch.
//
// Grid: as many CTAs as fit on the device (persistent). Each takes a contiguous run of KV tiles, which costs as much as
// the others' (schedule.cuh), through a ring of kStages shared-memory tiles; copies run ahead across groups and
// requests.
// kWarpsQ x kWarpsKV warps work on a tile of kTileQ query rows x kTileKV keys: warp (wq, wk) has its own
// 8 * kRowBlocks rows and its own share of the keys, so that between two barriers of the ring warps do not
// wait for each other. Everything is transposed, keys or dimensions as the 16 rows of an MMA and 8 query rows
// as its columns, so that a group of up to 8 query heads wastes nothing:
//   S^T = K Q^T       [keys, rows]   accumulators become the B operand of the next product by movmatrix
//   O^T += V^T P^T    [head_dim, rows]
// On sm_90a, four warps with rows of their own multiply as a warpgroup instead (wgmma.cuh), 16 rows each, of which the
// tile may have 8:
//   S = Q K^T         [rows, keys]   from shared memory; accumulators become the A operand of the next product
//   O += P V          [rows, head_dim]
// Where a segment (the tiles of a group that are in the run) ends, the warps' states are merged through shared
// memory, or those of a warpgroup written from registers. What segments leave of a group over several CTAs, these merge
// when their runs are done (partials.cuh).
// With Levels, requests are the groups of all levels of a cascade (cascade.cuh).
// A row of the tile is (query token, query head of the group): row = token * group_size + head.
//
// KV heads may come in parts (part_shift), each with a line and every so many-th CTA for itself: the rows of neighbouring
// heads, which lie side by side in memory, are then read at about the same time, and DRAM is faster by 1%.
//
// With kHeads == 2, a KV head of all this is a *pair* of neighbours, whose rows of keys lie side by side and are copied
// as one: DRAM reads 256 bytes in a piece faster than 128. The host counts in pairs: num_kv_heads, head strides, and a
// group_size of 2 * g query heads. In products each head keeps to itself, or a NaN would spread: it has a block of 8
// query rows, and half of the columns. So there are gaps in the tile where g < 8, and a row has another *slot* there:
//   row   0 .. g - 1 | g .. 2g - 1      of a group, in q, out and partial states
//   slot  0 .. g - 1 | 8 .. 8 + g - 1   of the tile, in shared memory and registers

#include "cupyattn/cascade.cuh"
#include "cupyattn/cp_async.cuh"
#include "cupyattn/divide.cuh"
#include "cupyattn/launch.cuh"
#include "cupyattn/mma.cuh"
#include "cupyattn/paged.cuh"
#include "cupyattn/partials.cuh"
#include "cupyattn/run.cuh"
#include "cupyattn/schedule.cuh"
#include "cupyattn/state.cuh"
#include "cupyattn/tile.cuh"
#include "cupyattn/wgmma.cuh"

namespace cupyattn {

// clang-format off
template <typename T, int kHeadDim, int kWarpsQ, int kRowBlocks, int kWarpsKV, int kTileKV, int kStages,
          int kCtasPerSM, int kHeads, bool kFixedSplits, typename... Cascade>
__global__ void __launch_bounds__(32 * kWarpsQ * kWarpsKV, kCtasPerSM)
    decode_kernel(const T* __restrict__ q,              // [num_tokens, num_qo_heads, head_dim], strided
                  const T* __restrict__ k_pages,        // paged, PageStrides
                  const T* __restrict__ v_pages,        // paged, PageStrides
                  const int* qo_indptr,                 // [batch_size + 1] or null
                  const int* kv_indptr,                 // [batch_size + 1] or null
                  const int* kv_indices,                // page ids
                  const int* kv_lens,                   // [batch_size]
                  T* __restrict__ out,                  // as q
                  float* __restrict__ lse,              // [num_tokens, num_qo_heads] or null, natural log
                  half_t* partial_out,                  // [num_slots, kTileQ, kRowDims], see Partials
                  u64* partial_flags,                   // [num_slots, kTileQ, kRowDims / 32]
                  Departures<TileInfo>::Memory* departures,  // all zero between launches, as both above
                  i64 q_stride_token, i64 q_stride_head,
                  i64 k_stride_page, i64 k_stride_token, i64 k_stride_head,
                  i64 v_stride_page, i64 v_stride_token, i64 v_stride_head,
                  i64 out_stride_token, i64 out_stride_head,
                  i64 lse_stride_token, i64 lse_stride_head,
                  int batch_size,
                  int num_kv_heads,                     // of a part of them
                  int part_shift,                       // log2 of the number of parts
                  int group_size, u32 group_multiplier, int group_shift,  // Divisor
                  int page_size, u32 page_multiplier, int page_shift,     // Divisor
                  int num_pages,                        // that the cache has
                  int table_row_stride,
                  int num_table_entries,                // of kv_indices, to prefetch, and to be guessed from
                  int split_shift,                      // log2 of the tiles of a fixed split
                  int max_splits,                       // that the workspace has slots for
                  int reads_early,                      // what pdl=True allows, see launch.cuh
                  int window_left,                      // -1: unbounded
                  float sm_scale,
                  float logits_soft_cap,                // 0: none
                  const __grid_constant__ Cascade... cascade) {  // nothing, or Levels: then kv_lens and the like too
  // clang-format on
  constexpr int kWarps = kWarpsQ * kWarpsKV;
  constexpr int kThreads = 32 * kWarps;
  constexpr int kWarpRows = 8 * kRowBlocks;
  constexpr int kTileQ = kWarpRows * kWarpsQ;
  constexpr int kKeysPerWarp = kTileKV / kWarpsKV;
  constexpr int kLongRun = 64;  // tiles
  // Of a merge, as there are registers: inside the loop over tiles, where fixed splits are merged, fewer than after it.
  constexpr bool kFewRegisters = kThreads * kCtasPerSM >= 512 || (kFixedSplits && kTileQ == 32);
  constexpr int kStatesInFlight = (kFixedSplits ? 4 : 8) / (kFewRegisters ? 2 : 1);
  constexpr int kKeyBlocks = kKeysPerWarp / 16;
  constexpr int kDimSteps = kHeadDim / 16;
  constexpr int kRowDims = kHeads * kHeadDim;  // of a row of keys
  constexpr int kHeadBlocks = kRowBlocks / kHeads;
  static_assert(kHeadDim % 16 == 0 && kKeysPerWarp % 16 == 0, "a warp works on 16 x 16 blocks");
  static_assert(kThreads >= 2 * kTileKV, "a thread finds the place of one K or one V row");
  static_assert(kRowBlocks == 1 || kRowBlocks % 2 == 0, "queries are loaded in pairs of blocks");
  static_assert(kStages >= 2, "one tile is read while another is filled");
  constexpr bool kUsesWgmma = kHasWgmma && kWarpsQ == 4 && kRowBlocks <= 2 && kWarpsKV == 1 &&
                              kTileKV == 64 && (kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256);
  using Layout = typename LayoutOf<kRowDims, kTileKV, kUsesWgmma>::Type;
  using QueryLayout = typename LayoutOf<kHeadDim, kTileQ, kUsesWgmma>::Type;
  constexpr bool kIsCascade = sizeof...(Cascade) > 0;
  static_assert(!kIsCascade || !kFixedSplits);
  static_assert(
      kHeads == 1 || (kHeads == 2 && kRowBlocks == 2 && kWarpsQ == 1 && !kIsCascade && !kFixedSplits),
      "a pair has two blocks of rows, of one query token a request");
  // Queries stay in registers where there is room for them.
  constexpr bool kQueriesInRegisters = kDimSteps * kRowBlocks <= 16;
  // After a segment's first keys, where a tile of these is so large that queries behind it are there in time.
  constexpr bool kQueriesLast = kHeadDim > 128;
  // One chain of dependent MMAs would leave a tensor core idle most of the time.
  constexpr int kChains = kKeyBlocks * kRowBlocks == 1 ? 2 : 1;

  const Divisor group{group_size, group_multiplier, group_shift};
  const Divisor page{page_size, page_multiplier, page_shift};
  extern __shared__ __align__(kUsesWgmma ? 1024 : 128) unsigned char smem[];
  __shared__ Problem::Note smem_notes[kIsCascade ? 1 : kThreads];
  // Where tiles have many rows, two ends of a run cost more than runs of unequal length.
  auto problem = uneven<kFixedSplits ? 0 : 1, false, 1, (kTileQ > 32)>(
      problem_of(departures, smem, smem_notes, kThreads, PageTable{kv_indptr, kv_indices, table_row_stride},
                 num_table_entries, qo_indptr, kv_lens, batch_size, num_kv_heads, group, window_left,
                 split_shift, max_splits, cascade...));
  const PageStrides k_strides{k_stride_page, k_stride_token, k_stride_head};
  const PageStrides v_strides{v_stride_page, v_stride_token, v_stride_head};
  const Partials<kHeadDim, kTileQ, kUsesWgmma> partials{partial_out, partial_flags};
  const Output<T, kTileQ> output{
      out, lse, out_stride_token, out_stride_head, lse_stride_token, lse_stride_head, group};

  constexpr int kTileBytes = kTileKV * Layout::kRowBytes;
  constexpr int kQueryBytes = kTileQ * QueryLayout::kRowBytes;
  // The warps' states at the end of a segment take the place of its last tile. A thread stores rows 2t and 2t + 1 of
  // dimension g: XOR, or 4 more floats a row, spreads a warp's stores over all banks.
  constexpr int kScratchRow = Layout::kSwizzled ? kHeadDim : kHeadDim + 4;  // floats
  static_assert(kWarps * kWarpRows * kScratchRow * 4 <= 2 * kTileBytes);
  const auto scratch_at = [&](int row, int dim) {
    return row * kScratchRow + (Layout::kSwizzled ? dim ^ (row / 2 % 4 * 8) : dim);
  };
  // A capped logit is cap * tanh(s * sm_scale / cap); both kinds are scaled to base 2.
  const float logit_scale = sm_scale * (logits_soft_cap > 0.0f ? reciprocal_approx(logits_soft_cap) : kLog2E);
  const float soft_cap_log2 = logits_soft_cap * kLog2E;

  unsigned char* smem_kv = smem;                               // [kStages][K, V] tiles
  unsigned char* smem_q = smem_kv + kStages * 2 * kTileBytes;  // [kStages] tiles, one a segment
  const T** smem_rows = reinterpret_cast<const T**>(smem_q + kStages * kQueryBytes);  // [2][K, V][kTileKV]
  __shared__ TileInfo smem_tiles[kStages];
  __shared__ float2 smem_states[kWarps * kWarpRows];  // (max, sum) of each warp's rows
  __shared__ RunEnd smem_run_end;
  __shared__ Positions<kTileQ, kIsCascade ? kStages : 0>
      smem_positions;  // by the rows of a segment's queries

  const int tid = threadIdx.x;
  const int lane = tid % 32;
  const int warp = tid / 32;
  const int warp_q = warp / kWarpsKV;
  const int warp_kv = warp % kWarpsKV;
  const int quad_row = lane / 4;      // g of mma.cuh
  const int quad_col = lane % 4 * 2;  // 2t of mma.cuh

  // The chain lengths -> offsets -> page ids -> keys is what a small batch waits for. All CTAs together ask L2 for all but
  // the keys at once.
  problem.template prefetch<kThreads>();
  // Parameters lie in constant memory, which each SM reads in lines of 64 bytes when first used, one after
  // the other. Here that hides behind the lengths, or the kernel before.
  touch(q_stride_token);
  touch(v_stride_page);
  touch(lse_stride_head);
  touch(logits_soft_cap);

  // What does not depend on the lengths is computed while they are on their way.
  // Threads 0 .. kTileKV - 1 find K rows, the next kTileKV V rows.
  const bool finds_v = tid / kTileKV == 1;
  const int parts_log2 = kIsCascade || kFixedSplits ? 0 : part_shift;
  const int part = blockIdx.x & (1 << parts_log2) - 1;
  const int first_head = part * num_kv_heads;
  PageStrides strides = finds_v ? v_strides : k_strides;
  const T* pages_begin = finds_v ? v_pages : k_pages;
  // Where this lane's ldmatrix rows begin, from the beginning of a tile on.
  u32 q_offset =
      QueryLayout::offset(warp_q * kWarpRows + lane % 8 + (kRowBlocks > 1 ? lane / 16 * 8 : 0), lane / 8 % 2);
  u32 k_offset = Layout::offset(warp_kv * kKeysPerWarp + lane % 16, lane / 16);
  u32 v_offset = Layout::offset(warp_kv * kKeysPerWarp + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  if constexpr (kTileQ <= 16 &&
                !(kFixedSplits && kCtasPerSM > 2)) {  // with more rows there are no registers to keep it in
    pin(strides.page), pin(strides.token), pin(strides.head), pin(pages_begin);
    pin(q_offset), pin(k_offset), pin(v_offset);
  }

  Cursor<kTileKV, kTileQ, kFixedSplits> load;  // runs kStages - 1 tiles ahead of the tile in use
  Partition partition;

  // --- Producer: a row's address is found one tile before its copy starts. ---
  const auto keys_left = [&]() { return load.done() ? 0 : load.request.kv_len - load.token_begin(); };
  const auto has_row = [&]() {
    return (kThreads == 2 * kTileKV || tid < 2 * kTileKV) && tid % kTileKV < keys_left();
  };
  FoundRow found;
  const auto find_row = [&]() {  // starts the read of the page table
    if (!has_row()) return;
    found.page =
        static_cast<int>(load_early(found.find(page, load.pages, load.token_begin() + tid % kTileKV)));
  };
  const auto found_row = [&]() {  // waits for it
    return pages_begin + strides.offset(found.page, found.token, first_head + load.kv_head);
  };
  const auto prefetch_row = [&](const T* row) {
#pragma unroll
    for (int i = 0; i < kRowDims * 2; i += 128) prefetch_l2(reinterpret_cast<const char*>(row) + i);
  };
  // Keys and values of the first tile, or of two where runs have more than four; but not what another query tile's CTA asks
  // for. Where runs are of one tile, latencies and little else, no more than 5 MB: more would hold up the kernel before.
  const auto ask_for_keys = [&]() {
    constexpr int kMostAtOnce = 160 * 128 / kRowDims;  // CTAs of such runs that ask for values, too
    if (!has_row()) return;
    // Before a window may be any pages of a cascade's.
    const bool asks = load.q_tile == 0 && static_cast<u32>(load.kv_head) < num_kv_heads &&
                      (!finds_v || partition.quota > 1 || partition.part_units <= kMostAtOnce) &&
                      (!kIsCascade || window_left < 0);
    found.guess(problem, load, page, num_pages, tid % kTileKV, partition.quota > 4 ? 2 : 1, [&]() {
      if (asks) prefetch_row(found_row());
    });
  };
  const auto look_again = [&]() { found.look_again(); };
  const Beginning beginning = guess_run<kThreads, kLaunchesEarly, false>(
      problem, reads_early, load, partition, ask_for_keys, look_again, false, blockIdx.x >> parts_log2,
      gridDim.x >> parts_log2);
  if (beginning == kNoRun) {
    wait_for_predecessor();  // or this kernel could be done before the one that its successor relies on
    return;
  }

  // What other query tiles read too is to stay in L2 for a while.
  const u64 policy_once = evict_first_policy();
  const u64 policy_shared = kIsCascade ? evict_normal_policy() : policy_once;
  int first_seen = 0;  // of a cascade's segment, the first key in anybody's window
  const auto copy_tile = [&](int stage, int slot, int num_keys, int num_hidden, u64 policy) {
    constexpr int kChunks = kTileKV * Layout::kRowChunks;
    constexpr int kRowsAtOnce = kThreads / Layout::kRowChunks;
    static_assert(kChunks % kThreads == 0, "every thread copies as many chunks");
    const u32 smem_tile = smem_address_of(smem_kv) + stage * 2 * kTileBytes;
    if constexpr (kThreads % Layout::kRowChunks == 0) {
      if (num_keys >= kTileKV && (!kIsCascade || num_hidden <= 0)) {
        // The same chunk of every kRowsAtOnce-th row, at addresses with constants between them: three instructions
        // each.
        const int first_row = tid / Layout::kRowChunks;
        const int chunk = tid % Layout::kRowChunks;
        const u32 first = smem_tile + Layout::offset(first_row, chunk);
        const T* const* rows = smem_rows + slot * 2 * kTileKV + first_row;
        constexpr int kCopies = kTileKV / kRowsAtOnce;
        // Addresses read at once; with many rows a thread's, there are no registers for more.
        constexpr int kBatch = kTileQ > 16 && !kUsesWgmma ? 2 : kCopies < 8 ? kCopies : 8;
        static_assert(kCopies % kBatch == 0);
#pragma unroll
        for (int kv = 0; kv < 2; ++kv)
#pragma unroll
          for (int begin = 0; begin < kCopies; begin += kBatch) {
            const T* sources[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) sources[i] = rows[kv * kTileKV + (begin + i) * kRowsAtOnce];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              cp_async_16(Layout::below(first, (begin + i) * kRowsAtOnce) + kv * kTileBytes,
                          sources[i] + chunk * 8, policy);
            }
          }
        return;
      }
    }
#pragma unroll
    for (int kv = 0; kv < 2; ++kv) {
      const T* const* rows = smem_rows + (slot * 2 + kv) * kTileKV;
#pragma unroll kWarpsQ == 1 ? 4 : 1  // with many rows there are no registers for more
      for (int i = tid; i < kChunks; i += kThreads) {
        const int row = i / Layout::kRowChunks;
        const int chunk = i % Layout::kRowChunks;
        // Keys past the end read nothing and become zeros: what lies there may be NaN, and 0 * NaN leaks.
        const bool exists = row < num_keys && (!kIsCascade || row >= num_hidden);
        const T* source = exists ? rows[row] + chunk * 8 : k_pages;
        cp_async_16(smem_tile + kv * kTileBytes + Layout::offset(row, chunk), source, exists, policy);
      }
    }
  };
  const auto row_of_slot = [&](int slot) {  // kTileQ where there is none
    if constexpr (kHeads == 1) return slot;
    const int head_rows = group_size / kHeads;
    return slot % 8 < head_rows ? slot / 8 * head_rows + slot % 8 : kTileQ;
  };
  const auto slot_of_row = [&](int row) {
    if constexpr (kHeads == 1) return row;
    const int head_rows = group_size / kHeads;
    return row < head_rows ? row : 8 + row - head_rows;
  };
  const auto copy_queries = [&](const auto& at, int buffer) {
    const u32 smem_tile = smem_address_of(smem_q) + buffer * kQueryBytes;
    const int first_row = at.q_tile * kTileQ;
    const int num_rows = at.request.qo_len * group_size - first_row;
    constexpr int kRowsAtOnce = kThreads / QueryLayout::kRowChunks;
    if constexpr (kHeads == 1 && kHeadDim <= 128 && kTileQ > kRowsAtOnce &&
                  kThreads % QueryLayout::kRowChunks == 0) {
      if (at.request.qo_len == 1) {  // rows are query heads, at equal distances
        const int row = tid / QueryLayout::kRowChunks;
        const int chunk = tid % QueryLayout::kRowChunks;
        const int head = (first_head + at.kv_head) * group_size + first_row + row;
        const T* source =
            q + problem.row_of(at.request.qo_begin) * q_stride_token + head * q_stride_head + chunk * 8;
        const i64 step = kRowsAtOnce * q_stride_head;
#pragma unroll
        for (int i = 0; i < kTileQ / kRowsAtOnce; ++i) {
          const int slot = row + i * kRowsAtOnce;
          const bool exists = slot < num_rows;
          cp_async_16(smem_tile + QueryLayout::offset(slot, chunk), exists ? source + i * step : q, exists);
        }
        return;
      }
    }
    constexpr int kWarpRowsAtOnce = 32 / QueryLayout::kRowChunks;
    constexpr int kRowsOfWarp = kTileQ / kWarps;
    if constexpr ((kIsCascade || kTileQ > 16) && kHeads == 1 && 32 % QueryLayout::kRowChunks == 0 &&
                  kRowsOfWarp % kWarpRowsAtOnce == 0) {
      static_assert(kTileQ % kWarps == 0 && kRowsOfWarp <= 32);
      // A lane finds one of the warp's rows, as where it lies may have to be read from memory.
      const int own = lane / kWarpRowsAtOnce * kRowsAtOnce + warp * kWarpRowsAtOnce + lane % kWarpRowsAtOnce;
      const T* own_source = nullptr;
      if (lane < kRowsOfWarp && own < num_rows) {
        const int token = group.divide(first_row + own);
        const int head = (first_head + at.kv_head) * group_size + group.modulo(first_row + own, token);
        own_source = q + problem.row_of(at.request.qo_begin + token) * q_stride_token + head * q_stride_head;
      }
      const int chunk = lane % QueryLayout::kRowChunks;
      const int row_at_once = lane / QueryLayout::kRowChunks;
#pragma unroll
      for (int i = 0; i < kTileQ / kRowsAtOnce; ++i) {
        const u64 source =
            __shfl_sync(0xffffffffu, reinterpret_cast<u64>(own_source), i * kWarpRowsAtOnce + row_at_once);
        const int slot = i * kRowsAtOnce + warp * kWarpRowsAtOnce + row_at_once;
        const T* row = reinterpret_cast<const T*>(source);
        cp_async_16(smem_tile + QueryLayout::offset(slot, chunk), source != 0 ? row + chunk * 8 : q,
                    source != 0);
      }
    } else {
      constexpr int kChunks = kTileQ * QueryLayout::kRowChunks;
#pragma unroll kTileQ> 16 ? 1 : 2  // instructions that run once a segment take longer to fetch than to run
      for (int i = 0; i < ceil_div(kChunks, kThreads); ++i) {
        const int slot = (tid + i * kThreads) / QueryLayout::kRowChunks;
        const int chunk = (tid + i * kThreads) % QueryLayout::kRowChunks;
        if (kChunks % kThreads != 0 && slot >= kTileQ) break;
        const int row = row_of_slot(slot);
        const bool exists = row < num_rows;
        const int token = group.divide(first_row + row);
        const int head = (first_head + at.kv_head) * group_size + group.modulo(first_row + row, token);
        const T* source = exists ? q + problem.row_of(at.request.qo_begin + token) * q_stride_token +
                                       head * q_stride_head + chunk * 8
                                 : q;
        cp_async_16(smem_tile + QueryLayout::offset(slot, chunk), source, exists);
      }
    }
  };

  // --- Consumer ---
  u32 q_frag[kQueriesInRegisters ? kDimSteps : 1][kRowBlocks][2];
  float acc[kDimSteps][kRowBlocks][4];
  SoftmaxState state[kRowBlocks][2];  // rows quad_col and quad_col + 1; `sum` over this thread's keys only
  // Of a warpgroup: [kHeadDim / 8][4], see wgmma.cuh; state[0] is of rows quad_row and quad_row + 8 of the warp.
  float wide_acc[kUsesWgmma ? kHeadDim / 2 : 1];
  const auto load_q = [&](u32(&frag)[kRowBlocks][2], int buffer, int step) {
    const u32 address =
        TileLayout<kHeadDim>::advance(smem_address_of(smem_q) + buffer * kQueryBytes + q_offset, step);
    if constexpr (kRowBlocks == 1) {
      ldmatrix_x2(frag[0], address);
    } else {
#pragma unroll
      for (int block = 0; block < kRowBlocks; block += 2) {
        u32 both[4];
        ldmatrix_x4(both, address + block * 8 * QueryLayout::kRowBytes);
        frag[block][0] = both[0], frag[block][1] = both[1];
        frag[block + 1][0] = both[2], frag[block + 1][1] = both[3];
      }
    }
  };

  // Called where a segment has ended, not where the next begins: so nothing of it is live during the merge,
  // which needs the registers.
  const auto clear = [&]() {
    if constexpr (kUsesWgmma) {
      for (float& x : wide_acc) x = 0.0f;
    }
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
      state[block][0] = state[block][1] = SoftmaxState();
#pragma unroll
      for (int step = 0; step < kDimSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[step][block][i] = 0.0f;
        if constexpr (kQueriesInRegisters) q_frag[step][block][0] = q_frag[step][block][1] = 0;
      }
    }
  };

  if (tid < 2) smem_run_end.clear();
  const bool is_found = found.entry != nullptr && beginning == kGuessed;  // look_again has begun to read
  if (!is_found) find_row();
  partition.number_ctas();
  const T* row = nullptr;
  if (has_row()) {  // the first keys are on their way into L2
    row = found_row();
    if (!is_found && (!kIsCascade || window_left < 0)) prefetch_row(row);
  }
  wait_for_predecessor();
  // Not earlier: the next kernel may rely on all before us having finished once we have. In long runs not before the last
  // copy, as the next kernel asks L2 for its first keys, too. In short ones at once, or, where SMs have no room for its
  // CTAs beside ours, and more than half of them have one of ours, when the last keys are there.
  const bool has_room = kCtasPerSM > 1 || 2 * (partition.num_ctas << parts_log2) <= num_sms();
  const bool is_short = partition.quota < kStages;
  if (reads_early || (is_short && has_room)) launch_dependents();
  const Departures<TileInfo> ctas{departures, static_cast<u32>(partition.num_ctas << parts_log2)};
  if (tid == 0) ctas.start();
  clear();
  bool begins_segment = true;
  int q_buffer = 0;
  // The first kStages - 1 rounds only start copies.
#pragma unroll 1
  for (int round = 1 - kStages, load_stage = 0, use_stage = 0, slot = 0, tiles_ahead = 0;
       tiles_ahead > 0 || !load.done(); ++round, slot ^= 1) {
    if (has_row()) {
      if (round > 1 - kStages) row = found_row();
      smem_rows[slot * 2 * kTileKV + tid] = row;
    }
    if (round >= 0) cp_async_wait<kStages - 2>();
    if (kUsesWgmma && round >= 0) fence_async_proxy();
    __syncthreads();  // the tile has landed; the stage read last is free; the rows in `slot` are there

    if (!load.done()) {
      if (begins_segment && !kQueriesLast) copy_queries(load, q_buffer);
      if constexpr (kIsCascade) {
        if (begins_segment && warp == 0) smem_positions.write(problem, load, q_buffer);
        if (begins_segment && window_left >= 0) first_seen = problem.template first_seen<kTileQ>(load);
      }
      const int num_keys = keys_left();
      const int num_hidden = kIsCascade ? first_seen - load.token_begin() : 0;
      const u64 policy =
          kIsCascade && load.request.qo_len * group_size > kTileQ ? policy_shared : policy_once;
      const bool ends_segment = load.ends_segment(problem);
      const auto copied = load;
      const auto go_on = [&]() {
        load.advance(problem);
        find_row();
      };
      // Before the copies, behind which the page ids would wait. Not where next requests are read from memory: copies would
      // wait for that; and many CTAs that share keys stay closer together so, for which L2 is the better.
      const bool goes_on_first = problem.has_notes();
      if (goes_on_first) go_on();
      copy_tile(load_stage, slot, num_keys, num_hidden, policy);
      if (begins_segment && kQueriesLast) copy_queries(copied, q_buffer);
      if (tid == 0) {
        TileInfo& tile = smem_tiles[load_stage];
        tile = TileInfo::of<partials.kRowLines>(copied, problem, partition, begins_segment, ends_segment,
                                                q_buffer);
        tile.enter_part(first_head, 2 * part * partition.num_ctas, kTileQ);
      }
      if (!goes_on_first) go_on();
      if (load.done() && !is_short) launch_dependents();
      begins_segment = ends_segment;
      if (ends_segment && ++q_buffer == kStages) q_buffer = 0;
      if (++load_stage == kStages) load_stage = 0;
      ++tiles_ahead;
    }
    cp_async_commit();
    if (round < 0) continue;
    --tiles_ahead;
    const bool ends_run = tiles_ahead == 0 && load.done();

    const TileInfo& tile = smem_tiles[use_stage];
    const u32 smem_k = smem_address_of(smem_kv) + use_stage * 2 * kTileBytes;
    const u32 smem_v = smem_k + kTileBytes;
    float* smem_scratch = reinterpret_cast<float*>(smem_kv + use_stage * 2 * kTileBytes);
    if (++use_stage == kStages) use_stage = 0;

    if (kQueriesInRegisters && !kUsesWgmma && tile.begins_segment) {
#pragma unroll
      for (int step = 0; step < kDimSteps; ++step) load_q(q_frag[step], tile.q_buffer, step);
    }

    if (ends_run && is_short && !has_room) launch_dependents();
    if (ends_run && tid == 0) smem_run_end.ask(ctas);

    // Called after S, as registers are scarce.
    const auto last_key_of = [&](int row) { return tile.kv_len - tile.qo_len + group.divide(row); };
    const auto last_of = [&](int row_in_tile) {  // the last key that a row sees, or where it stands
      if constexpr (kIsCascade) {
        return smem_positions.at(problem, tile.q_buffer, row_in_tile, tile.kv_len);
      } else {
        const int total_rows = tile.qo_len * group_size;
        return last_key_of(min(tile.q_tile * kTileQ + row_in_tile, total_rows - 1));
      }
    };
    const auto is_hidden = [&](int token, int last) {
      if constexpr (kIsCascade) return problem.is_hidden(token, last, tile.kv_len);
      return token > last || (window_left >= 0 && token < last - window_left);
    };
    const auto all_seen = [&]() {  // as most tiles are by every row
      if constexpr (kIsCascade) {
        return smem_positions.all_see(tile.q_buffer, tile.token_begin, tile.token_begin + kTileKV - 1);
      } else {
        return tile.token_begin + kTileKV - 1 <= last_key_of(tile.q_tile * kTileQ) &&
               (window_left < 0 || tile.token_begin >= last_of(kTileQ - 1) - window_left);
      }
    };
    if constexpr (kUsesWgmma) {
      // S = Q K^T
      // With eight rows a warp, its other eight are whatever lies there: every second eight begins halfway.
      const Operand q_operand =
          swizzled_operand(uniform(smem_address_of(smem_q) + tile.q_buffer * kQueryBytes), 0,
                           kRowBlocks == 1 ? kEightRows / 2 : kEightRows);
      const Operand k_operand = swizzled_operand(uniform(smem_k), 0);
      float s[kTileKV / 2];  // [kTileKV / 8][4], see wgmma.cuh
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kDimSteps; ++step) {
        const u32 in_block = step % 4 * 32;
        wgmma_ss<T>(s, advance(q_operand, step / 4 * QueryLayout::kBlockBytes + in_block),
                    advance(k_operand, step / 4 * Layout::kBlockBytes + in_block), step > 0);
      }
      wgmma_commit();
      const bool is_seen = all_seen();
      wgmma_wait<0>();
      // To base-2 logits, with what a row must not see at -inf.
#pragma unroll
      for (int i = 0; i < kTileKV / 2; ++i) s[i] *= logit_scale;
      if (logits_soft_cap > 0.0f) {
#pragma unroll
        for (int i = 0; i < kTileKV / 2; ++i) s[i] = soft_cap_log2 * tanh_accurate(s[i]);
      }
      if (!is_seen) {
#pragma unroll
        for (int half = 0; half < kRowBlocks; ++half) {
          const int last = last_of(warp * kWarpRows + half * 8 + quad_row);
#pragma unroll
          for (int n = 0; n < kTileKV / 8; ++n)
#pragma unroll
            for (int column = 0; column < 2; ++column) {
              if (is_hidden(tile.token_begin + n * 8 + quad_col + column, last)) {
                s[n * 4 + half * 2 + column] = neg_infinity();
              }
            }
        }
      }
      // Online softmax. The four lanes of a quad have a row.
      u32 p[kTileKV / 16][4] = {};  // the A operand of each 16 keys
      float factor[2] = {1.0f, 1.0f};
      bool rescales = false;
#pragma unroll
      for (int half = 0; half < kRowBlocks; ++half) {
        SoftmaxState& own = state[0][half];
        const bool has_values = own.max != neg_infinity();
        float logit_max = neg_infinity();
#pragma unroll
        for (int n = 0; n < kTileKV / 8; ++n) {
          logit_max = fmaxf(logit_max, fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]));
        }
        logit_max = fmaxf(logit_max, __shfl_xor_sync(0xffffffffu, logit_max, 1));
        logit_max = fmaxf(logit_max, __shfl_xor_sync(0xffffffffu, logit_max, 2));
        factor[half] = own.raise(logit_max);
        rescales |= has_values && factor[half] != 1.0f;
#pragma unroll
        for (int n = 0; n < kTileKV / 8; ++n) {
          const float x = own.weight(s[n * 4 + half * 2]);
          const float y = own.weight(s[n * 4 + half * 2 + 1]);
          own.sum += x + y;
          p[n / 2][n % 2 * 2 + half] = pack2<T>(x, y);
        }
      }
      if (__any_sync(0xffffffffu, rescales)) {  // rare after a segment's first tiles
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) wide_acc[i] *= factor[i / 2 % 2];
      }
      // O += P V
      const Operand v_operand = swizzled_operand(uniform(smem_v), Layout::kBlockBytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kTileKV / 16; ++step) {
        wgmma_rs<T>(wide_acc, p[step], advance(v_operand, step * 16 * kBlockRowBytes));
      }
      wgmma_commit();
      wgmma_wait<0>();
    } else {
      // S^T = K Q^T over the warp's own keys.
      float s[kChains * kKeyBlocks][kRowBlocks][4];
#pragma unroll
      for (int n = 0; n < kChains * kKeyBlocks; ++n)
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][block][i] = 0.0f;
#pragma unroll
      for (int step = 0; step < kDimSteps; ++step) {
        if constexpr (!kQueriesInRegisters) load_q(q_frag[0], tile.q_buffer, step);
        const auto& q_step = q_frag[kQueriesInRegisters ? step : 0];
#pragma unroll
        for (int n = 0; n < kKeyBlocks; ++n)
#pragma unroll
          for (int head = 0; head < kHeads; ++head) {
            u32 k_frag[4];
            ldmatrix_x4(k_frag, TileLayout<kRowDims>::advance(smem_k + k_offset, head * kDimSteps + step) +
                                    n * 16 * Layout::kRowBytes);
#pragma unroll
            for (int block = head * kHeadBlocks; block < (head + 1) * kHeadBlocks; ++block) {
              mma_m16n8k16<T>(s[step % kChains * kKeyBlocks + n][block], k_frag, q_step[block][0],
                              q_step[block][1]);
            }
          }
      }
      if constexpr (kChains == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[0][0][i] += s[1][0][i];
      }

      // To base-2 logits, with what a row must not see at -inf.
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n)
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][block][i] *= logit_scale;
          if (logits_soft_cap > 0.0f) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][block][i] = soft_cap_log2 * tanh_accurate(s[n][block][i]);
          }
        }
      if (!all_seen()) {
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            const int row_in_tile = warp_q * kWarpRows + block * 8 + quad_col + column;
            const int last = last_of(row_in_tile);
#pragma unroll
            for (int n = 0; n < kKeyBlocks; ++n)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const int token = tile.token_begin + warp_kv * kKeysPerWarp + n * 16 + half * 8 + quad_row;
                if (is_hidden(token, last)) s[n][block][half * 2 + column] = neg_infinity();
              }
          }
      }

      // Online softmax of the warp's rows, over its own keys.
      float factor[kRowBlocks][2];
      bool rescales = false;
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          float logit_max = neg_infinity();
#pragma unroll
          for (int n = 0; n < kKeyBlocks; ++n)
            logit_max = fmaxf(logit_max, fmaxf(s[n][block][column], s[n][block][2 + column]));
#pragma unroll
          for (int delta = 4; delta < 32; delta *= 2)
            logit_max = fmaxf(logit_max, __shfl_xor_sync(0xffffffffu, logit_max, delta));
          const bool has_values = state[block][column].max != neg_infinity();
          factor[block][column] = state[block][column].raise(logit_max);
          rescales |= has_values && factor[block][column] != 1.0f;
#pragma unroll
          for (int n = 0; n < kKeyBlocks; ++n)
#pragma unroll
            for (int i = column; i < 4; i += 2) {
              s[n][block][i] = state[block][column].weight(s[n][block][i]);
              state[block][column].sum += s[n][block][i];
            }
        }
      if (__any_sync(0xffffffffu, rescales)) {  // rare after a segment's first tiles
#pragma unroll
        for (int step = 0; step < kDimSteps; ++step)
#pragma unroll
          for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[step][block][i] *= factor[block][i % 2];
      }

      // O^T += V^T P^T over the warp's own keys.
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
        u32 p_frag[kRowBlocks][2];
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            p_frag[block][half] = movmatrix_trans(pack2<T>(s[n][block][half * 2], s[n][block][half * 2 + 1]));
          }
#pragma unroll
        for (int step = 0; step < kDimSteps; ++step)
#pragma unroll
          for (int head = 0; head < kHeads; ++head) {
            u32 v_frag[4];
            ldmatrix_x4_trans(v_frag,
                              TileLayout<kRowDims>::advance(smem_v + v_offset, head * kDimSteps + step) +
                                  n * 16 * Layout::kRowBytes);
#pragma unroll
            for (int block = head * kHeadBlocks; block < (head + 1) * kHeadBlocks; ++block) {
              mma_m16n8k16<T>(acc[step][block], v_frag, p_frag[block][0], p_frag[block][1]);
            }
          }
      }
    }
    if (!tile.ends_segment) continue;

    // --- End of a segment: its state is the result or the run's partial state. ---
    const int num_rows = tile.num_rows<kTileQ>(group);
    const bool is_complete = tile.group.num_partials == 1;
    if (!kIsCascade && !is_complete && tid < 4) smem_run_end.add_together(tile);
    const auto result_at = [&](int row, int dim) {
      if constexpr (kIsCascade) {
        return result_row(problem, output, tile, row, dim);
      } else {
        return output.row_at(tile, row, dim);
      }
    };
    if constexpr (kUsesWgmma) {
      write_rows<kRowBlocks>(tile, partials, state[0], wide_acc, warp * kWarpRows, num_rows, lane,
                             [&](int row) { return result_at(row, quad_col); });
    } else {
      // The warps' states become one.
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          SoftmaxState& own = state[block][column];
#pragma unroll
          for (int delta = 4; delta < 32; delta *= 2) own.sum += __shfl_xor_sync(0xffffffffu, own.sum, delta);
          if (quad_row == 0) {
            smem_states[warp * kWarpRows + block * 8 + quad_col + column] = make_float2(own.max, own.sum);
          }
        }
      __syncthreads();  // all warps are done with the tile
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
        for (int step = 0; step < kDimSteps; ++step)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // scratch_at(row, step * 16 + i / 2 * 8 + quad_row), from one register
            const int begin = scratch_at(warp * kWarpRows + quad_col, quad_row);
            const int dim = step * 16 + i / 2 * 8;
            const int in_row = Layout::kSwizzled ? (begin ^ dim % 32) + dim / 32 * 32 : begin + dim;
            smem_scratch[in_row + (block * 8 + i % 2) * kScratchRow] = acc[step][block][i];
          }
      __syncthreads();
      // Where a thread would go through this loop several times, it has two lines of a row at once: two chains of latencies
      // side by side.
      constexpr u32 kLines = kHeadDim % 128 == 0 && kTileQ * partials.kRowVecs >= 2 * kThreads ? 2 : 1;
      constexpr u32 kVecs = partials.kRowVecs / kLines;  // of a row, or of a half of its lines
      const u32 num_vecs = num_rows * kVecs;
#pragma unroll 1
      for (u32 i = tid; (i & ~31u) < num_vecs; i += kThreads) {
        const bool exists = i < num_vecs;
        const u32 row = exists ? i / kVecs : 0;
        const u32 vec = i % kVecs;
        const u32 dim = partials.first_dim(vec);
        constexpr u32 kNextDim = partials.first_dim(kVecs);  // how much further the second line's are
        static_assert(kLines == 1 || (kNextDim % 32 == 0 && partials.kRowDims == kHeadDim));
        const bool has_more = partials.has_more(dim);
        // A warp's is kWarpRows after the last one's.
        const u32 first = row / kWarpRows * kWarpsKV * kWarpRows + slot_of_row(row % kWarpRows);
        const float2* states = smem_states + first;
        const float* rows = smem_scratch + scratch_at(first, dim);
        const float* more = smem_scratch + scratch_at(first, dim + partials.kSpan);
        float2 theirs[kWarpsKV];
        SoftmaxState merged;
#pragma unroll
        for (int w = 0; w < kWarpsKV; ++w) {
          theirs[w] = states[w * kWarpRows];
          merged.max = fmaxf(merged.max, theirs[w].x);
        }
        float4 low[kLines] = {};
        float4 high[kLines] = {};
#pragma unroll
        for (int w = 0; w < kWarpsKV; ++w) {
          static_assert(kWarpRows % 8 == 0, "swizzled as the first warp's");
          const float weight = merged.weight(theirs[w].x);
          merged.sum += weight * theirs[w].y;
#pragma unroll
          for (int j = 0; j < kLines; ++j) {
            const int at = w * kWarpRows * kScratchRow + j * kNextDim;
            low[j] += *reinterpret_cast<const float4*>(rows + at) * weight;
            if (has_more) high[j] += *reinterpret_cast<const float4*>(more + at) * weight;
          }
        }
        const float inverse = merged.inverse_sum();
        if (!is_complete) {
          float x[kLines][8];
#pragma unroll
          for (int j = 0; j < kLines; ++j) {
            x[j][0] = low[j].x, x[j][1] = low[j].y, x[j][2] = low[j].z, x[j][3] = low[j].w;
            x[j][4] = high[j].x, x[j][5] = high[j].y, x[j][6] = high[j].z, x[j][7] = high[j].w;
          }
          partials.template write_lines<kVecs / 4>(tile.state_row + row, vec / 4, vec % 4, x, inverse,
                                                   merged.lse_log2(), exists);
        } else if (exists) {
          const auto target = result_at(row, dim);
#pragma unroll
          for (int j = 0; j < kLines; ++j) {
            target.write(j * kNextDim, low[j] * inverse);
            if (has_more) target.write(j * kNextDim + partials.kSpan, high[j] * inverse);
          }
          target.write_lse(merged.lse_log2());
        }
      }
    }
    // Page ids that L1 keeps take room from copies under way: without this a long run would lose 1 to 2%. A short one
    // would lose 1% by it.
    if (!is_complete && !ends_run && partition.quota >= kLongRun && tid == 0) __threadfence();
    if (kFixedSplits && tile.num_sharers == 1 && !is_complete &&
        tile.state_row == (tile.group.first + tile.group.num_partials - 1) * kTileQ) {
      __syncthreads();  // all are done with the tile, and with its place as scratch memory
      merge_share<kStatesInFlight, kFixedSplits>(all_threads<kThreads>(), partials, output, tile,
                                                 tile.first_line, tile.end_line, smem_scratch);
    }
    if (ends_run) break;
    clear();
  }

  float* smem_scratch = reinterpret_cast<float*>(smem_kv);
  if constexpr (kIsCascade) {
    if (tid == 0) smem_run_end.add_lines(problem.num_rows() * partials.kRowLines, partition);
    smem_run_end.merge(ctas, NamedBarrier<kThreads>(), [&](const auto& shares) {
      merge_rows<kThreads, kTileKV>(problem, partition, partials, output, shares, smem_scratch);
    });
  } else {
    constexpr Halves kHalves = kFixedSplits ? Halves::kNone : Halves::kOfShares;
    smem_run_end.merge(ctas, NamedBarrier<kThreads>(), [&](const auto& shares) {
      merge_shares<kStatesInFlight, kThreads, kFixedSplits, kHalves>(partials, output, shares, smem_scratch);
    });
  }
}

}  // namespace cupyattn
