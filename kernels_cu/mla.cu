// MLA decode attention (multi-head latent attention, weights absorbed) over a paged cache, in one launch.
//
// A token of the cache is one latent row that all query heads share: `ckv` (512 dimensions) and `kpe` (64). Its key is
// both, its value is ckv. So a request is one group of num_heads query rows a token.
//
// Grid: as many CTAs as fit on the device (persistent). Each takes an equal, contiguous run of KV tiles (schedule.cuh)
// through a ring of kStages tiles of kTileKV rows of 576. kWarpsQ x kWarpsD warps work on a tile of query rows:
// warp (wq, wd) has 16 * kRowBlocks rows.
//   S = Q K^T    a warp takes 16 keys and one of kDimSplits shares of the 576 dimensions; the sums meet in shared memory
//   P            a thread takes two keys of a row, or of several rows, with their maxima and sums
//   O += P V     a warp takes all keys and 512 / kWarpsD columns of the result, which stay in registers
// What segments leave of a group over several CTAs, these merge when their runs are done (partials.cuh).
// A row of the tile is (query token, query head): row = token * num_heads + head.

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

namespace cupyattn {

constexpr int kCkvDim = 512;
constexpr int kKpeDim = 64;

// Starts the copies of kCount chunks of each row of a tile, from chunk kFirst on, to where the rows' parts are.
template <int kThreads, int kRows, int kFirst, int kCount, typename T>
__device__ __forceinline__ void copy_part(u32 smem_tile, const T* const* rows, int first_row, int num_rows,
                                          const T* any, u64 policy) {
  using Layout = TileLayout<kCkvDim + kKpeDim>;
  constexpr int kRowsAtOnce = kThreads / kCount;
  static_assert(kThreads % kCount == 0, "a thread copies the same chunk of every row");
  const int chunk = threadIdx.x % kCount;
#pragma unroll 2
  for (int first = 0; first < kRows; first += kRowsAtOnce) {
    const int row = first + threadIdx.x / kCount;
    if (kRows % kRowsAtOnce != 0 && row >= kRows) break;
    // Keys past the end read nothing and become zeros: what lies there may be NaN, and 0 * NaN leaks.
    const bool exists = row < num_rows && row >= first_row;
    cp_async_16(smem_tile + Layout::offset(row, kFirst + chunk), exists ? rows[row] + chunk * 8 : any, exists,
                policy);
  }
}

// clang-format off
template <typename T, int kWarpsQ, int kRowBlocks, int kWarpsD, int kTileKV, int kStages, int kQueryBuffers,
          bool kFixedSplits, typename... Cascade>
__global__ void __launch_bounds__(32 * kWarpsQ * kWarpsD, 1)
    mla_kernel(const T* __restrict__ q_ckv,        // [num_tokens, num_qo_heads, 512], strided
               const T* __restrict__ q_kpe,        // [num_tokens, num_qo_heads, 64], strided
               const T* __restrict__ ckv_pages,    // [num_pages, page_size, 512], strided
               const T* __restrict__ kpe_pages,    // [num_pages, page_size, 64], strided
               const int* qo_indptr,               // [batch_size + 1] or null
               const int* kv_indptr,               // [batch_size + 1] or null
               const int* kv_indices,              // page ids
               const int* kv_lens,                 // [batch_size]
               T* __restrict__ out,                // as q_ckv
               float* __restrict__ lse,            // [num_tokens, num_qo_heads] or null, natural log
               half_t* partial_out,                // [num_slots, kTileQ, 512], see Partials
               u64* partial_flags,                 // [num_slots, kTileQ, 16]
               Departures<TileInfo>::Memory* departures,  // all zero between launches, as both above
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
               int split_shift,                    // log2 of the tiles of a fixed split
               int max_splits,                     // that the workspace has slots for
               int reads_early,                    // what pdl=True allows, see launch.cuh
               int window_left,                    // -1: unbounded
               float sm_scale,
               float logits_soft_cap,              // 0: none
               const __grid_constant__ Cascade... cascade) {  // as decode.cu
  // clang-format on
  constexpr int kDim = kCkvDim + kKpeDim;
  constexpr int kThreads = 32 * kWarpsQ * kWarpsD;
  constexpr int kWarpRows = 16 * kRowBlocks;
  constexpr int kTileQ = kWarpRows * kWarpsQ;
  constexpr int kKeySteps = kTileKV / 16;
  constexpr int kDimSplits = kWarpsD / kKeySteps;
  constexpr int kColumns = kCkvDim / kWarpsD;            // of the result, a warp's
  constexpr int kLongRun = 64;                           // tiles
  constexpr int kStatesInFlight = kFixedSplits ? 4 : 8;  // of a merge, as there are registers
  constexpr int kPairs = kTileKV / 2;                    // threads of a row, for its weights
  constexpr int kRowsEach = kTileQ * kPairs / kThreads;
  static_assert(kRowsEach * kThreads == kTileQ * kPairs && kPairs <= 32, "threads have as many rows");
  static_assert(kKeySteps * kDimSplits == kWarpsD && 4 % kDimSplits == 0, "S is cut into equal parts");
  static_assert(kThreads >= 2 * kTileKV, "a thread finds the place of one ckv or one kpe row");
  static_assert(kThreads % (kCkvDim / 8) == 0 && kStages >= 2);
  constexpr bool kIsCascade = sizeof...(Cascade) > 0;
  static_assert(!kIsCascade || !kFixedSplits);
  using Layout = TileLayout<kDim>;
  static_assert(Layout::kSwizzled, "16-byte chunks of each 128 bytes are swizzled among themselves");

  const Divisor heads{num_qo_heads, heads_multiplier, heads_shift};
  const Divisor page{page_size, page_multiplier, page_shift};
  extern __shared__ __align__(128) unsigned char smem[];
  auto problem = uneven<kFixedSplits ? 0 : 2, true>(problem_of(
      departures, smem, nullptr, 0, PageTable{kv_indptr, kv_indices, table_row_stride}, num_table_entries,
      qo_indptr, kv_lens, batch_size, 1, heads, window_left, split_shift, max_splits, cascade...));
  const PageStrides ckv_strides{ckv_stride_page, ckv_stride_token, 0};
  const PageStrides kpe_strides{kpe_stride_page, kpe_stride_token, 0};
  const Partials<kCkvDim, kTileQ, true> partials{partial_out, partial_flags};
  const Output<T, kTileQ> output{
      out, lse, out_stride_token, out_stride_head, lse_stride_token, lse_stride_head, heads};
  // A capped logit is cap * tanh(s * sm_scale / cap); both kinds are scaled to base 2.
  const float logit_scale = sm_scale * (logits_soft_cap > 0.0f ? reciprocal_approx(logits_soft_cap) : kLog2E);
  const float soft_cap_log2 = logits_soft_cap * kLog2E;

  constexpr int kTileBytes = kTileKV * Layout::kRowBytes;
  constexpr int kQueryBytes = kTileQ * Layout::kRowBytes;
  constexpr int kLogitsRow = kTileKV + 8;  // floats: 8 more spread a warp's pairs over all banks
  unsigned char* smem_kv = smem;           // [kStages] tiles
  unsigned char* smem_q = smem_kv + kStages * kTileBytes;  // [kQueryBuffers] tiles, one a segment
  float* smem_logits =
      reinterpret_cast<float*>(smem_q + kQueryBuffers * kQueryBytes);  // [kDimSplits][kTileQ][kLogitsRow]
  const T** smem_rows =
      reinterpret_cast<const T**>(smem_logits + kDimSplits * kTileQ * kLogitsRow);  // [2][ckv, kpe][kTileKV]
  __shared__ TileInfo smem_tiles[kStages];
  __shared__ bool smem_exists[kStages];   // or nothing was copied in that round
  __shared__ float smem_factors[kTileQ];  // of a tile: for what was accumulated before
  __shared__ float2 smem_states[kTileQ];  // of a segment that ends: 1 / sum and lse of each row
  __shared__ RunEnd smem_run_end;
  __shared__ Positions<kTileQ, kIsCascade ? kQueryBuffers : 0>
      smem_positions;  // by the rows of a segment's queries

  const int tid = threadIdx.x;
  const int lane = tid % 32;
  const int warp = tid / 32;
  const int warp_q = warp / kWarpsD;
  const int warp_d = warp % kWarpsD;
  const int key_step = warp_d % kKeySteps;   // of S
  const int dim_split = warp_d / kKeySteps;  // of S
  const int quad_row = lane / 4;             // g of mma.cuh
  const int quad_col = lane % 4 * 2;         // 2t of mma.cuh

  // As in decode.cu.
  problem.template prefetch<kThreads>();
  touch(q_ckv_stride_token);
  touch(ckv_stride_page);
  touch(lse_stride_head);
  touch(logits_soft_cap);

  Cursor<kTileKV, kTileQ, kFixedSplits> load;  // runs up to kStages - 1 tiles ahead of the tile in use
  Partition partition;

  // --- Producer: a row's address is found one tile before its copy starts. ---
  const auto keys_left = [&]() { return load.done() ? 0 : load.request.kv_len - load.token_begin(); };
  // Threads 0 .. kTileKV - 1 find rows of ckv, the next kTileKV those of kpe.
  const bool finds_kpe = tid / kTileKV == 1;
  const auto has_row = [&]() { return tid < 2 * kTileKV && tid % kTileKV < keys_left(); };
  FoundRow found;
  const auto find_row = [&]() {  // starts the read of the page table
    if (!has_row()) return;
    found.page =
        static_cast<int>(load_early(found.find(page, load.pages, load.token_begin() + tid % kTileKV)));
  };
  const auto found_row = [&]() {  // waits for it
    return finds_kpe ? kpe_pages + kpe_strides.offset(found.page, found.token, 0)
                     : ckv_pages + ckv_strides.offset(found.page, found.token, 0);
  };
  const auto prefetch_row = [&](const T* row) {
#pragma unroll
    for (int i = 0; i < kCkvDim * 2; i += 128) {
      if (i == 0 || !finds_kpe) prefetch_l2(reinterpret_cast<const char*>(row) + i);
    }
  };
  const auto ask_for_keys = [&]() {
    if (!has_row()) return;
    found.guess(problem, load, page, num_pages, tid % kTileKV, 1, [&]() {
      if (load.q_tile == 0) prefetch_row(found_row());
    });
  };
  const auto look_again = [&]() { found.look_again(); };
  constexpr bool kGuesses = kLaunchesEarly && !kIsCascade;  // as mla_sm90.cu
  const Beginning beginning = guess_run<kThreads, kGuesses, true>(
      problem, reads_early, load, partition, ask_for_keys, look_again, false, blockIdx.x, gridDim.x);
  if (beginning == kNoRun) {
    wait_for_predecessor();  // or this kernel could be done before the one that its successor relies on
    return;
  }

  int first_seen = 0;  // of a cascade's segment, the first key in anybody's window
  const auto copy_tile = [&](int stage, int slot) {
    const u64 policy = kIsCascade && load.request.qo_len * num_qo_heads > kTileQ ? evict_normal_policy()
                                                                                 : evict_first_policy();
    const u32 smem_tile = smem_address_of(smem_kv) + stage * kTileBytes;
    const int first_row = kIsCascade ? first_seen - load.token_begin() : 0;
    const T* const* rows = smem_rows + slot * 2 * kTileKV;
    copy_part<kThreads, kTileKV, 0, kCkvDim / 8>(smem_tile, rows, first_row, keys_left(), ckv_pages, policy);
    copy_part<kThreads, kTileKV, kCkvDim / 8, kKpeDim / 8>(smem_tile, rows + kTileKV, first_row, keys_left(),
                                                           ckv_pages, policy);
  };
  const auto copy_queries = [&](int buffer) {
    const u32 smem_tile = smem_address_of(smem_q) + buffer * kQueryBytes;
    const int first_row = load.q_tile * kTileQ;
    const int num_rows = load.request.qo_len * num_qo_heads - first_row;
    const auto copy_columns = [&](u32 first_chunk, u32 num_chunks, const T* begin, i64 stride_token,
                                  i64 stride_head) {
      const u32 chunk = tid % num_chunks;  // both are powers of two, known when this is inlined
#pragma unroll 2
      for (int row = tid / num_chunks; row < kTileQ; row += kThreads / num_chunks) {
        const bool exists = row < num_rows;
        const int token_in_request = heads.divide(first_row + row);
        const int head = heads.modulo(first_row + row, token_in_request);
        const i64 token = problem.row_of(load.request.qo_begin + (exists ? token_in_request : 0));
        const T* source = begin + token * stride_token + head * stride_head + chunk * 8;
        cp_async_16(smem_tile + Layout::offset(row, first_chunk + chunk), exists ? source : q_ckv, exists);
      }
    };
    copy_columns(0, kCkvDim / 8, q_ckv, q_ckv_stride_token, q_ckv_stride_head);
    copy_columns(kCkvDim / 8, kKpeDim / 8, q_kpe, q_kpe_stride_token, q_kpe_stride_head);
  };

  // --- Consumer ---
  float acc[kRowBlocks][kColumns / 8][4];
  SoftmaxState state[kRowsEach];  // `sum` over this thread's keys only
  // Where this lane's ldmatrix rows begin, from the beginning of a tile on. A share of S is 4 / kDimSplits of the four
  // 16-dimension steps of each 128 bytes.
  const u32 split_bits = dim_split * (128 / kDimSplits);
  const u32 q_offset = Layout::offset(warp_q * kWarpRows + lane % 16, lane / 16) ^ split_bits;
  const u32 k_offset = Layout::offset(key_step * 16 + lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ split_bits;
  const u32 v_offset = Layout::offset(lane % 16, lane / 16) + warp_d * kColumns * 2;

  // Called where a segment has ended, so that nothing of it is live during a merge.
  const auto clear = [&]() {
#pragma unroll
    for (int j = 0; j < kRowsEach; ++j) state[j] = SoftmaxState();
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[block][n][i] = 0.0f;
  };

  if (tid < 2) smem_run_end.clear();
  const bool is_found = found.entry != nullptr && (beginning == kGuessed || reads_early);  // or by look_again
  if (!is_found) find_row();
  partition.number_ctas();
  // The first keys are on their way into L2; before the window may be any pages.
  if (!is_found && has_row() && (!kIsCascade || window_left < 0)) prefetch_row(found_row());
  wait_for_predecessor();
  // As in decode.cu.
  if (reads_early) launch_dependents();
  const Departures<TileInfo> ctas{departures, static_cast<u32>(partition.num_ctas)};
  if (tid == 0) ctas.start();
  clear();
  bool begins_segment = true;
  int q_buffer = 0;
  int segments_ahead = 0;  // whose queries are in a buffer
  // A round fills one stage and uses another, which was filled kStages - 1 rounds before; either may be empty: the
  // first tile of a segment waits for a query buffer. A run of one tile has one round before it.
  const bool is_one_tile = !kFixedSplits && partition.quota == 1;
#pragma unroll 1
  for (int round = is_one_tile ? -1 : 1 - kStages, load_stage = 0, use_stage = 0, slot = 0, tiles_ahead = 0;
       tiles_ahead > 0 || !load.done(); ++round, slot ^= 1) {
    if (has_row()) smem_rows[slot * 2 * kTileKV + tid] = found_row();
    if (is_one_tile) {
      cp_async_wait<0>();
    } else {
      cp_async_wait<kStages - 2>();
    }
    __syncthreads();  // the tile has landed; the stage read last is free; the rows in `slot` are there

    const bool loads = !load.done() && !(begins_segment && segments_ahead == kQueryBuffers);
    if (tid == 0) smem_exists[load_stage] = loads;
    if (loads) {
      if (begins_segment) {
        copy_queries(q_buffer);
        ++segments_ahead;
      }
      if constexpr (kIsCascade) {
        if (begins_segment && warp == 0) smem_positions.write(problem, load, q_buffer);
        if (begins_segment && window_left >= 0) first_seen = problem.template first_seen<kTileQ>(load);
      }
      copy_tile(load_stage, slot);
      const bool ends_segment = load.ends_segment(problem);
      if (tid == 0) {
        smem_tiles[load_stage] = TileInfo::of<partials.kRowLines>(load, problem, partition, begins_segment,
                                                                  ends_segment, q_buffer);
      }
      begins_segment = ends_segment;
      if (ends_segment && ++q_buffer == kQueryBuffers) q_buffer = 0;
      load.advance(problem);
      ++tiles_ahead;
    }
    cp_async_commit();
    if (loads) find_row();
    if (++load_stage == kStages) load_stage = 0;
    if (round < 0) continue;
    const int stage = use_stage;
    if (++use_stage == kStages) use_stage = 0;
    if (!smem_exists[stage]) continue;
    const TileInfo& tile = smem_tiles[stage];
    const u32 smem_tile = smem_address_of(smem_kv) + stage * kTileBytes;
    const bool ends_run = --tiles_ahead == 0 && load.done();
    if (ends_run && tid == 0) smem_run_end.ask(ctas);

    // S = Q K^T, of 16 keys and a share of the dimensions.
    {
      float s[kRowBlocks][2][4] = {};
      const u32 q_address = smem_address_of(smem_q) + tile.q_buffer * kQueryBytes + q_offset;
      const u32 k_address = smem_tile + k_offset;
#pragma unroll
      for (int line = 0; line < kDim / 64; ++line)
#pragma unroll
        for (int step = 0; step < 4 / kDimSplits; ++step) {
          u32 k_frag[4];
          ldmatrix_x4(k_frag, (k_address ^ step * 32) + line * 128);
#pragma unroll
          for (int block = 0; block < kRowBlocks; ++block) {
            u32 q_frag[4];
            ldmatrix_x4(q_frag, (q_address ^ step * 32) + line * 128 + block * 16 * Layout::kRowBytes);
            mma_m16n8k16<T>(s[block][0], q_frag, k_frag[0], k_frag[1]);
            mma_m16n8k16<T>(s[block][1], q_frag, k_frag[2], k_frag[3]);
          }
        }
      float* target = smem_logits + (dim_split * kTileQ + warp_q * kWarpRows + quad_row) * kLogitsRow +
                      key_step * 16 + quad_col;
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            *reinterpret_cast<float2*>(target + (block * 16 + half * 8) * kLogitsRow + n * 8) =
                make_float2(s[block][n][half * 2], s[block][n][half * 2 + 1]);
          }
    }
    __syncthreads();

    // Weights, by threads with two keys of a row each, in the place of the first share of their logits.
    const int total_rows = tile.qo_len * num_qo_heads;
    const int first_row = tile.q_tile * kTileQ;
    const auto last_key_of = [&](int row) { return tile.kv_len - tile.qo_len + heads.divide(row); };
    bool all_seen;
    if constexpr (kIsCascade) {
      all_seen = smem_positions.all_see(tile.q_buffer, tile.token_begin, tile.token_begin + kTileKV - 1);
    } else {
      all_seen = tile.token_begin + kTileKV - 1 <= last_key_of(first_row) &&
                 (window_left < 0 ||
                  tile.token_begin >= last_key_of(min(first_row + kTileQ, total_rows) - 1) - window_left);
    }
#pragma unroll
    for (int j = 0; j < kRowsEach; ++j) {
      const int row = tid / kPairs + j * (kThreads / kPairs);
      const int pair = tid % kPairs;
      float* source = smem_logits + row * kLogitsRow + pair * 2;
      float2 x = *reinterpret_cast<const float2*>(source);
#pragma unroll
      for (int split = 1; split < kDimSplits; ++split) {
        const float2 more = *reinterpret_cast<const float2*>(source + split * kTileQ * kLogitsRow);
        x.x += more.x, x.y += more.y;
      }
      x.x *= logit_scale, x.y *= logit_scale;  // to base 2
      if (logits_soft_cap > 0.0f) {
        x.x = soft_cap_log2 * tanh_accurate(x.x);
        x.y = soft_cap_log2 * tanh_accurate(x.y);
      }
      if (!all_seen) {
        int last;  // that the row sees, or where it stands
        if constexpr (kIsCascade) {
          last = smem_positions.at(problem, tile.q_buffer, row, tile.kv_len);
        } else {
          last = last_key_of(min(first_row + row, total_rows - 1));
        }
        const auto is_hidden = [&](int token) {
          if constexpr (kIsCascade) return problem.is_hidden(token, last, tile.kv_len);
          return token > last || (window_left >= 0 && token < last - window_left);
        };
        const int token = tile.token_begin + pair * 2;
        if (is_hidden(token)) x.x = neg_infinity();
        if (is_hidden(token + 1)) x.y = neg_infinity();
      }
      // Online softmax.
      float logit_max = fmaxf(x.x, x.y);
#pragma unroll
      for (int delta = 1; delta < kPairs; delta *= 2) {
        logit_max = fmaxf(logit_max, __shfl_xor_sync(0xffffffffu, logit_max, delta));
      }
      SoftmaxState& own = state[j];
      const float factor = own.raise(logit_max);
      x.x = own.weight(x.x), x.y = own.weight(x.y);
      own.sum += x.x + x.y;
      *reinterpret_cast<u32*>(source) = pack2<T>(x.x, x.y);
      if (pair == 0) smem_factors[row] = factor;
      if (tile.ends_segment) {
#pragma unroll
        for (int delta = 1; delta < kPairs; delta *= 2) {
          own.sum += __shfl_xor_sync(0xffffffffu, own.sum, delta);
        }
        if (pair == 0) smem_states[row] = make_float2(own.inverse_sum(), own.lse_log2());
      }
    }
    __syncthreads();

    // As the A operand of the next product has them: pair i of step k is keys 16 * k + 8 * (i / 2) + quad_col of row
    // 8 * (i % 2) + quad_row.
    u32 p_frag[kRowBlocks][kKeySteps][4];
    float factor[kRowBlocks][2];
    bool rescales = false;
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
      const int row = warp_q * kWarpRows + block * 16 + quad_row;
#pragma unroll
      for (int k = 0; k < kKeySteps; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p_frag[block][k][i] = *reinterpret_cast<const u32*>(smem_logits + (row + i % 2 * 8) * kLogitsRow +
                                                              k * 16 + i / 2 * 8 + quad_col);
        }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        factor[block][half] = smem_factors[row + half * 8];
        rescales |= factor[block][half] != 1.0f;
      }
    }
    if (__any_sync(0xffffffffu, rescales)) {  // rare after a segment's first tiles
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[block][n][i] *= factor[block][i / 2];
    }

    // O += P V over all keys of the tile, in the warp's columns.
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step)
#pragma unroll
      for (int k = 0; k < kKeySteps; ++k) {
        u32 v_frag[4];
        ldmatrix_x4_trans(v_frag, Layout::advance(smem_tile + v_offset, step) + k * 16 * Layout::kRowBytes);
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block) {
          mma_m16n8k16<T>(acc[block][2 * step], p_frag[block][k], v_frag[0], v_frag[1]);
          mma_m16n8k16<T>(acc[block][2 * step + 1], p_frag[block][k], v_frag[2], v_frag[3]);
        }
      }
    if (!tile.ends_segment) continue;

    // --- End of a segment: its state is the result or the run's partial state. ---
    --segments_ahead;
    const int num_rows = tile.num_rows<kTileQ>(heads);
    const bool is_complete = tile.group.num_partials == 1;
    constexpr int kLines = kColumns / partials.kLineDims;  // of a warp's rows
    const int first_line = warp_d * kLines;
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_q * kWarpRows + block * 16 + half * 8 + quad_row;
        const float inverse = smem_states[row].x;
        const float lse_log2 = smem_states[row].y;
        float x[kLines][8];
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) x[n / 4][n % 4 * 2 + i] = acc[block][n][half * 2 + i];
        if (!is_complete) {
          partials.write_lines(tile.state_row + row, first_line, lane % 4, x, inverse, lse_log2,
                               row < num_rows);
        } else if (row < num_rows) {
#pragma unroll
          for (int line = 0; line < kLines; ++line) {
            const int dim = partials.first_dim((first_line + line) * 4 + lane % 4);
            const auto target = [&]() {
              if constexpr (kIsCascade) return result_row(problem, output, tile, row, dim);
              return output.row_at(tile, row, dim);
            }();
#pragma unroll
            for (float& value : x[line]) value *= inverse;
            partials.write_result(target, dim, x[line]);
            target.write_lse(lse_log2);
          }
        }
      }
    if (!kIsCascade && !is_complete && tid < 4) smem_run_end.add_together(tile);
    // Page ids that L1 keeps take room from copies under way, see decode.cu.
    if (!is_complete && !ends_run && partition.quota >= kLongRun && tid == 0) __threadfence();
    if (kFixedSplits && tile.num_sharers == 1 && !is_complete &&
        tile.state_row == (tile.group.first + tile.group.num_partials - 1) * kTileQ) {
      __syncthreads();  // the logits have been read
      merge_share<kStatesInFlight, kFixedSplits>(all_threads<kThreads>(), partials, output, tile,
                                                 tile.first_line, tile.end_line, smem_logits);
    }
    if (ends_run) break;
    clear();
  }
  if (!reads_early) launch_dependents();
  if constexpr (kIsCascade) {
    if (tid == 0) smem_run_end.add_lines(problem.num_rows() * partials.kRowLines, partition);
    smem_run_end.merge(ctas, NamedBarrier<kThreads>(), [&](const auto& shares) {
      merge_rows<kThreads, kTileKV>(problem, partition, partials, output, shares,
                                    reinterpret_cast<float*>(smem));
    });
  } else {
    constexpr Halves kHalves = kFixedSplits ? Halves::kNone : Halves::kOfLines;
    smem_run_end.merge(ctas, NamedBarrier<kThreads>(), [&](const auto& shares) {
      merge_shares<kStatesInFlight, kThreads, kFixedSplits, kHalves>(partials, output, shares, smem_logits);
    });
  }
}

}  // namespace cupyattn
