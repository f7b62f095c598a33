// MLA decode attention for sm_90a: the job of mla.cu, by the tensor cores' asynchronous products.
//
// Grid: clusters of two CTAs, one CTA an SM (persistent), each cluster with an equal, contiguous run of KV tiles
// (schedule.cuh). A tile is 48 keys; a query tile kTileQ rows, padded to the 64 of a product, which costs nothing where
// memory is the limit.
//
// The two CTAs of a cluster halve every row of 576 = 512 + 64 columns: each copies its 256 + 32 columns of the keys,
// computes what they add to S = Q K^T, and sends that to the other one's shared memory, so that both have all of S and
// the weights P. Then each has its 256 columns of O += P V. So a key is read once for 128 query rows, and a tile takes
// half of the shared memory that it would take in one CTA.
//
// Three warpgroups of 128 threads. The last one copies: KV tiles into a ring of kStages, the queries of a segment into
// the one buffer there is for them. The other two compute: with more than 64 rows, each has 64 of them; else each has
// every other tile, and where a segment ends they merge their states. The S of a warpgroup's next tile is computed
// while the present one's maxima are found, and is under way to the other CTA during the rest of its softmax.
//
// Shared memory, in half rows of 288 columns: four blocks and a half block (wgmma.cuh).
//   queries            64 or 128 rows, 36 KiB a 64
//   keys, values       kStages x 48 rows, 27 KiB each
//   the other CTA's S  8 warps x 3 KiB
//   results            8 warps x 2.25 KiB with 128 rows, else in the place of the segment's last tiles
// A row of the query tile is (query token, query head): row = token * num_heads + head.

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

// A place in the ring of tiles, and the parity of its barriers' phase.
template <int kStages>
struct RingPlace {
  int stage;
  u32 parity;

  __device__ __forceinline__ RingPlace plus(int tiles) const {
    const bool wraps = stage + tiles >= kStages;
    return {wraps ? stage + tiles - kStages : stage + tiles, parity ^ wraps};
  }
};

// What consumers must know of every tile, in one word: they read little of its TileInfo but where a segment ends.
struct TileNote {
  u32 bits;

  __device__ __forceinline__ TileNote(u32 bits) : bits(bits) {}
  // Of its query tile, the rows that exist; whether they all see all of its keys; from this tile on, how many the
  // segment and the run have (more than two are three); whether the segment begins.
  __device__ __forceinline__ TileNote(int num_rows, bool all_seen, int segment_left, int run_left,
                                      bool begins)
      : bits(num_rows | all_seen << 8 | min(segment_left, 3) << 9 | min(run_left, 3) << 11 | begins << 13) {}
  __device__ __forceinline__ int num_rows() const { return bits & 0xff; }
  __device__ __forceinline__ bool all_seen() const { return bits >> 8 & 1; }
  __device__ __forceinline__ int segment_left() const { return bits >> 9 & 3; }
  __device__ __forceinline__ int run_left() const { return bits >> 11 & 3; }
  __device__ __forceinline__ bool begins_segment() const { return bits >> 13 & 1; }
};

// clang-format off
template <typename T, int kTileQ, typename... Cascade>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
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
                    float* partial_out,                 // [2, num_slots, kTileQ, 256], see Partials
                    float* partial_lse,                 // [2, num_slots, kTileQ, 16 or 4], base 2
                    Departures<TileInfo>::Memory* departures,  // all zero between launches, as partial_lse
                                                               // and, with kWordFlags, partial_out
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
  constexpr int kCkvDim = 512;
  constexpr int kKpeDim = 64;
  constexpr int kColumns = kCkvDim / 2;  // of ckv, a CTA's
  constexpr int kKpeColumns = kKpeDim / 2;
  constexpr int kRows = 64;  // of a product
  constexpr int kTileKV = 48;
  constexpr int kRowGroups = kTileQ > kRows ? 2 : 1;  // warpgroups with rows of their own
  constexpr int kTileStep = 3 - kRowGroups;           // from a warpgroup's tile to its next
  constexpr int kStages = kRowGroups == 2 ? 4 : 6;
  constexpr int kThreads = 384;
  constexpr int kConsumers = 256;
  constexpr int kConsumerWarps = kConsumers / 32;
  constexpr int kProducers = kThreads - kConsumers;
  constexpr int kBlocks = kColumns / kBlockColumns;
  constexpr int kQBlockBytes = kRows * kBlockRowBytes;
  constexpr int kQTileBytes = kBlocks * kQBlockBytes + kQBlockBytes / 2;
  constexpr int kBlockBytes = kTileKV * kBlockRowBytes;
  constexpr int kTileBytes = kBlocks * kBlockBytes + kBlockBytes / 2;
  constexpr int kLogits = kTileKV / 2;                // of a tile, a thread's
  constexpr int kLogitsBytes = 16 * kTileKV * 4;      // of a warp
  constexpr int kStagingRow = 64 + 8;                 // floats: 8 more spread a warp's pairs over all banks
  constexpr int kStagingBytes = 8 * kStagingRow * 4;  // of a warp
  constexpr int kPassColumns = kTileQ <= 16 ? 256 : kTileQ <= 32 ? 128 : 64;  // of results, written at once
  constexpr int kPassRow =
      kPassColumns + (kTileQ <= 32 ? 8 : 16);  // few threads a row: of neighbouring rows, other banks
  static_assert(kRowGroups == 2 || kTileQ * (kPassRow * 4 + 8) <= kTileBytes);
  static_assert(kTileQ <= kRowGroups * kRows);
  // Whether O += P V goes on during the next tile's softmax: where products are the limit, and where every tile is the
  // same warpgroup's there are registers for it.
  constexpr bool kOverlaps = kRowGroups == 2;

  const Divisor heads{num_qo_heads, heads_multiplier, heads_shift};
  const Divisor page{page_size, page_multiplier, page_shift};
  constexpr bool kIsCascade = sizeof...(Cascade) > 0;
  extern __shared__ __align__(1024) unsigned char smem_q[];  // blocks are aligned to 1024 bytes
  const auto make_problem = [&]() {
    if constexpr (kIsCascade) {
      return cascade_problem(departures, smem_q, 1, heads, window_left, cascade...);
    } else {
      return Problem{PageTable{kv_indptr, kv_indices, table_row_stride},
                     qo_indptr,
                     kv_lens,
                     batch_size,
                     1,
                     heads,
                     window_left,
                     split_shift,
                     max_splits};
    }
  };
  const auto problem = make_problem();
  // Where the states of this CTA's half of the columns begin, of a cascade's.
  const auto first_state_row = [&]() {
    if constexpr (kIsCascade) {
      return cluster_rank() * (problem.levels.num_slot_rows + problem.levels.num_levels * problem.num_rows());
    } else {
      return 0;
    }
  };
  // Functions: what has an address, for a call to read, is in memory everywhere.
  using Slots = Partials<kColumns, kTileQ, (kTileQ < kRows || kIsCascade)>;
  const auto slots = [&]() { return Slots{partial_out, partial_lse}; };
  const auto results = [&]() {
    return Output<T, kTileQ>{out,  lse, out_stride_token, out_stride_head, lse_stride_token, lse_stride_head,
                             heads};
  };

  unsigned char* smem_kv = smem_q + kRowGroups * kQTileBytes;   // [kStages] tiles
  unsigned char* smem_logits = smem_kv + kStages * kTileBytes;  // [kConsumerWarps][kLogits / 4][32] float4
  unsigned char* smem_staging = smem_logits + kConsumerWarps * kLogitsBytes;  // with kRowGroups == 2
  __shared__ TileInfo smem_tiles[kStages];
  __shared__ u32 smem_notes[kStages];  // TileNote
  __shared__ RunEnd smem_run_end;
  __shared__ Partition smem_partition;
  // Of a cascade's segment that the producer is at, and of tiles that not all rows see all of.
  __shared__ Positions<kTileQ, kIsCascade ? 1 : 0> smem_positions;
  __shared__ int smem_tile_positions[kIsCascade ? kStages * kTileQ : 1];
  __shared__ __align__(8) u64 smem_barriers[2 * kStages + 1 + 2 * kConsumerWarps];
  const auto full_at = [&](int stage) { return smem_address_of(smem_barriers + stage); };
  const auto empty_at = [&](int stage) { return smem_address_of(smem_barriers + kStages + stage); };
  const u32 q_empty = smem_address_of(smem_barriers + 2 * kStages);
  const auto logits_full_at = [&](int warp) { return q_empty + 8 + 8 * warp; };
  const auto logits_empty_at = [&](int warp) { return q_empty + 8 + 8 * (kConsumerWarps + warp); };

  const int tid = threadIdx.x;
  const int warp = __shfl_sync(0xffffffffu, tid / 32, 0);  // so the compiler knows it the same for all

  // As in decode.cu: offsets and page ids are in L2 when the lengths have come from DRAM.
  problem.template prefetch<kThreads>(num_table_entries);
  touch(q_ckv_stride_token);
  touch(ckv_stride_page);
  touch(lse_stride_head);
  touch(logits_soft_cap);
  if (tid == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full_at(stage), kProducers + 1);
      mbarrier_init(empty_at(stage), 4 * kRowGroups);
    }
    mbarrier_init(q_empty, kConsumerWarps);
    for (int i = 0; i < kConsumerWarps; ++i) {
      mbarrier_init(logits_full_at(i), 1);
      mbarrier_init(logits_empty_at(i), 1);
    }
    fence_mbarrier_init();
  }
  if (tid < 2) smem_run_end.clear();
  cluster_arrive_relaxed();

  Cursor<kTileKV, kTileQ, false, !kIsCascade> load;
  Partition partition;
  const bool has_run = begin_run<kThreads>(problem, load, partition, blockIdx.x / 2, gridDim.x / 2);
  partition.number_ctas();
  if (tid == 0) smem_partition = partition;
  __syncthreads();  // it is there: what follows waits for arrivals that were before it
  cluster_wait();   // all the mbarriers are there
  if (!has_run) {
    wait_for_predecessor();  // or this kernel could be done before the one that its successor relies on
    return;
  }

  const auto ctas = [&]() {
    return Departures<TileInfo>{departures, 2 * static_cast<u32>(smem_partition.num_ctas)};
  };
  if (warp >= kConsumerWarps) {
    // --- Producer: each warp copies 12 rows of a tile. ---
    constexpr int kWarpRows = kTileKV / 4;
    give_registers<72>();
    const int lane = lane_id();
    const PageStrides ckv_strides{ckv_stride_page, ckv_stride_token, 0};
    const PageStrides kpe_strides{kpe_stride_page, kpe_stride_token, 0};
    const int first_row = (warp - kConsumerWarps) * kWarpRows;
    // Lanes 0 .. 11 find rows of ckv, lanes 16 .. 27 those of kpe, one tile before the copy.
    const auto keys_left = [&]() { return load.done() ? 0 : load.request.kv_len - load.token_begin(); };
    int found_page = 0;
    int found_token = 0;
    const auto find_row = [&]() {  // starts the read of the page table
      if (lane % 16 >= min(keys_left() - first_row, kWarpRows)) return;
      const int token = load.token_begin() + first_row + lane % 16;
      const int entry = page.divide(token);
      found_page = static_cast<int>(load_early(load.pages + entry));
      found_token = page.modulo(token, entry);
    };
    const auto found_row = [&]() {
      const int rank = cluster_rank();
      return reinterpret_cast<u64>(
          lane >= 16 ? kpe_pages + rank * kKpeColumns + kpe_strides.offset(found_page, found_token, 0)
                     : ckv_pages + rank * kColumns + ckv_strides.offset(found_page, found_token, 0));
    };
    // Where CTAs with other query tiles read the same keys, these must stay in L2 for a while.
    const bool reads_once = smem_partition.num_parts == 1;
    // What consumers must know of the tile that the cursor points at.
    const auto tell = [&](int stage, bool begins_segment) {
      if (warp != kConsumerWarps) return;
      const bool ends_segment = load.ends_segment(problem);
      const int run_left = load.unit_end - load.unit;
      const int first_row = load.q_tile * kTileQ;
      const int num_rows = min(load.request.qo_len * num_qo_heads - first_row, kTileQ);
      const int first_token = load.token_begin();
      const auto last_key_of = [&](int row) {
        return load.request.kv_len - load.request.qo_len + heads.divide(row);
      };
      bool all_seen;
      if constexpr (kIsCascade) {
        if (begins_segment) smem_positions.template write<true>(problem, load, 0);
        __syncwarp();
        all_seen = smem_positions.all_see(0, first_token, first_token + kTileKV - 1);
        for (int row = lane; row < kTileQ && !all_seen; row += 32) {
          smem_tile_positions[stage * kTileQ + row] = smem_positions.rows[0][row];
        }
        __syncwarp();
      } else {
        all_seen = first_token + kTileKV - 1 <= last_key_of(first_row) &&
                   (window_left < 0 || first_token >= last_key_of(first_row + num_rows - 1) - window_left);
      }
      const TileNote note(num_rows, all_seen, min(load.request.num_tiles() - load.tile, run_left), run_left,
                          begins_segment);
      if (lane == 0) smem_notes[stage] = note.bits;
      if (all_seen && !ends_segment) return;
      TileInfo tile =
          TileInfo::of<Slots::kRowLines>(load, problem, smem_partition, begins_segment, ends_segment, 0);
      // A CTA's half of the columns has slots of its own.
      tile.first_column = cluster_rank() * kColumns;
      if constexpr (kIsCascade) {
        tile.state_row += first_state_row();
      } else {
        const int first_slot = cluster_rank() * 2 * (gridDim.x / 2);
        tile.group.first += first_slot;
        tile.state_row += first_slot * kTileQ;
      }
      if (lane == 0) smem_tiles[stage] = tile;
    };
    find_row();
    if (lane % 16 < min(keys_left() - first_row, kWarpRows) &&
        (!kIsCascade || window_left < 0)) {  // the first keys are on their way into L2
      const char* row = reinterpret_cast<const char*>(found_row());
#pragma unroll 1
      for (int i = 0; i < (lane < 16 ? kColumns : kKpeColumns) * 2; i += 128) prefetch_l2(row + i);
    }
    wait_for_predecessor();
    // Not earlier: the next kernel may rely on all before us having finished once we have.
    launch_dependents();
    bool begins_segment = true;
    int first_seen = 0;  // of a cascade's segment, the first key in anybody's window
    u32 q_parity = 1;
    RingPlace<kStages> place{0, 0};
#pragma unroll 1
    while (true) {
      const u64 row_address = found_row();
      const int num_keys = keys_left() - first_row;  // of the warp's rows on
      const u32 smem_tile = smem_address_of(smem_kv) + place.stage * kTileBytes;
      const bool reads_this_once = kIsCascade ? load.request.qo_len * num_qo_heads <= kTileQ : reads_once;
      const u64 policy = reads_this_once ? evict_first_policy() : evict_normal_policy();
      if constexpr (kIsCascade) {
        if (begins_segment && window_left >= 0) first_seen = problem.template first_seen<kTileQ>(load);
      }
      const auto is_read = [&](int row) {
        return row < num_keys &&
               (!kIsCascade || window_left < 0 || load.token_begin() + first_row + row >= first_seen);
      };
      // Keys past the end read nothing and become zeros: what lies there may be NaN, and 0 * NaN leaks.
#pragma unroll
      for (int i = 0; i < kWarpRows; i += 4) {  // eight lanes a row, 128 bytes at once
        const int row = i + lane / 8;
        const bool exists = is_read(row);
        const T* source =
            reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, row_address, row)) + lane % 8 * 8;
        if (!exists) source = ckv_pages;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          cp_async_16(smem_tile + block * kBlockBytes + block_offset(first_row + row, lane % 8),
                      exists ? source + block * kBlockColumns : source, exists, policy);
        }
      }
#pragma unroll
      for (int i = 0; i < kWarpRows; i += 8) {  // four lanes a row
        const int row = i + lane / 4;
        const T* source = reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, row_address, 16 + row % 16));
        const bool exists = is_read(row);
        if (row < kWarpRows) {
          cp_async_16(smem_tile + kBlocks * kBlockBytes + half_block_offset(first_row + row, lane % 4),
                      exists ? source + lane % 4 * 8 : ckv_pages, exists, policy);
        }
      }
      if (begins_segment) {
        const int first_q_row = load.q_tile * kTileQ;
        const int num_rows = min(load.request.qo_len * num_qo_heads - first_q_row, kTileQ);
        // Rows of a consumer warp that has others are zeros; those of other warps are nobody's. A lane finds a row.
        const int rows_each = ceil_div(num_rows, 16) * 4;
        const int first = (warp - kConsumerWarps) * rows_each;
        const int own_row = first_q_row + min(first + lane, num_rows - 1);
        const int token_in_request = heads.divide(own_row);
        const int head = heads.modulo(own_row, token_in_request);
        const i64 token = problem.row_of(load.request.qo_begin + token_in_request);
        const int rank = cluster_rank();
        const u64 ckv_row = reinterpret_cast<u64>(q_ckv + token * q_ckv_stride_token +
                                                  head * q_ckv_stride_head + rank * kColumns);
        const u64 kpe_row = reinterpret_cast<u64>(q_kpe + token * q_kpe_stride_token +
                                                  head * q_kpe_stride_head + rank * kKpeColumns);
        mbarrier_wait(q_empty, q_parity);
        q_parity ^= 1;
#pragma unroll 1
        for (int i = lane / 8; i < rows_each; i += 4) {
          const int row = first + i;
          const T* source = reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, ckv_row, i)) + lane % 8 * 8;
          const u32 target =
              smem_address_of(smem_q) + row / kRows * kQTileBytes + block_offset(row % kRows, lane % 8);
#pragma unroll
          for (int block = 0; block < kBlocks; ++block) {
            cp_async_16(target + block * kQBlockBytes, source + block * kBlockColumns, row < num_rows);
          }
        }
#pragma unroll 1
        for (int i = lane / 4; i < ceil_div(rows_each, 8) * 8; i += 8) {
          const int row = first + i;
          const T* source = reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, kpe_row, i));
          if (i < rows_each) {
            cp_async_16(smem_address_of(smem_q) + row / kRows * kQTileBytes + kBlocks * kQBlockBytes +
                            half_block_offset(row % kRows, lane % 4),
                        source + lane % 4 * 8, row < num_rows);
          }
        }
      }
      tell(place.stage, begins_segment);  // while the copies are under way
      mbarrier_arrive_after_copies(full_at(place.stage));
      if (warp == kConsumerWarps && lane == 0) mbarrier_arrive(full_at(place.stage));  // what has been told
      begins_segment = load.ends_segment(problem);
      load.advance(problem);
      if (load.done()) break;
      find_row();
      place = place.plus(1);
      mbarrier_wait(empty_at(place.stage), place.parity ^ 1);
    }
    cp_async_wait<0>();
    cluster_arrive();
    cluster_wait();
    return;
  } else {
    // --- Consumers ---
    take_registers<216>();
    const int lane = lane_id();
    wait_for_predecessor();
    if (warp == 0 && lane == 0) ctas().start();
    const int group = warp / 4;                                     // warpgroup
    const int warp_row = (kRowGroups == 2 ? warp : warp % 4) * 16;  // the warp's first row
    // A capped logit is cap * tanh(s * sm_scale / cap); both kinds are scaled to base 2.
    const float logit_scale =
        sm_scale * (logits_soft_cap > 0.0f ? reciprocal_approx(logits_soft_cap) : kLog2E);
    const float soft_cap_log2 = logits_soft_cap * kLog2E;

    const u64 q_operand = swizzled_operand(smem_address_of(smem_q) + warp_row / kRows * kQTileBytes, 0);
    const u64 q_half_operand = half_swizzled_operand(smem_address_of(smem_q) +
                                                     warp_row / kRows * kQTileBytes + kBlocks * kQBlockBytes);
    // S = Q K^T over this CTA's columns, from here on.
    const auto multiply_keys = [&](float (&s)[kLogits], int stage) {
      const u32 smem_tile = smem_address_of(smem_kv) + stage * kTileBytes;
      const u64 k_operand = swizzled_operand(smem_tile, 0);
      const u64 k_half_operand = half_swizzled_operand(smem_tile + kBlocks * kBlockBytes);
      fence_async_proxy();
      wgmma_fence();
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          wgmma_ss<T>(s, advance(q_operand, block * kQBlockBytes + step * 32),
                      advance(k_operand, block * kBlockBytes + step * 32), block + step > 0);
        }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        wgmma_ss<T>(s, advance(q_half_operand, step * 32), advance(k_half_operand, step * 32), true);
      }
      wgmma_commit();
    };
    // The same for all threads, and the compiler knows.
    const auto note_of = [&](int stage) { return TileNote(__shfl_sync(0xffffffffu, smem_notes[stage], 0)); };
    // Else a warp takes part in products alone.
    const auto has_rows = [&](TileNote note) { return warp_row < note.num_rows(); };

    // The warp and the same warp of the other CTA exchange what they have of S.
    float4* own_logits = reinterpret_cast<float4*>(smem_logits + warp * kLogitsBytes) + lane;
    u32 parity = 0;  // of what is received
    if (lane == 0) mbarrier_expect(logits_full_at(warp), kLogitsBytes);
    const auto send = [&](const float (&s)[kLogits]) {
      mbarrier_wait(logits_empty_at(warp), parity ^ 1);
      const u32 other = cluster_rank() ^ 1;
      const u32 barrier = address_in_cluster(logits_full_at(warp), other);
      const u32 others_logits = address_in_cluster(smem_address_of(own_logits), other);
#pragma unroll
      for (int i = 0; i < kLogits / 4; ++i) {
        store_async(others_logits + i * 512, s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3], barrier);
      }
    };
    const auto receive = [&](float (&sum)[kLogits], const float (&s)[kLogits]) {
      mbarrier_wait(logits_full_at(warp), parity);
      parity ^= 1;
#pragma unroll
      for (int i = 0; i < kLogits / 4; ++i) {
        const float4 x = own_logits[i * 32];
        sum[4 * i] = s[4 * i] + x.x, sum[4 * i + 1] = s[4 * i + 1] + x.y;
        sum[4 * i + 2] = s[4 * i + 2] + x.z, sum[4 * i + 3] = s[4 * i + 3] + x.w;
      }
    };
    // After receive and a fence of every lane. Without it reads may be under way still when what comes next is written:
    // the other CTA's warp waits for nothing else.
    const auto free_logits = [&]() {
      __syncwarp();
      if (lane == 0) {
        mbarrier_expect(logits_full_at(warp), kLogitsBytes);
        mbarrier_arrive_in_cluster(address_in_cluster(logits_empty_at(warp), cluster_rank() ^ 1));
      }
    };
    // The warpgroup's last product with a segment's queries lets them go; where the other one has none with them, twice.
    const auto release_queries = [&](TileNote note) {
      if (note.segment_left() > kTileStep || lane != 0) return;
      mbarrier_arrive(q_empty);
      if (kRowGroups == 1 && note.segment_left() == 1 && note.begins_segment()) mbarrier_arrive(q_empty);
    };

    float acc[kColumns / 2] = {};  // [kColumns / 8][4]
    float s[kLogits];              // this CTA's part of a tile's S
    SoftmaxState state[2];  // rows quad_row and quad_row + 8 of the warp; `sum` over this lane's keys only
    RingPlace<kStages> place{kRowGroups == 2 ? 0 : group, 0};
    bool has_tile = __shfl_sync(0xffffffffu, load.unit_end - load.unit, 0) > place.stage;
    TileNote note(0);
    if (has_tile) {
      mbarrier_wait(full_at(place.stage), place.parity);
      note = note_of(place.stage);
      multiply_keys(s, place.stage);
      wgmma_wait<0>();
      release_queries(note);
      if (has_rows(note)) send(s);
    }
    // O += P V of the warpgroup's last tile may be under way, and its place not free.
    bool holds_last = false;
#pragma unroll 1
    while (has_tile) {
      const RingPlace<kStages> next = place.plus(kTileStep);
      const bool has_next = note.run_left() > kTileStep;
      if (!has_next && warp == 0 && lane == 0) smem_run_end.ask(ctas());
      float logits[kLogits] = {};
      if (has_rows(note)) receive(logits, s);

      // Without a next tile, of this one again, for nothing: ptxas serializes products that not every path has.
      if (has_next) mbarrier_wait(full_at(next.stage), next.parity);
      const TileNote next_note = note_of(has_next ? next.stage : place.stage);
      multiply_keys(s, has_next ? next.stage : place.stage);

      float logit_max[2];
      bool raises = false;
      if (has_rows(note)) {
        free_logits();  // multiply_keys begins with a fence
        // To base-2 logits, with what a row must not see at -inf. Most tiles are seen whole by every row.
#pragma unroll
        for (int i = 0; i < kLogits; ++i) logits[i] *= logit_scale;
        if (logits_soft_cap > 0.0f) {
#pragma unroll
          for (int i = 0; i < kLogits; ++i) logits[i] = soft_cap_log2 * tanh_accurate(logits[i]);
        }
        if (!note.all_seen()) {
          const TileInfo& tile = smem_tiles[place.stage];
          const int total_rows = tile.qo_len * num_qo_heads;
          const int first_row = tile.q_tile * kTileQ;
          const auto last_key_of = [&](int row) { return tile.kv_len - tile.qo_len + heads.divide(row); };
          const int quad_row = lane_id() / 4;
          const int quad_col = lane_id() % 4 * 2;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row_in_tile = warp_row + half * 8 + quad_row;
            int last;  // or where the row stands
            if constexpr (kIsCascade) {
              // Beyond kTileQ are rows of zeros.
              last = smem_tile_positions[place.stage * kTileQ + min(row_in_tile, kTileQ - 1)];
            } else {
              last = last_key_of(min(first_row + row_in_tile, total_rows - 1));
            }
            const auto is_hidden = [&](int token) {
              if constexpr (kIsCascade) return problem.is_hidden(token, last, tile.kv_len);
              return token > last || (window_left >= 0 && token < last - window_left);
            };
#pragma unroll
            for (int n = 0; n < kTileKV / 8; ++n)
#pragma unroll
              for (int column = 0; column < 2; ++column) {
                const int token = tile.token_begin + n * 8 + quad_col + column;
                if (is_hidden(token)) {
                  logits[n * 4 + half * 2 + column] = neg_infinity();
                }
              }
          }
        }

        // Online softmax. The four lanes of a quad have a row. Weights up to 2^8 are as exact as those up to 1, so the
        // maximum is left alone until a logit is so far above it.
        constexpr float kSlack = 8.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          logit_max[half] = neg_infinity();
#pragma unroll
          for (int n = 0; n < kTileKV / 8; ++n) {
            logit_max[half] =
                fmaxf(logit_max[half], fmaxf(logits[n * 4 + half * 2], logits[n * 4 + half * 2 + 1]));
          }
        }
        raises = __any_sync(0xffffffffu,
                            logit_max[0] > state[0].max + kSlack || logit_max[1] > state[1].max + kSlack);
      }
      // By now the next tile's S is there, which is under way to the other CTA during the rest, and O += P V of the tile
      // before.
      wgmma_wait<0>();
      if (kOverlaps) {
        if (holds_last && lane == 0) mbarrier_arrive(empty_at(place.plus(kStages - kTileStep).stage));
        holds_last = true;
      }
      if (has_next) {
        release_queries(next_note);
        if (has_rows(next_note)) send(s);
      }
      u32 p[kTileKV / 16][4] = {};  // the A operand of each 16 keys
      if (raises) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = logit_max[half];
          x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
          x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
          const float factor = state[half].raise(x);
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n)
            acc[n * 4 + half * 2] *= factor, acc[n * 4 + half * 2 + 1] *= factor;
        }
      }
      if (has_rows(note)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int n = 0; n < kTileKV / 8; ++n) {
            const float x = state[half].weight(logits[n * 4 + half * 2]);
            const float y = state[half].weight(logits[n * 4 + half * 2 + 1]);
            state[half].sum += x + y;
            p[n / 2][n % 2 * 2 + half] = pack2<T>(x, y);
          }
        }
      }
      // O += P V
      const u64 v_operand =
          swizzled_operand(smem_address_of(smem_kv) + place.stage * kTileBytes, kBlockBytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kTileKV / 16; ++step) {
        wgmma_rs<T>(acc, p[step], advance(v_operand, step * 16 * kBlockRowBytes));
      }
      wgmma_commit();
      if (!kOverlaps) wgmma_wait<0>();

      const int segment_left = note.segment_left();
      if (segment_left <= kTileStep) {
        wgmma_wait<0>();
        // --- The warpgroup's part of the segment ends. Its state is the result or the run's partial state. ---
        const bool is_shared = kRowGroups == 1 && !(segment_left == 1 && note.begins_segment());
        const RingPlace<kStages> last_place = segment_left == 1 ? place : place.plus(1);
        const int last_stage = last_place.stage;
        if (is_shared) mbarrier_wait(full_at(last_stage), last_place.parity);  // what is told of it is there
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          state[half].sum += __shfl_xor_sync(0xffffffffu, state[half].sum, 1);
          state[half].sum += __shfl_xor_sync(0xffffffffu, state[half].sum, 2);
        }
        const TileInfo& last = smem_tiles[last_stage];
        const int num_rows = last.num_rows<kTileQ>(heads);
        const bool is_complete = last.group.num_partials == 1;
        const int lane = lane_id();  // anew, or what follows from it would be kept all the time
        const int quad_row = lane / 4;
        const int quad_col = lane % 4 * 2;
        const auto output = results();
        const auto partials = slots();
        const auto result_at = [&](int row) {
          if constexpr (kIsCascade) {
            return result_row(problem, output, last, row, 0);
          } else {
            return output.row_at(last, row, 0);
          }
        };
        if constexpr (kRowGroups == 2) {
          // A quad has pairs of columns: through shared memory, half a warp writes 64 next to each other.
          float* staging = reinterpret_cast<float*>(smem_staging + warp * kStagingBytes);
          if (warp_row < num_rows) {
            const int own_row = min(warp_row + lane % 16, num_rows - 1);  // a lane finds a row
            const u64 own_target = is_complete
                                       ? reinterpret_cast<u64>(result_at(own_row).out)
                                       : reinterpret_cast<u64>(partials.row_at(last.state_row + own_row));
            const int column_bytes = is_complete ? sizeof(T) : sizeof(float);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float inverse = state[half].inverse_sum();
              u64 targets[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                targets[i] = __shfl_sync(0xffffffffu, own_target, half * 8 + i * 2 + lane / 16) +
                             lane % 16 * 4 * column_bytes;
              }
#pragma unroll
              for (int column = 0; column < kColumns; column += 64) {
                __syncwarp();
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                  const int i = (column / 8 + n) * 4 + half * 2;
                  *reinterpret_cast<float2*>(staging + quad_row * kStagingRow + n * 8 + quad_col) =
                      make_float2(acc[i] * inverse, acc[i + 1] * inverse);
                }
                __syncwarp();
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  if (warp_row + half * 8 + i * 2 + lane / 16 >= num_rows) continue;
                  const float4 x = *reinterpret_cast<const float4*>(
                      staging + (i * 2 + lane / 16) * kStagingRow + lane % 16 * 4);
                  if (is_complete) {
                    store4(reinterpret_cast<T*>(targets[i]) + column, x);
                  } else {
                    partials.write4(reinterpret_cast<float*>(targets[i]) + column, x);
                  }
                }
              }
              const int row = warp_row + half * 8 + quad_row;
              if (is_complete && quad_col == 0 && row < num_rows) {
                result_at(row).write_lse(state[half].lse_log2());
              }
            }
            if (!is_complete) {
              __syncwarp();
              fence_acq_rel();  // flags after what they stand for
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const int row = warp_row + half * 8 + quad_row;
                for (int dim = quad_col / 2 * partials.kLineDims; dim < kColumns && row < num_rows;
                     dim += 4 * partials.kLineDims) {
                  partials.write_flag(last.state_row + row, dim, state[half].lse_log2());
                }
              }
            }
          }
        } else {
          // Through the place of the segment's last tile, and where the other warpgroup has the segment's other tiles,
          // of its last one too: then both write, else this one alone.
          const auto sync = [&]() {
            if (is_shared) {
              sync_threads<kConsumers>();
            } else {
              sync_warpgroup(group);
            }
          };
          const auto place_of = [&](int stage) {
            return reinterpret_cast<float*>(smem_kv + stage * kTileBytes);
          };
          float* own = place_of(place.stage);
          const float* others = place_of(segment_left == 1 ? place.plus(kStages - 1).stage : last_stage);
          const auto stats_of = [&](const float* memory, int row) {  // what a row's SoftmaxState is
            return reinterpret_cast<const float2*>(memory + kTileQ * kPassRow)[row];
          };
          const float* first = is_shared && group == 1 ? others : own;
          const float* second = group == 1 ? own : others;
          sync_warpgroup(group);  // all four warps are done with the tile
          if (warp_row < num_rows && quad_col == 0) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              reinterpret_cast<float2*>(own + kTileQ * kPassRow)[warp_row + half * 8 + quad_row] =
                  make_float2(state[half].max, state[half].sum);
            }
          }
          // As many threads have a row, whose place and weights they find once.
          const int thread = is_shared ? warp * 32 + lane : warp % 4 * 32 + lane;
          const int row_threads = (is_shared ? kConsumers : kConsumers / 2) / kTileQ;
          const int row = is_shared ? thread / (kConsumers / kTileQ) : thread / (kConsumers / 2 / kTileQ);
          const int row_thread = thread - row * row_threads;
          float first_weight = 0.0f;
          float second_weight = 0.0f;
          float lse_log2 = 0.0f;
          u64 target = 0;
#pragma unroll
          for (int column = 0; column < kColumns; column += kPassColumns) {
            if (column > 0) sync();  // the columns before have been read
            if (warp_row < num_rows) {
#pragma unroll
              for (int n = 0; n < kPassColumns / 8; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                  const int i = (column / 8 + n) * 4 + half * 2;
                  *reinterpret_cast<float2*>(own + (warp_row + half * 8 + quad_row) * kPassRow + n * 8 +
                                             quad_col) = make_float2(acc[i], acc[i + 1]);
                }
            }
            sync();
            if (row >= num_rows) continue;
            if (column == 0) {
              const float2 x = stats_of(first, row);
              SoftmaxState merged;
              merged.max = x.x;
              merged.sum = x.y;
              first_weight = 1.0f;
              if (is_shared) {
                const float2 y = stats_of(second, row);
                first_weight = merged.raise(y.x);
                second_weight = merged.weight(y.x);
                merged.sum += second_weight * y.y;
              }
              first_weight *= merged.inverse_sum();
              second_weight *= merged.inverse_sum();
              lse_log2 = merged.lse_log2();
              if (is_complete) {
                const auto result = result_at(row);
                target = reinterpret_cast<u64>(result.out);
                if (row_thread == 0) result.write_lse(lse_log2);
              } else {
                target = reinterpret_cast<u64>(partials.row_at(last.state_row + row));
              }
            }
#pragma unroll 2
            for (int in_row = row_thread * 4; in_row < kPassColumns; in_row += row_threads * 4) {
              float4 x = *reinterpret_cast<const float4*>(first + row * kPassRow + in_row);
              x.x *= first_weight, x.y *= first_weight, x.z *= first_weight, x.w *= first_weight;
              if (is_shared) {
                const float4 y = *reinterpret_cast<const float4*>(second + row * kPassRow + in_row);
                x.x += second_weight * y.x, x.y += second_weight * y.y;
                x.z += second_weight * y.z, x.w += second_weight * y.w;
              }
              if (is_complete) {
                store4(reinterpret_cast<T*>(target) + column + in_row, x);
              } else {
                partials.write4(reinterpret_cast<float*>(target) + column + in_row, x);
                if (partials.kHasWordFlags && row_thread % 4 == 0) {
                  partials.write_flag(last.state_row + row, column + in_row, lse_log2);
                }
              }
            }
          }
          sync();
          if constexpr (!partials.kHasWordFlags) {
            if (!is_complete) {
              fence_acq_rel();  // flags after what they stand for, of all threads
              for (int line = row_thread; line < partials.kRowLines && row < num_rows; line += row_threads) {
                partials.write_flag(last.state_row + row, line * partials.kLineDims, lse_log2);
              }
              sync();
            }
          }
        }
        if (!kIsCascade && !is_complete && segment_left == 1 && lane == 0 &&
            warp == (kRowGroups == 1 ? group * 4 : 0)) {
          smem_run_end.add(last);
        }
        state[0] = state[1] = SoftmaxState();
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0.0f;
        __syncwarp();
        if (kOverlaps && lane == 0) mbarrier_arrive(empty_at(place.stage));
        holds_last = false;
      }
      if (!kOverlaps && lane == 0) mbarrier_arrive(empty_at(place.stage));
      place = next;
      note = next_note;
      has_tile = has_next;
    }
    wgmma_wait<0>();  // there is nothing: for ptxas
  }
  cluster_arrive();
  if constexpr (kIsCascade) {
    if (tid == 0) {
      smem_run_end.add_lines(problem.num_rows() * Slots::kRowLines, smem_partition, cluster_rank() * kColumns,
                             first_state_row());
    }
  }
  merge_apart<kConsumers, kTileKV>(smem_run_end, make_problem(), smem_partition, ctas(), slots(), results(),
                                   reinterpret_cast<float*>(smem_q));
  cluster_wait();
}

#endif

}  // namespace cupyattn
