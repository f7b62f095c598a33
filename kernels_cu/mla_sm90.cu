// MLA decode attention for sm_90a: the job of mla.cu, by the tensor cores' asynchronous products.
//
// Grid: one CTA an SM (persistent), each with an equal, contiguous run of KV tiles (schedule.cuh). A tile is 64 keys, a
// query tile kTileQ rows, padded to the 64 of a product, which costs nothing where memory is the limit.
//
// Three warpgroups of 128 threads. The last one copies: KV tiles into a ring of kStages, the queries of a segment into
// the one buffer there is for them. The other two each compute all of S = Q K^T [64, 64] and the weights, and with those
// from registers half of O += P V [64, 256]. That each has S to itself costs half as many products again, and saves all
// talk between the two.
//
// Shared memory, in blocks of 64 rows x 64 columns (8 KiB, wgmma.cuh), nine to a tile of 576 columns:
//   queries        1 x 72 KiB
//   keys, values   2 x 72 KiB
// A row of the tile is (query token, query head): row = token * num_heads + head.

#include "cupyattn/barrier.cuh"
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

// A call, which nothing in registers outlives: inlined, it would leave the loop before it too few of them.
template <int kThreads, typename T, int kHeadDim, int kTileQ>
__device__ __noinline__ void merge_apart(RunEnd& run_end, const Departures<TileInfo>& ctas,
                                         const Partials<kHeadDim, kTileQ>& partials,
                                         const Output<T, kTileQ>& output, float* scratch) {
  run_end.merge<kThreads, false, true>(ctas, partials, output, scratch);
}

// clang-format off
template <typename T, int kTileQ>
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
                    float* partial_out,                 // [num_slots, kTileQ, 512], see Partials
                    float* partial_lse,                 // [num_slots, kTileQ, 32], base 2
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
                    int table_row_stride,
                    int num_table_entries,              // of kv_indices, to prefetch
                    int split_shift,                    // fixed splits are mla.cu's
                    int max_splits,
                    int window_left,                    // -1: unbounded
                    float sm_scale,
                    float logits_soft_cap) {            // 0: none
  // clang-format on
  constexpr int kCkvDim = 512;
  constexpr int kKpeDim = 64;
  constexpr int kRows = 64;  // of a product
  constexpr int kTileKV = 64;
  constexpr int kStages = 2;
  constexpr int kThreads = 384;
  constexpr int kConsumers = 256;
  constexpr int kProducers = kThreads - kConsumers;
  constexpr int kColumns = kCkvDim / 2;  // of the result, a consumer warpgroup's
  constexpr int kCkvBlocks = kCkvDim / kBlockColumns;
  constexpr int kBlocks = kCkvBlocks + 1;
  constexpr int kBlockBytes = 64 * kBlockRowBytes;
  constexpr int kTileBytes = kBlocks * kBlockBytes;
  constexpr int kLongRun = 64;  // tiles
  static_assert(kKpeDim == kBlockColumns && kTileQ <= kRows);

  const Divisor heads{num_qo_heads, heads_multiplier, heads_shift};
  const Divisor page{page_size, page_multiplier, page_shift};
  const Problem problem{PageTable{kv_indptr, kv_indices, table_row_stride},
                        qo_indptr,
                        kv_lens,
                        batch_size,
                        1,
                        heads,
                        window_left,
                        split_shift,
                        max_splits};
  const Partials<kCkvDim, kTileQ> partials{partial_out, partial_lse};
  const Output<T, kTileQ> output{
      out, lse, out_stride_token, out_stride_head, lse_stride_token, lse_stride_head, heads};

  extern __shared__ unsigned char smem[];
  unsigned char* smem_q =
      smem + (1024 - smem_address_of(smem) % 1024) % 1024;  // blocks are aligned to 1024 bytes
  unsigned char* smem_kv = smem_q + kTileBytes;             // [kStages] tiles
  __shared__ TileInfo smem_tiles[kStages];
  __shared__ bool smem_ends_run[kStages];
  __shared__ RunEnd smem_run_end;
  __shared__ __align__(8) u64 smem_barriers[2 * kStages + 1];
  const auto full_at = [&](int stage) { return smem_address_of(smem_barriers + stage); };
  const auto empty_at = [&](int stage) { return smem_address_of(smem_barriers + kStages + stage); };
  const u32 q_empty = smem_address_of(smem_barriers + 2 * kStages);

  const int tid = threadIdx.x;
  const int lane = tid % 32;
  const int warp = tid / 32;

  // As in decode.cu: offsets and page ids are in L2 when the lengths have come from DRAM.
  constexpr int kLine = 32;  // entries of a 128-byte line
  const i64 prefetch_entry = (static_cast<i64>(blockIdx.x) * kThreads + tid) * kLine;
  if (prefetch_entry < num_table_entries) prefetch_l2(kv_indices + prefetch_entry);
  if (tid < batch_size) {
    load_early(kv_lens + tid);
    if (kv_indptr != nullptr) load_early(kv_indptr + tid);
  }
  touch(q_ckv_stride_token);
  touch(ckv_stride_page);
  touch(lse_stride_head);
  touch(logits_soft_cap);
  if (tid == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full_at(stage), kProducers + 1);
      mbarrier_init(empty_at(stage), kConsumers / 32);
    }
    mbarrier_init(q_empty, kConsumers / 32);
  }
  if (tid < 2) smem_run_end.clear();

  Cursor<kTileKV, kTileQ, false, true> load;
  Partition partition;
  const bool has_run = begin_run<kThreads>(problem, load, partition);  // its barriers show all the mbarriers
  if (!has_run) {
    wait_for_predecessor();  // or this kernel could be done before the one that its successor relies on
    return;
  }

  const Departures<TileInfo> ctas{departures, static_cast<u32>(partition.num_ctas)};
  if (tid >= kConsumers) {
    // --- Producer: each warp copies 16 rows of a tile. ---
    give_registers<104>();
    const PageStrides ckv_strides{ckv_stride_page, ckv_stride_token, 0};
    const PageStrides kpe_strides{kpe_stride_page, kpe_stride_token, 0};
    const int first_row = (warp - kConsumers / 32) * 16;
    // Lanes 0 .. 15 find rows of ckv, the others those of kpe, one tile before the copy.
    const auto keys_left = [&]() { return load.done() ? 0 : load.request.kv_len - load.token_begin(); };
    int found_page = 0;
    int found_token = 0;
    const auto find_row = [&]() {  // starts the read of the page table
      if (first_row + lane % 16 >= keys_left()) return;
      const int token = load.token_begin() + first_row + lane % 16;
      const int entry = page.divide(token);
      found_page = static_cast<int>(load_early(load.pages + entry));
      found_token = page.modulo(token, entry);
    };
    const auto found_row = [&]() {
      return reinterpret_cast<u64>(lane >= 16 ? kpe_pages + kpe_strides.offset(found_page, found_token, 0)
                                              : ckv_pages + ckv_strides.offset(found_page, found_token, 0));
    };
    // Where CTAs with other query tiles read the same keys, these must stay in L2 for a while.
    const u64 policy =
        partition.part_ctas == partition.num_ctas ? evict_first_policy() : evict_normal_policy();
    find_row();
    if (first_row + lane % 16 < keys_left()) {  // the first keys are on their way into L2
      const char* row = reinterpret_cast<const char*>(found_row());
#pragma unroll 1
      for (int i = 0; i < (lane < 16 ? kCkvDim : kKpeDim) * 2; i += 128) prefetch_l2(row + i);
    }
    wait_for_predecessor();
    // Not earlier: the next kernel may rely on all before us having finished once we have.
    launch_dependents();
    bool begins_segment = true;
#pragma unroll 1
    for (int tile_idx = 0, stage = 0, segment = -1; !load.done(); ++tile_idx) {
      const u32 phase = tile_idx / kStages & 1;
      const u64 row_address = found_row();
      const int num_keys = keys_left();
      mbarrier_wait(empty_at(stage), phase ^ 1);
      const u32 smem_tile = smem_address_of(smem_kv) + stage * kTileBytes;
      // Keys past the end read nothing and become zeros: what lies there may be NaN, and 0 * NaN leaks.
#pragma unroll 4
      for (int i = 0; i < 16; ++i) {
        const int row = first_row + i;
        const T* source = reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, row_address, i));
        const bool exists = row < num_keys;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int chunk = half * 32 + lane;
          cp_async_16(smem_tile + chunk / 8 * kBlockBytes + block_offset(row, chunk % 8),
                      exists ? source + chunk * 8 : ckv_pages, exists, policy);
        }
      }
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const int row = first_row + i + lane / 8;
        const T* source =
            reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, row_address, 16 + i + lane / 8));
        const bool exists = row < num_keys;
        cp_async_16(smem_tile + kCkvBlocks * kBlockBytes + block_offset(row, lane % 8),
                    exists ? source + lane % 8 * 8 : ckv_pages, exists, policy);
      }
      if (begins_segment) {
        ++segment;
        mbarrier_wait(q_empty, segment & 1 ^ 1);
        const int first_q_row = load.q_tile * kTileQ;
        const int num_rows = min(load.request.qo_len * num_qo_heads - first_q_row, kTileQ);
#pragma unroll 1
        for (int row = warp - kConsumers / 32; row < kRows; row += kProducers / 32) {
          const bool exists = row < num_rows;
          const int token_in_request = heads.divide(first_q_row + row);
          const int head = heads.modulo(first_q_row + row, token_in_request);
          const i64 token = load.request.qo_begin + token_in_request;
          const T* ckv = exists ? q_ckv + token * q_ckv_stride_token + head * q_ckv_stride_head : q_ckv;
          const T* kpe = exists ? q_kpe + token * q_kpe_stride_token + head * q_kpe_stride_head : q_kpe;
#pragma unroll
          for (int first = 0; first < kBlocks * 8; first += 32) {
            const int chunk = first + lane;
            if (chunk >= kBlocks * 8) break;
            const T* source = chunk < kCkvDim / 8 ? ckv + chunk * 8 : kpe + (chunk * 8 - kCkvDim);
            cp_async_16(smem_address_of(smem_q) + chunk / 8 * kBlockBytes + block_offset(row, chunk % 8),
                        source, exists);
          }
        }
      }
      const bool ends_segment = load.ends_segment(problem);
      const TileInfo tile = TileInfo::of(load, problem, partition, begins_segment, ends_segment, 0);
      begins_segment = ends_segment;
      load.advance(problem);
      if (tid == kConsumers) {
        smem_tiles[stage] = tile;
        smem_ends_run[stage] = load.done();
        mbarrier_arrive(full_at(stage));
      }
      mbarrier_arrive_after_copies(full_at(stage));
      find_row();
      if (++stage == kStages) stage = 0;
    }
    cp_async_wait<0>();
    return;
  } else {
    // --- Consumers ---
    take_registers<200>();
    wait_for_predecessor();
    if (tid == 0) ctas.start();
    const int group = warp / 4;          // warpgroup
    const int warp_row = warp % 4 * 16;  // the warp's first row
    const int quad_row = lane / 4;
    const int quad_col = lane % 4 * 2;
    // A capped logit is cap * tanh(s * sm_scale / cap); both kinds are scaled to base 2.
    const float logit_scale =
        sm_scale * (logits_soft_cap > 0.0f ? reciprocal_approx(logits_soft_cap) : kLog2E);
    const float soft_cap_log2 = logits_soft_cap * kLog2E;

    float acc[kColumns / 2] = {};  // [kColumns / 8][4]
    SoftmaxState state[2];  // rows quad_row and quad_row + 8 of the warp; `sum` over this lane's keys only
    bool ends_run = false;
#pragma unroll 1
    for (int tile_idx = 0, stage = 0; !ends_run; ++tile_idx) {
      mbarrier_wait(full_at(stage), tile_idx / kStages & 1);
      fence_async_proxy();
      const TileInfo& tile = smem_tiles[stage];
      ends_run = smem_ends_run[stage];
      if (ends_run && tid == 0) smem_run_end.ask(ctas);
      const u32 smem_tile = smem_address_of(smem_kv) + stage * kTileBytes;

      // S = Q K^T
      float s[32];
      {
        const u64 q_operand = swizzled_operand(smem_address_of(smem_q), 0);
        const u64 k_operand = swizzled_operand(smem_tile, 0);
        wgmma_fence();
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            const u32 bytes = block * kBlockBytes + step * 32;
            wgmma_m64n64k16<T>(s, advance(q_operand, bytes), advance(k_operand, bytes), block + step > 0);
          }
        wgmma_commit();
        wgmma_wait<0>();
      }

      // To base-2 logits, with what a row must not see at -inf. Most tiles are seen whole by every row.
      const int total_rows = tile.qo_len * num_qo_heads;
      const int first_row = tile.q_tile * kTileQ;
      const auto last_key_of = [&](int row) { return tile.kv_len - tile.qo_len + heads.divide(row); };
      const bool all_seen =
          tile.token_begin + kTileKV - 1 <= last_key_of(first_row) &&
          (window_left < 0 ||
           tile.token_begin >= last_key_of(min(first_row + kTileQ, total_rows) - 1) - window_left);
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] *= logit_scale;
      if (logits_soft_cap > 0.0f) {
#pragma unroll
        for (int i = 0; i < 32; ++i) s[i] = soft_cap_log2 * tanh_accurate(s[i]);
      }
      if (!all_seen) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int last = last_key_of(min(first_row + warp_row + half * 8 + quad_row, total_rows - 1));
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int column = 0; column < 2; ++column) {
              const int token = tile.token_begin + n * 8 + quad_col + column;
              if (token > last || (window_left >= 0 && token < last - window_left)) {
                s[n * 4 + half * 2 + column] = neg_infinity();
              }
            }
        }
      }

      // Online softmax. The four lanes of a quad have a row.
      float factor[2];
      u32 p[4][4];  // the A operand of each 16 keys
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float logit_max = neg_infinity();
#pragma unroll
        for (int n = 0; n < 8; ++n)
          logit_max = fmaxf(logit_max, fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]));
        logit_max = fmaxf(logit_max, __shfl_xor_sync(0xffffffffu, logit_max, 1));
        logit_max = fmaxf(logit_max, __shfl_xor_sync(0xffffffffu, logit_max, 2));
        factor[half] = state[half].raise(logit_max);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const float x = state[half].weight(s[n * 4 + half * 2]);
          const float y = state[half].weight(s[n * 4 + half * 2 + 1]);
          state[half].sum += x + y;
          p[n / 2][n % 2 * 2 + half] = pack2<T>(x, y);
        }
      }
      if (__any_sync(0xffffffffu,
                     factor[0] != 1.0f || factor[1] != 1.0f)) {  // rare after a segment's first tiles
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) acc[i] *= factor[i / 2 % 2];
      }

      // O += P V, in this warpgroup's columns.
      const u64 v_operand = swizzled_operand(smem_tile + group * (kCkvBlocks / 2) * kBlockBytes, kBlockBytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        wgmma_m64n256k16<T>(acc, p[step], advance(v_operand, step * 16 * kBlockRowBytes));
      }
      wgmma_commit();
      wgmma_wait<0>();

      if (tile.ends_segment) {
        // --- Its state is the result or the run's partial state. Through shared memory, in the place of the tile. ---
        const int num_rows = tile.num_rows<kTileQ>(heads);
        const bool is_complete = tile.group.num_partials == 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          state[half].sum += __shfl_xor_sync(0xffffffffu, state[half].sum, 1);
          state[half].sum += __shfl_xor_sync(0xffffffffu, state[half].sum, 2);
        }
        constexpr int kScratchRow = kColumns + 8;  // floats: 8 more spread a warp's pairs over all banks
        static_assert(kConsumers / 32 * 8 * kScratchRow * 4 <= kTileBytes);
        float* smem_scratch = reinterpret_cast<float*>(smem_kv + stage * kTileBytes) + warp * 8 * kScratchRow;
        sync_threads<kConsumers>();  // all are done with the tile, and with the queries
        if (lane == 0) mbarrier_arrive(q_empty);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float inverse = state[half].inverse_sum();
          const float lse_log2 = state[half].lse_log2();
          const int half_row = warp_row + half * 8;
          __syncwarp();
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n) {
            *reinterpret_cast<float2*>(smem_scratch + quad_row * kScratchRow + n * 8 + quad_col) =
                make_float2(acc[n * 4 + half * 2] * inverse, acc[n * 4 + half * 2 + 1] * inverse);
          }
          __syncwarp();
#pragma unroll 1
          for (int row = 0; row < min(num_rows - half_row, 8); ++row) {
            const float row_lse_log2 = __shfl_sync(0xffffffffu, lse_log2, row * 4);
#pragma unroll
            for (int column = lane * 4; column < kColumns; column += 128) {
              const float4 x = *reinterpret_cast<const float4*>(smem_scratch + row * kScratchRow + column);
              if (is_complete) {
                output.write(tile, half_row + row, group * kColumns + column, x, row_lse_log2);
              } else {
                partials.write(tile.slot, half_row + row, group * kColumns + column, x, row_lse_log2);
              }
            }
          }
        }
        if (!is_complete && tid == 0) smem_run_end.add(tile);
        // Page ids that L1 keeps take room from copies under way, see decode.cu.
        if (!is_complete && !ends_run && partition.quota >= kLongRun && tid == 0) __threadfence();
        state[0] = state[1] = SoftmaxState();
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0.0f;
        __syncwarp();
      }
      if (lane == 0) mbarrier_arrive(empty_at(stage));
      if (++stage == kStages) stage = 0;
    }
  }
  sync_threads<kConsumers>();
  merge_apart<kConsumers>(smem_run_end, ctas, partials, output, reinterpret_cast<float*>(smem_q));
}

#endif

}  // namespace cupyattn
