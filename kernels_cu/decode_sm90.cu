// Decode attention for the levels of a cascade whose groups have many query rows, on sm_90a: decode.cu in tiles of 128.
//
// A tile of 128 query rows x 64 keys is two warpgroups', 64 rows each, which read the same keys (wgmma.cuh):
//   S = Q K^T         [rows, keys]   from shared memory; accumulators become the A operand of the next product
//   O += P V          [rows, head_dim]
// Four more warps copy, up to kStages tiles ahead: whole tiles in boxes (tma.cuh), if pages are of a multiple of eight
// tokens, others row by row. A stage is *full* when its keys and values have landed, and *empty* when both warpgroups are done with it. These
// take turns at starting products: while one has its softmax, the tensor cores have the other's S, and its own O of the
// tile before. A segment of up to 64 rows is one warpgroup's, and the other goes on to the next: what is long about
// requests' own keys, a tile or two, is to end one segment and to begin another.
//
// The warps that copy have nothing left to do when the last tiles are on their way. So they find where the states of this
// CTA's rows will be, and list that: merging (cascade.cuh) is a long way through code that runs once, of which little is
// left then for those whose state all wait for. They merge a third of the rows, and each warpgroup another.
//
// What a run is, where states go and how results are made of them: as in decode.cu.

#include "cupyattn/barrier.cuh"
#include "cupyattn/cascade.cuh"
#include "cupyattn/cp_async.cuh"
#include "cupyattn/divide.cuh"
#include "cupyattn/launch.cuh"
#include "cupyattn/paged.cuh"
#include "cupyattn/partials.cuh"
#include "cupyattn/run.cuh"
#include "cupyattn/schedule.cuh"
#include "cupyattn/softmax.cuh"
#include "cupyattn/state.cuh"
#include "cupyattn/tile.cuh"
#include "cupyattn/tma.cuh"
#include "cupyattn/wgmma.cuh"

namespace cupyattn {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a segment is, from the warp that starts its copy to those that use it.
struct Segment {
  TileInfo last;  // its last tile
  int num_tiles;
  int num_rows;  // of the query tile, that exist
  int ends_run;
};

// What one of the CTA's teams, of 128 threads in a row, merges of the result.
template <int kTileKV, typename T, int kHeadDim, int kTileQ>
using TeamMerge = RowMerge<128, kTileKV, true, T, kHeadDim, kTileQ, true>;

// What they must know, in shared memory: a stack is read from further away.
template <typename T, int kHeadDim, int kTileQ>
struct MergeInputs {
  CascadeProblem problem;
  Partition partition;
  Partials<kHeadDim, kTileQ, true> partials;
  Output<T, kTileQ> output;
};

// A call, which nothing in registers outlives: inlined, it would leave the loop before it too few of them.
template <int kTileKV, typename T, int kHeadDim, int kTileQ>
__device__ __noinline__ void merge_apart(const MergeInputs<T, kHeadDim, kTileQ>& smem_inputs, int first_line,
                                         int end_line, float* scratch, bool are_found) {
  const MergeInputs<T, kHeadDim, kTileQ> inputs = smem_inputs;  // in registers
  const int number = threadIdx.x / 128;
  const Team<128> team{static_cast<int>(threadIdx.x) - number * 128, 0, 1 + number};
  const TeamMerge<kTileKV, T, kHeadDim, kTileQ> rows{
      inputs.problem, inputs.partition, inputs.partials, inputs.output, first_line, end_line, scratch};
  rows.merge(team, are_found);
}

// The same of states that are listed.
template <typename Slots, typename T>
__device__ __noinline__ void merge_listed(Slots partials, const typename ListedStates<Slots, T>::Row* rows,
                                          const int* list, int first_row, int first_line, int end_line) {
  const int number = threadIdx.x / 128;
  const Team<128> team{static_cast<int>(threadIdx.x) - number * 128, 0, 1 + number};
  const ListedStates<Slots, T> states{rows, list, first_row, row_parts(4, end_line - first_line)};
  merge_lines<8>(team, partials, states, false, first_line, end_line, nullptr, [&](int row, int dim) {
    const auto& target = rows[row - first_row];
    using Row = typename Output<T, 1>::Row;
    return Row{target.out + dim, dim == 0 ? target.lse : nullptr};
  });
}

// clang-format off
template <typename T, int kHeadDim, typename Cascade>
__global__ void __launch_bounds__(384, 1)
    decode_sm90_kernel(const T* __restrict__ q,              // as decode.cu
                       const T* __restrict__ k_pages,
                       const T* __restrict__ v_pages,
                       const int* qo_indptr,
                       const int* kv_indptr,
                       const int* kv_indices,
                       const int* kv_lens,
                       T* __restrict__ out,
                       float* __restrict__ lse,
                       half_t* partial_out,
                       u64* partial_flags,
                       Departures<TileInfo>::Memory* departures,
                       i64 q_stride_token, i64 q_stride_head,
                       i64 k_stride_page, i64 k_stride_token, i64 k_stride_head,
                       i64 v_stride_page, i64 v_stride_token, i64 v_stride_head,
                       i64 out_stride_token, i64 out_stride_head,
                       i64 lse_stride_token, i64 lse_stride_head,
                       int batch_size,
                       int num_kv_heads,
                       int part_shift,                       // 0
                       int group_size, u32 group_multiplier, int group_shift,
                       int page_size, u32 page_multiplier, int page_shift,
                       int num_pages,
                       int table_row_stride,
                       int num_table_entries,
                       int split_shift,                      // fixed splits are decode.cu's
                       int max_splits,
                       int reads_early,
                       int window_left,
                       float sm_scale,
                       float logits_soft_cap,
                       const __grid_constant__ KeyMaps key_maps,  // (column, token of the page, KV head, page); boxes of up to 32 tokens
                       const __grid_constant__ Cascade cascade) {
  // clang-format on
  constexpr int kRows = 64;  // of a warpgroup
  constexpr int kTileQ = 2 * kRows;
  constexpr int kTileKV = 64;
  constexpr int kStages = 4;
  constexpr int kQueryBuffers = 2;
  constexpr int kSegments = 3;  // that are told of: two being worked on, and the next
  constexpr int kThreads = 384;
  constexpr int kRowThreads = 256;  // of both warpgroups
  constexpr int kCopyThreads = kThreads - kRowThreads;
  constexpr int kBlocks = kHeadDim / kBlockColumns;
  constexpr int kLogits = kTileKV / 2;  // of a tile, a thread's
  constexpr int kSteps = kTileKV / 16;  // of P V
  constexpr int kTeamRows = 31;         // of each team, up to which their states are found and listed before
  constexpr int kTeamStates = 256;      // RowStates::Found that a team has room for
  constexpr int kMostListed = 1024;     // states of all their rows
  using Layout = BlockLayout<kHeadDim, kTileKV>;
  using QueryLayout = BlockLayout<kHeadDim, kTileQ>;
  constexpr int kTileBytes = kTileKV * Layout::kRowBytes;
  constexpr int kQueryBytes = kTileQ * QueryLayout::kRowBytes;
  static_assert(kHeadDim % kBlockColumns == 0);

  const Divisor group{group_size, group_multiplier, group_shift};
  const Divisor page{page_size, page_multiplier, page_shift};
  extern __shared__ __align__(1024) unsigned char smem_kv[];   // [kStages][K, V] tiles
  unsigned char* smem_q = smem_kv + kStages * 2 * kTileBytes;  // [kQueryBuffers] tiles, of segments in turn
  unsigned char* smem_zeros = smem_q + kQueryBuffers * kQueryBytes;        // eight rows of 64 columns
  float* smem_states = reinterpret_cast<float*>(smem_zeros + kEightRows);  // of three teams
  auto problem = problem_of(
      departures, smem_kv, nullptr, 0, PageTable{kv_indptr, kv_indices, table_row_stride}, num_table_entries,
      qo_indptr, kv_lens, batch_size, num_kv_heads, group, window_left, split_shift, max_splits, cascade);
  const PageStrides k_strides{k_stride_page, k_stride_token, k_stride_head};
  const PageStrides v_strides{v_stride_page, v_stride_token, v_stride_head};
  using Slots = Partials<kHeadDim, kTileQ, true>;
  using Listed = ListedStates<Slots, T>;
  auto* smem_rows = reinterpret_cast<typename Listed::Row*>(smem_states + 3 * 2 * kTeamStates);
  int* smem_list =
      reinterpret_cast<int*>(smem_rows + 3 * kTeamRows + 1);  // 16-byte aligned, as what follows it
  static_assert(sizeof(typename Listed::Row) == 24 && 3 * kTeamRows == 93 && kMostListed == 1024,
                "DecodeSm90Config.shared_bytes");
  const auto slots = [&]() { return Slots{partial_out, partial_flags}; };
  const auto results = [&]() {
    return Output<T, kTileQ>{out,  lse, out_stride_token, out_stride_head, lse_stride_token, lse_stride_head,
                             group};
  };

  __shared__ Segment smem_segments[kSegments];
  __shared__ RunEnd smem_run_end;
  __shared__ bool smem_all_there;
  __shared__ int smem_num_listed;      // or more than there is room for
  __shared__ int smem_first_row;       // that is listed
  __shared__ int smem_first_lines[4];  // of each team, and the end
  __shared__ Levels smem_levels;
  using Inputs = MergeInputs<T, kHeadDim, kTileQ>;
  __shared__ alignas(16) unsigned char smem_inputs[sizeof(Inputs)];
  const Inputs& inputs = *reinterpret_cast<const Inputs*>(smem_inputs);
  __shared__ Positions<kTileQ, kSegments> smem_positions;
  __shared__ __align__(8) u64 smem_barriers[2 * kStages + 2 * kQueryBuffers + 1];
  const u32 barriers = smem_address_of(smem_barriers);
  const auto full_at = [&](int stage) { return barriers + stage * 8; };
  const auto empty_at = [&](int stage) { return barriers + (kStages + stage) * 8; };
  const auto segment_full_at = [&](int buffer) { return barriers + (2 * kStages + buffer) * 8; };
  const auto segment_empty_at = [&](int buffer) { return segment_full_at(kQueryBuffers + buffer); };
  const u32 is_decided = segment_empty_at(kQueryBuffers);  // smem_all_there, and where states are

  const int tid = threadIdx.x;
  const int warp = uniform(tid / 32);

  // As in decode.cu.
  problem.template prefetch<kThreads>();
  touch(q_stride_token);
  touch(v_stride_page);
  touch(lse_stride_head);
  touch(logits_soft_cap);
  if (tid == kRowThreads && key_maps.box_rows > 0)
    prefetch_map(key_maps.first), prefetch_map(key_maps.second);
  if (tid == 0) {
    smem_num_listed = 0;
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full_at(stage), kCopyThreads);
      mbarrier_init(empty_at(stage), kRowThreads);
    }
    for (int buffer = 0; buffer < kQueryBuffers; ++buffer) {
      mbarrier_init(segment_full_at(buffer), 32);
      mbarrier_init(segment_empty_at(buffer), kRowThreads);
    }
    mbarrier_init(is_decided, kCopyThreads);
    fence_mbarrier_init();
  }
  Cursor<kTileKV, kTileQ, false> load;
  Partition partition;
  // Of a warp that copies: 32 rows of keys or of values. Each lane finds one, a tile before the copy, or a segment before it
  // if it is of a segment's first tile.
  const int copy_warp = warp - kRowThreads / 32;
  const bool finds_v = copy_warp / 2 == 1;
  const int own_row = copy_warp % 2 * 32 + tid % 32;  // of the tile
  const PageStrides strides = finds_v ? v_strides : k_strides;
  const T* const pages_begin = finds_v ? v_pages : k_pages;
  FoundRow found;
  const auto keys_left = [&]() { return load.request.kv_len - load.token_begin(); };
  // Starts the read of the page table, for the tile at `token_begin` of a cursor's request.
  const auto find_row = [&](FoundRow& row, const auto& cursor, int token_begin) {
    if (token_begin + own_row >= cursor.request.kv_len) return;
    row.page = static_cast<int>(load_early(row.find(page, cursor.pages, token_begin + own_row)));
  };
  const auto found_row = [&]() {  // waits for it
    return pages_begin + strides.offset(found.page, found.token, load.kv_head);
  };
  const auto prefetch_row = [&](const T* row) {
#pragma unroll
    for (int i = 0; i < kHeadDim * 2; i += 128) prefetch_l2(reinterpret_cast<const char*>(row) + i);
  };
  const auto ask_for_keys = [&]() {
    if (copy_warp < 0 || own_row >= keys_left()) return;
    // Before a window may be any pages. What another query tile's CTA asks for is not asked for twice.
    const bool asks = load.q_tile == 0 && window_left < 0;
    found.guess(problem, load, page, num_pages, own_row, partition.quota > 4 ? 2 : 1, [&]() {
      if (asks) prefetch_row(found_row());
    });
  };
  const auto look_again = [&]() { found.look_again(); };
  const Beginning beginning = guess_run<kThreads, kLaunchesEarly, false>(
      problem, reads_early, load, partition, ask_for_keys, look_again, false, blockIdx.x, gridDim.x);
  if (beginning == kNoRun) {
    wait_for_predecessor();  // or this kernel could be done before the one that its successor relies on
    return;
  }
  const bool is_found = found.entry != nullptr && beginning == kGuessed;  // look_again has begun to read
  partition.number_ctas();
  const bool has_room = 2 * partition.num_ctas <= num_sms();
  const bool is_short = partition.quota < kStages;

  // Queries of the segment at hand, by `num_warps` warps, of which this is number `number`. Rows that do not exist are zeros,
  // up to the last of a warp's 16: all of these have a say in when maxima are raised.
  const auto copy_queries = [&](int buffer, int number, auto num_warps) {
    constexpr int kWarpRows = kTileQ / num_warps.value;
    const int lane = tid % 32;
    const int first_row = load.q_tile * kTileQ + number * kWarpRows;
    const int num_rows = min(load.request.qo_len * group_size - first_row, kWarpRows);
    u64 own_row = 0;  // a lane finds one, as where it lies may have to be read from memory
    if (lane < num_rows) {
      const int token = group.divide(first_row + lane);
      const int head = load.kv_head * group_size + group.modulo(first_row + lane, token);
      own_row = reinterpret_cast<u64>(q + problem.row_of(load.request.qo_begin + token) * q_stride_token +
                                      head * q_stride_head);
    }
    const u32 target = smem_address_of(smem_q) + buffer * kQueryBytes;
#pragma unroll 1
    for (int i = lane / 8; i - lane / 8 < ceil_div(num_rows, 16) * 16;
         i += 4) {  // eight lanes a row, 128 bytes at once
      const u64 row = __shfl_sync(0xffffffffu, own_row, i);
      const T* source = row != 0 ? reinterpret_cast<const T*>(row) + lane % 8 * 8 : q;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        cp_async_16(
            target + block * QueryLayout::kBlockBytes + block_offset(number * kWarpRows + i, lane % 8),
            row != 0 ? source + block * kBlockColumns : q, row != 0);
      }
    }
  };

  // The last tile of the segment that begins at `load`.
  const auto last_of_segment = [&]() {
    auto last = load;
    const int num_tiles = min(load.request.num_tiles() - load.tile, load.unit_end - load.unit);
    last.tile += num_tiles - 1;
    last.unit += num_tiles - 1;
    return last;
  };
  // What the segment is, by one warp.
  const auto tell_segment = [&](int place) {
    smem_positions.write(problem, load, place);
    if (lane_id() == 0) {
      const auto last = last_of_segment();
      Segment& segment = smem_segments[place];
      segment.num_tiles = last.tile + 1 - load.tile;
      segment.num_rows = min(load.request.qo_len * group_size - load.q_tile * kTileQ, kTileQ);
      segment.ends_run = last.ends_run(problem);
      segment.last = TileInfo::of<Slots::kRowLines>(last, problem, partition, true, true, 0);
    }
  };
  // Lines of the result that this CTA merges, a third each of its three teams: both warpgroups, and the warps that copy. These
  // find and list where all their states are, unless there is no room for that.
  const auto first_line_of = [&](const TileInfo& share, int team) {
    const int each = static_cast<u32>(share.end_line - share.first_line + 2) / 3;
    return min(share.first_line + team * each, share.end_line);
  };
  const auto share_of = [&](const Partition& partition) {
    return RunEnd::share_of_lines(problem.num_rows() * Slots::kRowLines, partition);
  };
  const auto finds_early = [&](const TileInfo& share) {
    const int num_rows = (share.end_line - share.first_line) / Slots::kRowLines + 2;
    return num_rows <= 3 * kTeamRows && num_rows * problem.levels.num_levels <= 3 * kTeamStates;
  };
  const auto merge_lines_of = [&](int team) {
    if (__builtin_expect(smem_num_listed <= kMostListed, 1)) {
      const int first = smem_first_lines[team];
      const int end = smem_first_lines[team + 1];
      if (first < end) merge_listed<Slots, T>(slots(), smem_rows, smem_list, smem_first_row, first, end);
      return;
    }
    const TileInfo share = share_of(inputs.partition);
    const int first = first_line_of(share, team);
    const int end = first_line_of(share, team + 1);
    if (first >= end) return;
    const bool are_found = finds_early(share);
    const int rows_before = first / Slots::kRowLines - share.first_line / Slots::kRowLines;
    const int place = are_found ? rows_before * problem.levels.num_levels : team * kTeamStates;
    merge_apart<kTileKV>(inputs, first, end, smem_states + 2 * place, are_found);
  };

  const auto ctas = [&](const Partition& partition) {
    return Departures<TileInfo>{departures, static_cast<u32>(partition.num_ctas)};
  };

  if (copy_warp >= 0) {
    // --- Copies ---
    if (!is_found) {
      find_row(found, load, load.token_begin());
      if (own_row < keys_left() && window_left < 0) prefetch_row(found_row());
    }
    wait_for_predecessor();
    const int lane = tid % 32;
    int segment = 0;
    int first_seen = 0;  // the first key in anybody's window
    bool begins_segment = true;
    // The next segment, and where its first tile's row lies: found where this one begins. After its last tile's copies, what
    // is read from memory would wait behind them.
    auto next = load;
    FoundRow next_found;
    int last_tile = 0;
#pragma unroll 1
    for (u32 t = 0;; ++t) {
      const int stage = t % kStages;
      if (begins_segment) {
        if (window_left >= 0) first_seen = problem.template first_seen<kTileQ>(load);
        last_tile = last_of_segment().tile;
      }
      const int num_keys = keys_left();
      const int num_hidden = first_seen - load.token_begin();
      const bool ends_segment = load.tile == last_tile;
      // Whole tiles of whole boxes: a lane copies one, of this warp's rows.
      const int box_rows = key_maps.box_rows;
      const bool in_boxes = uniform(box_rows > 0 && num_keys >= kTileKV && num_hidden <= 0 &&
                                    (load.token_begin() & box_rows - 1) == 0);
      const int box = lane / kBlocks;
      const int box_page = __shfl_sync(0xffffffffu, found.page, box * box_rows);
      const int box_token = __shfl_sync(0xffffffffu, found.token, box * box_rows);
      u64 address = 0;
      if (!in_boxes) address = reinterpret_cast<u64>(found_row());
      if (!ends_segment)
        find_row(found, load, load.token_begin() + kTileKV);  // before the copies, behind which it would wait
      // What other query tiles read too is to stay in L2 for a while.
      const u64 policy =
          load.request.qo_len * group_size > kTileQ ? evict_normal_policy() : evict_first_policy();
      mbarrier_wait(empty_at(stage), t / kStages & 1 ^ 1);
      // Keys past the end, or before the first seen, are not read and become zeros: what lies there may be NaN, and
      // 0 * NaN leaks. Eight lanes a row, 128 bytes at once.
      const u32 target = smem_address_of(smem_kv) + (stage * 2 + finds_v) * kTileBytes;
      const int first_copied = copy_warp % 2 * 32;
      if (in_boxes) {
        if (lane == 0) mbarrier_expect(full_at(stage), 32 * Layout::kRowBytes);
        __syncwarp();
        if (box * box_rows < 32) {
          const int block = lane % kBlocks;
          copy_box(target + block * Layout::kBlockBytes + (first_copied + box * box_rows) * kBlockRowBytes,
                   finds_v ? key_maps.second : key_maps.first, block * kBlockColumns, box_token, load.kv_head,
                   box_page, full_at(stage), policy);
        }
      } else {
#pragma unroll 4
        for (int i = lane / 8; i < 32; i += 4) {
          const int row = first_copied + i;
          const bool exists = row < num_keys && row >= num_hidden;
          const u64 row_address = __shfl_sync(0xffffffffu, address, i);
          const T* source = exists ? reinterpret_cast<const T*>(row_address) + lane % 8 * 8 : k_pages;
#pragma unroll
          for (int block = 0; block < kBlocks; ++block) {
            cp_async_16(target + block * Layout::kBlockBytes + block_offset(row, lane % 8),
                        exists ? source + block * kBlockColumns : source, exists, policy);
          }
        }
      }
      if (begins_segment && t > 0) {  // the first segment's queries are copied by those who use them
        const int buffer = segment % kQueryBuffers;
        mbarrier_wait(segment_empty_at(buffer), segment / kQueryBuffers & 1 ^ 1);
        copy_queries(buffer, copy_warp, Int<kCopyThreads / 32>());
      }
      mbarrier_arrive_after_copies(full_at(stage));
      if (begins_segment) {
        if (t > 0 && segment % (kCopyThreads / 32) == copy_warp) {
          tell_segment(segment % kSegments);
          mbarrier_arrive(segment_full_at(segment % kQueryBuffers));
        }
        next = last_of_segment();
        next.advance(problem);
        if (!next.done()) find_row(next_found, next, next.token_begin());
      }
      begins_segment = ends_segment;
      if (!ends_segment) {
        ++load.tile;
      } else {
        if (next.done()) break;
        load = next;
        found = next_found;
        ++segment;
      }
    }
    if (!(is_short && has_room)) launch_dependents();
    cp_async_commit();
    cp_async_wait<0>();  // nobody else's memory is written to
    if (copy_warp == 2) copy_levels(smem_levels, cascade);
    if (copy_warp == 3 && lane == 0) {
      const Inputs own{problem.with(smem_levels), partition, slots(), results()};
      memcpy(smem_inputs, &own, sizeof(Inputs));
    }
    const TileInfo share = share_of(partition);
    if (finds_early(share)) {
      const auto partials = slots();
      const auto output = results();
      const TeamMerge<kTileKV, T, kHeadDim, kTileQ> rows{problem,          partition,      partials,   output,
                                                         share.first_line, share.end_line, smem_states};
      rows.find_early(share.end_line, tid - kRowThreads, kCopyThreads);
      Team<kCopyThreads>{tid - kRowThreads, 0, 3}.sync();
      rows.list_states(share.end_line, tid - kRowThreads, kCopyThreads, smem_rows, smem_list, kMostListed,
                       &smem_num_listed);
      if (tid - kRowThreads < 4)
        smem_first_lines[tid - kRowThreads] = first_line_of(share, tid - kRowThreads);
      if (tid == kRowThreads) smem_first_row = share.first_line / Slots::kRowLines;
    } else if (tid == kRowThreads) {
      smem_num_listed = kMostListed + 1;
    }
    // Who waits for states must not keep CTAs from starting that are to write some: partials.cuh.
    if (tid == kRowThreads) {
      smem_all_there = ctas(partition).all_are_there();
    }
    mbarrier_arrive(is_decided);
    mbarrier_wait(is_decided, 0);
    if (smem_all_there) merge_lines_of(2);
    return;
  }

  // --- Rows ---
  if (tid < kEightRows / 16) reinterpret_cast<uint4*>(smem_zeros)[tid] = make_uint4(0, 0, 0, 0);
  wait_for_predecessor();
  // As in decode.cu.
  if (reads_early || (is_short && has_room)) launch_dependents();
  if (tid == 0) Departures<TileInfo>{departures, 0}.start();
  // The first segment's; those of others come with their keys.
  copy_queries(0, warp, Int<kRowThreads / 32>());
  if (warp == 0) tell_segment(0);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads<kRowThreads>();
  const int warpgroup = warp / 4;
  const int quad_row = tid % 32 / 4;
  const int quad_col = tid % 4 * 2;
  // Products take what they read from registers that all lanes have in common: sums of what the compiler knows to be so.
  const u32 keys = smem_address_of(smem_kv);
  const u32 queries = keys + kStages * 2 * kTileBytes;
  const u32 zeros = queries + kQueryBuffers * kQueryBytes;
  float acc[kHeadDim / 2] = {};  // [kHeadDim / 8][4], see wgmma.cuh
  SoftmaxState state[2];  // of rows quad_row and quad_row + 8 of the warp; `sum` over this thread's keys only
  // Starts S = Q K^T of a tile that is there.
  const auto multiply_keys = [&](float (&s)[kLogits], u32 stage, u32 own_queries) {
    const Operand q_operand = swizzled_operand(own_queries, 0);
    const Operand k_operand = swizzled_operand(keys + stage * 2 * kTileBytes, 0);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const u32 in_block = step % 4 * 32;
      wgmma_ss<T>(s, advance(q_operand, step / 4 * QueryLayout::kBlockBytes + in_block),
                  advance(k_operand, step / 4 * Layout::kBlockBytes + in_block), step > 0);
    }
    wgmma_commit();
  };
  // Starts O += P V.
  u32 p[kSteps][4] = {};  // the A operand of each 16 keys; zeros where a segment begins
  const auto multiply_values = [&](bool has_values, u32 stage) {
    // Or zeros, in the place of all rows: with a branch around products, the compiler would wait for all of them.
    const u32 place = has_values ? keys + (stage * 2 + 1) * kTileBytes : zeros;
    const u32 eight_bytes = has_values ? kEightRows : 0;
    const Operand v_operand = swizzled_operand(place, has_values ? Layout::kBlockBytes : 0, eight_bytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      wgmma_rs<T>(acc, p[step], advance(v_operand, step * 2 * eight_bytes));
    wgmma_commit();
  };
  const auto wait_for = [&](u32 t) {
    mbarrier_wait(full_at(t % kStages), t / kStages & 1);
    fence_async_proxy();
  };
  // Logits of base 2 are s * scale.
  const bool is_plain = !(logits_soft_cap > 0.0f) && sm_scale > 0.0f;
  const float scale = is_plain ? sm_scale * kLog2E : 1.0f;
#pragma unroll 1
  for (u32 t = 0, number = 0;; ++number) {
    const int buffer = number % kQueryBuffers;
    if (number > 0) mbarrier_wait(segment_full_at(buffer), (number - 1) / kQueryBuffers & 1);
    const int place = number % kSegments;
    const Segment& segment = smem_segments[place];
    const int num_rows = uniform(segment.num_rows);
    const bool ends_run = uniform(segment.ends_run);
    const bool takes_turns = num_rows > kRows;  // or the segment is one warpgroup's, and the next the other's
    const bool is_own = takes_turns || number % 2 == warpgroup;
    const int first_row = takes_turns ? warpgroup * kRows : 0;  // of this warpgroup
    const int warp_row = first_row + warp % 4 * 16;
    if (!is_own) {
      mbarrier_arrive(segment_empty_at(buffer));
#pragma unroll 1
      for (const u32 end = t + uniform(segment.num_tiles); t < end; ++t) {
        wait_for(t);
        mbarrier_arrive(empty_at(t % kStages));
      }
    } else {
      const bool has_rows = warp_row < num_rows;  // or this warp's weights are zeros
      if (takes_turns && warpgroup == 1) pass_turn_to(0);
      const u32 own_queries = uniform(queries + buffer * kQueryBytes + first_row * kBlockRowBytes);
      const int2 seen = smem_positions.seen[place];
      int token_begin = segment.last.token_begin - (segment.num_tiles - 1) * kTileKV;
      bool begins_segment = true;
#pragma unroll 1
      for (int left = segment.num_tiles; left > 0; --left, ++t, token_begin += kTileKV) {
        wait_for(t);
        if (takes_turns) wait_for_turn(warpgroup);
        const u32 now = uniform(begins_segment ? ~0u << 31 | t : t & ~0u >> 1);
        float s[kLogits];
        multiply_keys(s, now % kStages, own_queries);
        multiply_values(now >> 31 == 0, (now - 1) % kStages);
        if (takes_turns && (warpgroup == 0 || left > 1)) pass_turn_to(1 - warpgroup);
        wgmma_wait<1>();
        pin(s);
        // The queries' place is free. What is told of the segment is needed until its end, by which this thread has not
        // arrived for the next one: nobody is told of the third after it before.
        if (left == 1) mbarrier_arrive(segment_empty_at(buffer));
        float factor[2] = {1.0f, 1.0f};
        bool rescales = false;
        const bool is_masked = token_begin < seen.x || token_begin + kTileKV - 1 > seen.y;
        if (has_rows) {
          if (!is_plain) finish_logits(s, sm_scale, logits_soft_cap);
          if (is_masked) {  // what a row must not see is -inf
            const int kv_len = segment.last.kv_len;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int last = smem_positions.at(problem, place, warp_row + half * 8 + quad_row, kv_len);
#pragma unroll
              for (int n = 0; n < kTileKV / 8; ++n)
#pragma unroll
                for (int column = 0; column < 2; ++column) {
                  if (problem.is_hidden(token_begin + n * 8 + quad_col + column, last, kv_len)) {
                    s[n * 4 + half * 2 + column] = neg_infinity();
                  }
                }
            }
          }
          rescales = raise_maxima(s, scale, state, factor);
        }
        wgmma_wait<0>();
        pin(acc);
        if (!begins_segment) mbarrier_arrive(empty_at((t - 1) % kStages));
        begins_segment = false;
        if (rescales) {  // rare after a segment's first tiles
#pragma unroll
          for (int i = 0; i < kHeadDim / 2; ++i) acc[i] *= factor[i / 2 % 2];
        }
        if (has_rows) {
          weigh_keys<T>(s, scale, state, p);
        }
      }
      multiply_values(true, uniform(t - 1) % kStages);
      wgmma_wait<0>();
      pin(acc);
      mbarrier_arrive(empty_at((t - 1) % kStages));
    }
    // --- Its state is the result or the run's partial state. ---
    if (is_own) {
      const TileInfo& tile = segment.last;
      write_rows(tile, slots(), state, acc, warp_row, num_rows, tid % 32,
                 [&](int row) { return result_row(problem, results(), tile, row, quad_col); });
    }
    if (ends_run) break;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) acc[i] = 0.0f;
    for (auto& step : p) step[0] = step[1] = step[2] = step[3] = 0;
    state[0] = state[1] = SoftmaxState();
  }

  mbarrier_wait(is_decided, 0);
  // As RunEnd::merge, unless a CTA has not started yet.
  const auto all_ctas = ctas(inputs.partition);
  if (__builtin_expect(smem_all_there, 1)) {
    if (tid == 0) all_ctas.end();
    merge_lines_of(warpgroup);
  } else if (warpgroup == 0) {
    if (tid < 2) smem_run_end.clear();
    if (tid == 0) {
      smem_run_end.ask(all_ctas);
      smem_run_end.add_lines(problem.num_rows() * Slots::kRowLines, inputs.partition);
    }
    smem_run_end.merge(all_ctas, NamedBarrier<128>(), [&](const auto& shares) {
      if (shares[0].num_sharers <= 1) return;
      // In thirds too: which lines are merged together decides in which order states are.
#pragma unroll 1
      for (int team = 0; team < 3; ++team) {
        merge_apart<kTileKV>(inputs, first_line_of(shares[0], team), first_line_of(shares[0], team + 1),
                             smem_states, false);
        sync_threads<128>();  // the scratch memory is free again
      }
    });
  }
}

#endif

}  // namespace cupyattn
