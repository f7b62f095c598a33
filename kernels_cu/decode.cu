// GQA/MQA/MHA decode attention over a paged KV cache, in one launch.
//
// Grid: as many CTAs as fit on the device (persistent). Each takes an equal, contiguous run of KV tiles
// (schedule.cuh) through a ring of kStages shared-memory tiles; copies run ahead across groups and requests.
// kWarpsQ x kWarpsKV warps work on a tile of 16 * kWarpsQ query rows x kTileKV keys:
//   S = Q K^T   warp (wq, wk) takes 16 rows and its share of the *keys*;
//   S is exchanged through shared memory, so that each warp holds its 16 rows' softmax over all keys;
//   O += P V    warp (wq, wk) takes 16 rows and its share of the *head dimension*.
// So a warp ends with finished columns of O: nothing is left to merge inside the CTA.
// A row of the tile is (query token, query head of the group): row = token * group_size + head.

#include "cupyattn/cp_async.cuh"
#include "cupyattn/divide.cuh"
#include "cupyattn/mma.cuh"
#include "cupyattn/paged.cuh"
#include "cupyattn/schedule.cuh"
#include "cupyattn/state.cuh"
#include "cupyattn/tile.cuh"

namespace cupyattn {

// tanh through exp2: 1 - 2 / (1 + e^2x). tanh.approx would cost 2^-11 of the cap, too much for fp16 output.
__device__ __forceinline__ float tanh_accurate(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(fminf(2.0f * kLog2E * x, 126.0f)));
}

// Adds, releases what this thread has seen written (its CTA's writes too, after a barrier), acquires what
// other adders have released.
__device__ __forceinline__ u32 atomic_add_acq_rel(u32* gmem, u32 value) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(gmem), "r"(value)
               : "memory");
  return old;
}

template <typename T>
__device__ __forceinline__ void store4(T* gmem, const float4& x) {
  *reinterpret_cast<uint2*>(gmem) = make_uint2(pack2<T>(x.x, x.y), pack2<T>(x.z, x.w));
}

// Merges partial states of each row, in order. Partial j is row `slot_row(j) + row` of the partials. They
// come from other SMs: __ldcg reads L2, where they are; L1 could hold an older launch's. `write` may replace
// the columns of `partial_out` that its thread has read, but not `partial_lse`, which other threads read too.
template <int kHeadDim, int kThreads, typename SlotRow, typename Write>
__device__ __forceinline__ void merge_partials(const float* partial_out, const float* partial_lse,
                                               int num_partials, int num_rows, SlotRow slot_row,
                                               Write write) {
  constexpr int kVecs = kHeadDim / 4;
  constexpr int kInFlight = 8;  // partials that one round trip to L2 brings
#pragma unroll 1
  for (int i = threadIdx.x; i < num_rows * kVecs; i += kThreads) {
    const int row = i / kVecs;
    const int dim = i % kVecs * 4;
    SoftmaxState state;
    float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int first = 0; first < num_partials; first += kInFlight) {
      float lse[kInFlight];
      float4 value[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        lse[j] = neg_infinity();
        value[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + j < num_partials) {
          const int at = slot_row(first + j) + row;
          lse[j] = __ldcg(partial_lse + at);
          value[j] = __ldcg(reinterpret_cast<const float4*>(partial_out + at * kHeadDim + dim));
        }
      }
      float lse_max = lse[0];
#pragma unroll
      for (int j = 1; j < kInFlight; ++j) lse_max = fmaxf(lse_max, lse[j]);
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
    const float inverse = state.inverse_sum();
    acc.x *= inverse, acc.y *= inverse, acc.z *= inverse, acc.w *= inverse;
    write(row, dim, acc, state.lse_log2());
  }
}

// clang-format off
template <typename T, int kHeadDim, int kWarpsQ, int kWarpsKV, int kTileKV, int kStages, int kCtasPerSM>
__global__ void __launch_bounds__(32 * kWarpsQ * kWarpsKV, kCtasPerSM)
    decode_kernel(const T* __restrict__ q,              // [num_tokens, num_qo_heads, head_dim], strided
                  const T* __restrict__ k_pages,        // paged, PageStrides
                  const T* __restrict__ v_pages,        // paged, PageStrides
                  const int* __restrict__ qo_indptr,    // [batch_size + 1] or null
                  const int* __restrict__ kv_indptr,    // [batch_size + 1] or null
                  const int* __restrict__ kv_indices,   // page ids
                  const int* __restrict__ kv_lens,      // [batch_size]
                  T* __restrict__ out,                  // as q
                  float* __restrict__ lse,              // [num_tokens, num_qo_heads] or null, natural log
                  float* partial_out,                   // [2 * num CTAs, kTileQ, head_dim]
                  float* partial_lse,                   // [kMaxLevels, 2 * num CTAs, kTileQ], base 2
                  u32* __restrict__ arrival_counters,   // [kMaxLevels, 2 * num CTAs], 0 between launches
                  i64 q_stride_token, i64 q_stride_head,
                  i64 k_stride_page, i64 k_stride_token, i64 k_stride_head,
                  i64 v_stride_page, i64 v_stride_token, i64 v_stride_head,
                  i64 out_stride_token, i64 out_stride_head,
                  i64 lse_stride_token, i64 lse_stride_head,
                  int batch_size, int num_kv_heads,
                  int group_size, u32 group_multiplier, int group_shift,  // Divisor
                  int page_size, u32 page_multiplier, int page_shift,     // Divisor
                  int table_row_stride,
                  int num_table_entries,                // of kv_indices, to prefetch
                  int window_left,                      // -1: unbounded
                  float sm_scale,
                  float logits_soft_cap) {              // 0: none
  // clang-format on
  constexpr int kThreads = 32 * kWarpsQ * kWarpsKV;
  constexpr int kTileQ = 16 * kWarpsQ;
  constexpr int kKeysPerWarp = kTileKV / kWarpsKV;
  constexpr int kKeyTiles = kTileKV / 8;  // 8 keys: one B operand
  constexpr int kOwnKeyTiles = kKeysPerWarp / 8;
  constexpr int kDimSteps = kHeadDim / 16;  // 16 of head_dim: one k-step of QK^T, two n-tiles of PV
  constexpr int kOwnDimSteps = ceil_div(kDimSteps, kWarpsKV);
  constexpr int kFanIn = 24;  // partials that a node takes: 2 levels for 576 CTAs
  static_assert(kHeadDim % 16 == 0 && kKeysPerWarp % 16 == 0, "a warp works on 16 x 16 blocks");
  static_assert(kThreads >= 2 * kTileKV, "a thread finds the place of one K or one V row");
  static_assert(kStages >= 2, "one tile is read while another is filled");
  using Layout = TileLayout<kHeadDim>;

  const Divisor group{group_size, group_multiplier, group_shift};
  const Divisor page{page_size, page_multiplier, page_shift};
  const Problem problem{qo_indptr, kv_lens, batch_size, num_kv_heads, group, window_left};
  const PageTable pages{kv_indptr, kv_indices, kv_lens, table_row_stride, page_size};
  const PageStrides k_strides{k_stride_page, k_stride_token, k_stride_head};
  const PageStrides v_strides{v_stride_page, v_stride_token, v_stride_head};

  constexpr int kTileBytes = kTileKV * Layout::kRowBytes;
  constexpr int kExchangeBytes = kWarpsKV > 1 ? kWarpsQ * kKeyTiles * 2 * 32 * 8 : 0;
  // A capped logit is cap * tanh(s * sm_scale / cap); both kinds are scaled to base 2.
  const float logit_scale = logits_soft_cap > 0.0f ? sm_scale / logits_soft_cap : sm_scale * kLog2E;
  const float soft_cap_log2 = logits_soft_cap * kLog2E;

  extern __shared__ __align__(128) unsigned char smem[];
  unsigned char* smem_kv = smem;  // [kStages][K, V] tiles
  float2* smem_s =
      reinterpret_cast<float2*>(smem_kv + kStages * 2 * kTileBytes);  // [kWarpsQ][key tile][half][lane]
  const T** smem_rows =
      reinterpret_cast<const T**>(smem_kv + kStages * 2 * kTileBytes + kExchangeBytes);  // [2][K, V][kTileKV]
  unsigned char* smem_q = reinterpret_cast<unsigned char*>(smem_rows + 2 * 2 * kTileKV);  // [kTileQ] rows
  __shared__ u32 smem_is_last;

  const int tid = threadIdx.x;
  const int lane = tid % 32;
  const int warp_q = tid / 32 / kWarpsKV;
  const int warp_kv = tid / 32 % kWarpsKV;
  const int quad_row = lane / 4;      // g of mma.cuh
  const int quad_col = lane % 4 * 2;  // 2t of mma.cuh

  // The chain lengths -> offsets -> page ids -> keys is what a small batch waits for. All CTAs together ask
  // for offsets and page ids at once, so that they are in L2 when the lengths have come from DRAM.
  constexpr int kLine = 32;  // entries of a 128-byte line
  const i64 prefetch_entry = (static_cast<i64>(blockIdx.x) * kThreads + tid) * kLine;
  if (prefetch_entry < num_table_entries) prefetch_l2(kv_indices + prefetch_entry);
  if (kv_indptr != nullptr && tid * kLine <= batch_size) prefetch_l2(kv_indptr + tid * kLine);

  Cursor<kTileKV, kTileQ> load;  // runs kStages - 1 tiles ahead of `use`
  Partition partition;
  if (!begin_run<kThreads>(problem, load, partition)) return;
  Cursor<kTileKV, kTileQ> use = load;

  // --- Producer: a row's address is found one tile before its copy starts. ---
  // Threads 0 .. kTileKV - 1 find K rows, the next kTileKV V rows.
  const auto q_row_of = [&](const Request<kTileKV, kTileQ>& request, int kv_head, int row) {
    const int token_in_request = group.divide(row);
    const int token = request.qo_begin + token_in_request;
    const int head = kv_head * group_size + group.modulo(row, token_in_request);
    return token * q_stride_token + head * q_stride_head;
  };
  const auto keys_left = [&]() { return load.done() ? 0 : load.request.kv_len - load.token_begin(); };

  const bool finds_v = tid / kTileKV == 1;
  int found_page;
  int found_token;
  const auto find_row = [&]() {  // starts the read of the page table
    if (tid >= 2 * kTileKV || tid % kTileKV >= keys_left()) return;
    const int token = load.token_begin() + tid % kTileKV;
    const int entry = page.divide(token);
    found_page = static_cast<int>(load_early(pages.pages_of(load.request_idx) + entry));
    found_token = page.modulo(token, entry);
  };
  const auto store_row = [&](int slot) {  // waits for it
    if (tid >= 2 * kTileKV || tid % kTileKV >= keys_left()) return;
    smem_rows[slot * 2 * kTileKV + tid] =
        finds_v ? v_pages + v_strides.offset(found_page, found_token, load.kv_head)
                : k_pages + k_strides.offset(found_page, found_token, load.kv_head);
  };
  const u64 policy = evict_first_policy();
  const auto copy_tile = [&](int stage, int slot) {
    constexpr int kChunks = kTileKV * Layout::kRowChunks;
    static_assert(kChunks % kThreads == 0, "every thread copies as many chunks");
    const u32 smem_tile = smem_address_of(smem_kv) + stage * 2 * kTileBytes;
    const int num_keys = keys_left();
#pragma unroll
    for (int kv = 0; kv < 2; ++kv) {
      const T* const* rows = smem_rows + (slot * 2 + kv) * kTileKV;
#pragma unroll
      for (int i = 0; i < kChunks / kThreads; ++i) {
        const int row = (tid + i * kThreads) / Layout::kRowChunks;
        const int chunk = (tid + i * kThreads) % Layout::kRowChunks;
        // Keys past the end read nothing and become zeros: what lies there may be NaN, and 0 * NaN leaks.
        const bool exists = row < num_keys;
        const T* source = exists ? rows[row] + chunk * 8 : k_pages;
        cp_async_16(smem_tile + kv * kTileBytes + Layout::offset(row, chunk), source, exists, policy);
      }
    }
  };
  const auto prefetch_q = [&]() {  // so that `begin_segment` finds its queries in L2
    const int row = load.q_tile * kTileQ + tid;
    if (tid < kTileQ && row < load.request.qo_len * group_size) {
      prefetch_l2(q + q_row_of(load.request, load.kv_head, row));
    }
  };

  // --- Consumer ---
  float acc[kOwnDimSteps][2][4];
  SoftmaxState state[2];  // rows quad_row and quad_row + 8; `sum` over this thread's columns only
  int kv_max[2];          // last key that the row sees
  // Not kept in registers: cheap to find again, and head_dim 256 has none left.
  const auto num_rows = [&]() { return min(use.request.qo_len * group_size - use.q_tile * kTileQ, kTileQ); };
  const auto kv_max_of = [&](int row) { return use.request.kv_len - use.request.qo_len + group.divide(row); };

  // Reads a segment's queries, once all warps are done with the last segment's. Called before the copy of the next tile starts: behind that in the memory
  // system's queues, they would take microseconds.
  const auto begin_segment = [&]() {
    const int total_rows = use.request.qo_len * group_size;
    const int first_row = use.q_tile * kTileQ;
    constexpr int kChunks = 16 * Layout::kRowChunks;  // of the rows that kWarpsKV warps share
#pragma unroll
    for (int i = 0; i < ceil_div(kChunks, 32 * kWarpsKV); ++i) {
      const int at = i * 32 * kWarpsKV + warp_kv * 32 + lane;
      if (kChunks % (32 * kWarpsKV) != 0 && at >= kChunks) break;
      const int row = warp_q * 16 + at / Layout::kRowChunks;
      const int chunk = at % Layout::kRowChunks;
      uint4 value = make_uint4(0, 0, 0, 0);  // rows that do not exist
      if (first_row + row < total_rows) {
        value = load_early_16(q + q_row_of(use.request, use.kv_head, first_row + row) + chunk * 8);
      }
      *reinterpret_cast<uint4*>(smem_q + Layout::offset(row, chunk)) = value;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      kv_max[half] = kv_max_of(min(first_row + warp_q * 16 + quad_row + half * 8, total_rows - 1));
      state[half] = SoftmaxState();
    }
#pragma unroll
    for (int step = 0; step < kOwnDimSteps; ++step)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[step][n][i] = 0.0f;
  };

  bool segment_begins = true;
  find_row();
  // The first kStages - 1 rounds only start copies.
#pragma unroll 1
  for (int round = 1 - kStages, load_stage = 0, use_stage = 0, slot = 0; !use.done(); ++round, slot ^= 1) {
    if (segment_begins) begin_segment();
    segment_begins = false;
    store_row(slot);
    if (round >= 0) cp_async_wait<kStages - 2>();
    __syncthreads();  // the tile has landed; the stage read last is free; the rows in `slot` are there

    if (!load.done()) {
      copy_tile(load_stage, slot);
      if (load.advance(problem) && !load.done()) prefetch_q();
      if (++load_stage == kStages) load_stage = 0;
    }
    cp_async_commit();
    find_row();
    if (round < 0) continue;

    // S = Q K^T over the warp's own keys.
    const u32 smem_k = smem_address_of(smem_kv) + use_stage * 2 * kTileBytes;
    const u32 smem_v = smem_k + kTileBytes;
    if (++use_stage == kStages) use_stage = 0;
    float s[kKeyTiles][4];  // all keys; the warp's own at first
    {
      float own[kOwnKeyTiles][4];
#pragma unroll
      for (int n = 0; n < kOwnKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) own[n][i] = 0.0f;
#pragma unroll
      for (int step = 0; step < kDimSteps; ++step) {
        u32 q_frag[4];
        ldmatrix_x4(q_frag,
                    smem_address_of(smem_q) + Layout::offset(warp_q * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < kOwnKeyTiles; n += 2) {
          u32 k_frag[4];
          const int row = warp_kv * kKeysPerWarp + n * 8 + lane % 8 + lane / 16 * 8;
          ldmatrix_x4(k_frag, smem_k + Layout::offset(row, step * 2 + lane / 8 % 2));
          mma_m16n8k16<T>(own[n], q_frag, k_frag[0], k_frag[1]);
          mma_m16n8k16<T>(own[n + 1], q_frag, k_frag[2], k_frag[3]);
        }
      }

      // To base-2 logits, with what a row must not see at -inf. Most tiles are seen whole by every row.
      const int tile_begin = use.token_begin();
      const int first_row = use.q_tile * kTileQ;
      const bool all_seen =
          tile_begin + kTileKV - 1 <= kv_max_of(first_row) &&
          (window_left < 0 || tile_begin >= kv_max_of(first_row + num_rows() - 1) - window_left);
      const int token_begin = tile_begin + warp_kv * kKeysPerWarp + quad_col;
#pragma unroll
      for (int n = 0; n < kOwnKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) own[n][i] *= logit_scale;
        if (logits_soft_cap > 0.0f) {
#pragma unroll
          for (int i = 0; i < 4; ++i) own[n][i] = soft_cap_log2 * tanh_accurate(own[n][i]);
        }
        if (!all_seen) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = token_begin + n * 8 + i % 2;
            const int last = kv_max[i / 2];
            if (token > last || (window_left >= 0 && token < last - window_left)) own[n][i] = neg_infinity();
          }
        }
        if constexpr (kWarpsKV > 1) {
          float2* pair = smem_s + ((warp_q * kKeyTiles + warp_kv * kOwnKeyTiles + n) * 2) * 32 + lane;
          pair[0] = make_float2(own[n][0], own[n][1]);
          pair[32] = make_float2(own[n][2], own[n][3]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][i] = own[n][i];
        }
      }
    }
    if constexpr (kWarpsKV > 1) {
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const float2* pair = smem_s + ((warp_q * kKeyTiles + n) * 2) * 32 + lane;
        const float2 low = pair[0];
        const float2 high = pair[32];
        s[n][0] = low.x, s[n][1] = low.y, s[n][2] = high.x, s[n][3] = high.y;
      }
    }

    // Online softmax of the 16 rows.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (kWarpsQ == 1 && half == 1 && num_rows() <= 8) {  // groups of up to 8: half of the work
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) s[n][2] = s[n][3] = 0.0f;
        continue;
      }
      float logit_max = neg_infinity();
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
        logit_max = fmaxf(logit_max, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
      logit_max = fmaxf(logit_max, __shfl_xor_sync(0xffffffffu, logit_max, 1));
      logit_max = fmaxf(logit_max, __shfl_xor_sync(0xffffffffu, logit_max, 2));
      const float factor = state[half].raise(logit_max);
#pragma unroll
      for (int step = 0; step < kOwnDimSteps; ++step)
#pragma unroll
        for (int n = 0; n < 2; ++n) acc[step][n][half * 2] *= factor, acc[step][n][half * 2 + 1] *= factor;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) {
          s[n][i] = state[half].weight(s[n][i]);
          state[half].sum += s[n][i];
        }
    }

    // O += P V over the warp's own dimensions.
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      const u32 p_frag[4] = {pack2<T>(s[n][0], s[n][1]), pack2<T>(s[n][2], s[n][3]),
                             pack2<T>(s[n + 1][0], s[n + 1][1]), pack2<T>(s[n + 1][2], s[n + 1][3])};
#pragma unroll
      for (int i = 0; i < kOwnDimSteps; ++i) {
        const int step = i * kWarpsKV + warp_kv;
        if (kDimSteps % kWarpsKV != 0 && step >= kDimSteps) continue;
        u32 v_frag[4];
        ldmatrix_x4_trans(v_frag, smem_v + Layout::offset(n * 8 + lane % 16, step * 2 + lane / 16));
        mma_m16n8k16<T>(acc[i][0], p_frag, v_frag[0], v_frag[1]);
        mma_m16n8k16<T>(acc[i][1], p_frag, v_frag[2], v_frag[3]);
      }
    }

    if (use.last_of_segment()) {
      const int first_unit = use.unit - use.tile;
      const int last_unit = first_unit + use.request.num_tiles() - 1;
      const int first_cta = partition.cta_of(first_unit);
      const int last_cta = partition.cta_of(last_unit);
      const int cta = blockIdx.x;
      const int kv_head = use.kv_head;
      const int tile_row = use.q_tile * kTileQ;

      struct RowTarget {
        T* out;
        float* lse;  // or null
      };
      const auto out_row = [&](int row) {
        const int token_in_request = group.divide(tile_row + row);
        const int token = use.request.qo_begin + token_in_request;
        const int head = kv_head * group_size + group.modulo(tile_row + row, token_in_request);
        return RowTarget{out + token * out_stride_token + head * out_stride_head,
                         lse != nullptr ? lse + token * lse_stride_token + head * lse_stride_head : nullptr};
      };

      // write(dim, x, y): the pairs of finished columns that this thread holds of one row.
      const auto each_pair = [&](int half, float factor, auto write) {
#pragma unroll
        for (int i = 0; i < kOwnDimSteps; ++i) {
          const int step = i * kWarpsKV + warp_kv;
          if (kDimSteps % kWarpsKV != 0 && step >= kDimSteps) continue;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            write(step * 16 + n * 8 + quad_col, acc[i][n][half * 2] * factor,
                  acc[i][n][half * 2 + 1] * factor);
          }
        }
      };
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        state[half].sum += __shfl_xor_sync(0xffffffffu, state[half].sum, 1);
        state[half].sum += __shfl_xor_sync(0xffffffffu, state[half].sum, 2);
        const int row = warp_q * 16 + quad_row + half * 8;
        if (row >= num_rows()) continue;
        const bool writes_lse = warp_kv == 0 && quad_col == 0;
        if (first_cta == last_cta) {
          const RowTarget target = out_row(row);
          each_pair(half, state[half].inverse_sum(), [&](int dim, float x, float y) {
            *reinterpret_cast<u32*>(target.out + dim) = pack2<T>(x, y);
          });
          if (writes_lse && target.lse != nullptr) *target.lse = state[half].lse_log2() * kLn2;
        } else {
          const int at = (2 * cta + (cta == first_cta)) * kTileQ + row;
          each_pair(half, state[half].inverse_sum(), [&](int dim, float x, float y) {
            *reinterpret_cast<float2*>(partial_out + at * kHeadDim + dim) = make_float2(x, y);
          });
          if (writes_lse) partial_lse[at] = state[half].lse_log2();
        }
      }

      // A tree of merges, kFanIn partials a node. Whoever arrives last at a node merges it into its first
      // partial's slot and goes on to the next level; the root writes the result.
      int level = 0;
#pragma unroll 1
      for (int stride = 1; stride <= last_cta - first_cta; stride *= kFanIn, ++level) {
        const int node_cta = first_cta + (cta - first_cta) / (stride * kFanIn) * (stride * kFanIn);
        const int num_partials = min(ceil_div(last_cta + 1 - node_cta, stride), kFanIn);
        const auto slot_of = [&](int j) {
          return 2 * (node_cta + j * stride) + (node_cta + j * stride == first_cta);
        };
        u32* counter = arrival_counters + level * 2 * gridDim.x + slot_of(0);
        __syncthreads();  // all of the CTA's partial is written before thread 0 says so
        if (tid == 0) smem_is_last = atomic_add_acq_rel(counter, 1u) == static_cast<u32>(num_partials - 1);
        __syncthreads();
        if (!smem_is_last) break;
        if (tid == 0) *counter = 0;
        const bool is_root = last_cta - first_cta < stride * kFanIn;
        const int level_rows = 2 * gridDim.x * kTileQ;
        merge_partials<kHeadDim, kThreads>(
            partial_out, partial_lse + level * level_rows, num_partials, num_rows(),
            [&](int j) { return slot_of(j) * kTileQ; },
            [&](int row, int dim, const float4& value, float row_lse) {
              if (is_root) {
                const RowTarget target = out_row(row);
                store4(target.out + dim, value);
                if (dim == 0 && target.lse != nullptr) *target.lse = row_lse * kLn2;
              } else {
                const int at = slot_of(0) * kTileQ + row;
                *reinterpret_cast<float4*>(partial_out + at * kHeadDim + dim) = value;
                if (dim == 0) partial_lse[(level + 1) * level_rows + at] = row_lse;
              }
            });
      }
      segment_begins = true;
    }
    use.advance(problem);
  }
}

}  // namespace cupyattn
