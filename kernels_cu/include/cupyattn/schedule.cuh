// How the work of one decode step is dealt out: one contiguous run of KV tiles a CTA, of equal length but for the last (and
// where groups start runs, see below).
//
// A *group* is what shares one read of the keys: (request, KV head, tile of query rows). Its keys are cut
// into tiles of kTileKV tokens. All tiles of all groups, in that order, form one line of units, which is cut
// into runs, equal but for the last. So one long request beside many short ones costs the same per byte as equal ones, and
// nothing but lengths on the device is needed to know who does what. (decode's KV heads may come in parts, each of which
// has a line and CTAs for itself; here, they are taken for all there are.)
//
//     group 0        group 1  group 2
//     [t t t t t t t][t t t t][t t t t t t t]      7 + 4 + 7 = 18 units on 4 CTAs: 5 + 5 + 5 + 3
//      CTA 0    | CTA 1   | CTA 2   | CTA 3
//
// A group inside one run is finished there. A group over several runs leaves one partial state a run, which
// partials.cuh merges. A run has at most two partial states: one of the group that it enters halfway (slot 2 * cta),
// one of the group that it leaves halfway (slot 2 * cta + 1).
//
// So where a request is cut depends on its neighbours, and with that its rounding. With *fixed splits* it does not:
// units are splits of 2^unit_shift tiles, every split of a group that has several leaves a partial state (its slot is
// its place on the line), and runs are of whole splits.
//
// Groups of one request follow each other: by KV head, then by query tile. Where a request's query tiles read the same
// keys and memory is the limit (kQTilesOutermost), all requests' first query tiles come first, then all second ones.
// Where all requests have as many, the line is cut in as many equal *parts*, and each part alike into runs: then CTAs
// that read the same keys do so at the same time, and L2 has them for all but one. (Six tiles of 64 keys apart would be too
// far: 132 CTAs read 58 MB meanwhile.)
//
// MLA's partial states, of 512 columns, cost as much as several tiles. So there (kQTilesOutermost too), where all groups
// have as many tiles, runs are of whole groups if those are few more tiles than equal runs would be: 128 groups of 64
// tiles on 132 CTAs are 128 runs of 64, not 130 of 63 and one of 2.
//
// A group's queries and states cost something, too. For that, groups may have units before those of their tiles: those
// of a cascade, of which a run in a prefix has one and a run in requests' own keys many
// (CascadeProblem::group_overhead), and those of requests that differ, of which a run in a long one has one and a run
// in short ones several (UnevenProblem; of a cascade, Levels::uneven_overhead). Or, of a few requests that differ, and
// where there are CTAs enough, each group starts a run, and none has tiles of two; on the line, each then takes the room
// of whole runs:
//
//     [t t t t t][t t      ][t t t t  ][t t t t t][t t      ]      the groups from above on 5 CTAs
//
// Units are counted in 32 bits: a step of up to kMostUnits tiles (1 M keys x 128 KV heads x 1000 requests).
// Every group has at least one tile, so that a request without keys still gets its out = 0, lse = -inf.
#pragma once

#include "cupyattn/cp_async.cuh"
#include "cupyattn/divide.cuh"
#include "cupyattn/launch.cuh"
#include "cupyattn/paged.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

constexpr u32 kMostUnits = 0x7fffffff;
constexpr int kMostKeys = 1 << 20;  // that are believed of a request before the kernel before is done

// What of a step decides the work: the same on every CTA. What follows takes a cascade's too (cascade.cuh), where
// requests are the groups of all levels.
struct Problem {
  static constexpr bool kIsCascade = false;
  static constexpr int group_overhead = 0;     // see CascadeProblem
  static constexpr bool kMayBeUneven = false;  // see UnevenProblem
  static constexpr bool kMayStartRuns = false;

  PageTable pages;
  int num_table_entries;  // of kv_indices, to prefetch, and to be guessed from
  const int* qo_indptr;   // [batch_size + 1], or null: one query token a request
  const int* kv_lens;     // [batch_size]
  int batch_size;
  int num_kv_heads;
  Divisor group_size;  // query heads per KV head
  int window_left;     // keys before a query's own that it sees; -1: all
  // With fixed splits only:
  int unit_shift;  // log2 of a split's tiles
  int max_splits;  // that there is memory for
  // What begin_run has read of the requests, in shared memory. Later, what a CTA reads from memory waits behind the
  // copies that its SM has been asked for, for microseconds.
  struct alignas(16) Note {
    int qo_begin, qo_len, kv_len;
    int first_entry;  // of kv_indices, if there is kv_indptr
  };
  Note* notes;
  int num_notes;  // that there is room for; 0 if that is not for all requests

  template <bool kFromL2 = false>
  __device__ __forceinline__ void read(int b, int& qo_begin, int& qo_len, int& kv_len) const {
    qo_begin = qo_indptr != nullptr ? load<kFromL2>(qo_indptr + b) : b;
    qo_len = qo_indptr != nullptr ? load<kFromL2>(qo_indptr + b + 1) - qo_begin : 1;
    kv_len = max(load<kFromL2>(kv_lens + b), 0);
  }
  template <bool kFromL2 = false>
  __device__ __forceinline__ const int* pages_of(int b) const {
    return pages.pages_of<kFromL2>(b);
  }
  // Asks L2 for what begin_run reads first, and for all page ids: `num_table_entries` lie in one piece. Nothing is read,
  // so the kernel before may still be writing it.
  template <int kThreads>
  __device__ __forceinline__ void prefetch() const {
    constexpr int kLine = 32;  // entries of a 128-byte line
    const i64 entry = (static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x) * kLine;
    if (entry < num_table_entries) prefetch_l2(pages.kv_indices + entry);
    if (threadIdx.x < batch_size) {
      prefetch_l2(kv_lens + threadIdx.x);
      if (pages.kv_indptr != nullptr) prefetch_l2(pages.kv_indptr + threadIdx.x);
      if (qo_indptr != nullptr) prefetch_l2(qo_indptr + threadIdx.x);
    }
  }
  // For guess_run: whether there is no more than one request a thread, and sums of up to 2^16 tiles each fit into 32 bits;
  // whether a request may be what memory says; whether an entry of its table may be looked at.
  template <int kThreads, int kTileQ>
  __device__ __forceinline__ bool can_be_guessed() const {
    return batch_size <= min(kThreads, 128) && qo_indptr == nullptr && num_kv_heads * group_size.value < 256;
  }
  template <typename Request>
  __device__ __forceinline__ bool is_likely(const Request& request) const {
    return request.kv_len <= kMostKeys;
  }
  __device__ __forceinline__ bool has_entry(int b, const int* entry) const {
    return static_cast<u64>(entry - pages.kv_indices) < num_table_entries;
  }
  // Whether begin_run writes what the kernel before may still read.
  __device__ __forceinline__ bool writes_first() const { return false; }
  // Where a query token lies in `q` and `out`.
  __device__ __forceinline__ int row_of(int token) const { return token; }
  // What is written down of requests b .. end_b - 1 of this thread: the first one, with its page ids; the others; then,
  // where the first of them begins on the line, which is for cascades.
  template <typename Request>
  __device__ __forceinline__ void note(int b, const Request& request, const int* pages_of_request) const {
    if (b >= num_notes) return;
    notes[b] = {request.qo_begin, request.qo_len, request.kv_len,
                static_cast<int>(pages_of_request - pages.kv_indices)};
  }
  template <typename Request>
  __device__ __forceinline__ void note(int b, const Request& request) const {}
  template <typename Request>
  __device__ __forceinline__ void place(int b, int end_b, int unit) const {}
  __device__ __forceinline__ bool is_noted(int b) const { return b < num_notes; }
  // Whether advance() needs nothing from memory.
  __device__ __forceinline__ bool has_notes() const { return num_notes > 0; }
  template <typename Request>
  __device__ __forceinline__ Request noted(int b, const int*& pages_of_request) const {
    const Note note = notes[b];
    pages_of_request = pages.kv_indptr != nullptr ? pages.kv_indices + note.first_entry : pages.pages_of(b);
    return Request(note.qo_begin, note.qo_len, note.kv_len, window_left);
  }
};

// The same where not all requests need have as many tiles. If they have not, a group counts for up to `kMost` tiles
// more, or, as begin_run knows with Traits, `kMostOfOne` where each request's rows are one tile's; half of a
// run's at most; without kLengthensRuns, only if runs are no longer for it, as the last one is shorter than the others. With
// kStartsRuns each group starts a run instead, of no more requests than a CTA has threads, where runs would have tiles of
// two, and there are CTAs enough for runs as long as if groups counted for `kMost`, or for as much again as they have,
// whichever is less.
template <int kMost, bool kLengthensRuns, int kMostOfOne = kMost, bool kStartsRuns = false>
struct UnevenProblem : Problem {
  static constexpr bool kMayBeUneven = true;
  static constexpr bool kMayStartRuns = kStartsRuns;
  int group_overhead;  // as CascadeProblem's, but found by begin_run

  static __device__ __forceinline__ int most_overhead(int num_q_tiles) {
    return num_q_tiles == 1 ? kMostOfOne : kMost;
  }
  // Of `num_groups` groups and `total` tiles, in runs of `quota`.
  static __device__ __forceinline__ int overhead_of(int num_groups, int num_q_tiles, int total, int quota,
                                                    int max_ctas) {
    const int overhead = min(most_overhead(num_q_tiles), quota / 2);
    const u32 most = kLengthensRuns ? kMostUnits : min(static_cast<u32>(quota) * max_ctas, kMostUnits);
    return static_cast<u64>(num_groups) * overhead <= most - total ? overhead : 0;
  }
};

// One request's share of the line.
template <int kTileKV, int kTileQ, bool kFixedSplits>
struct Request {
  int qo_begin;  // first query token
  int qo_len;    // query tokens
  int kv_begin;  // first key that any of them sees
  int kv_len;    // keys, the query tokens' own included

  __device__ __forceinline__ Request() {}
  __device__ __forceinline__ Request(int qo_begin, int qo_len, int kv_len, int window_left)
      : qo_begin(qo_begin), qo_len(qo_len), kv_len(kv_len) {
    find_begin(window_left);
  }
  template <typename Problem, bool kFromL2 = false>
  __device__ __forceinline__ Request(const Problem& problem, int b, Bool<kFromL2> = {}) {
    problem.template read<kFromL2>(b, qo_begin, qo_len, kv_len);
    find_begin(problem.window_left);
  }
  __device__ __forceinline__ void find_begin(int window_left) {
    kv_begin = window_left < 0 ? 0 : max(max(kv_len - qo_len, 0) - window_left, 0);
  }
  // Computed where they are needed: registers are scarcer than instructions.
  __device__ __forceinline__ int num_tiles() const { return max(ceil_div(kv_len - kv_begin, kTileKV), 1); }
  template <typename Problem>
  __device__ __forceinline__ int num_q_tiles(const Problem& problem) const {
    return ceil_div(qo_len * problem.group_size.value, kTileQ);
  }
  template <typename Problem>
  __device__ __forceinline__ int num_units_in_group(const Problem& problem) const {
    return kFixedSplits ? (num_tiles() - 1 >> problem.unit_shift) + 1 : problem.group_overhead + num_tiles();
  }
  template <typename Problem>
  __device__ __forceinline__ int num_units(const Problem& problem) const {
    return problem.num_kv_heads * num_q_tiles(problem) * num_units_in_group(problem);
  }
};

// The line cut into runs of `quota` units, the last one shorter. Each part alike.
struct Partition {
  int cta;  // this one
  int quota;
  int part_units;
  int num_parts;
  // After number_ctas:
  Reciprocal by_quota;
  int part_ctas;
  int num_ctas;  // of all parts of this line

  __device__ __forceinline__ Partition() {}
  // Runs are equal, so there are no more CTAs than the longest run needs: 1024 units on 264 CTAs are 256 runs of 4.
  // There is less to merge than with 232 of 4 and 32 of 3, and runs of equal groups end where groups do.
  __device__ __forceinline__ Partition(int cta, int part_units, const Reciprocal& part_max_ctas,
                                       int num_parts, int least_quota = 1)
      : cta(cta),
        quota(max(part_max_ctas.divide_up(part_units), least_quota)),
        part_units(part_units),
        num_parts(num_parts) {}
  // Makes runs whole groups of `group_units`, which all have, if they are at most `slack` units longer for that.
  __device__ __forceinline__ void align(int group_units, int slack) {
    const int aligned = static_cast<u32>(quota + group_units - 1) / group_units * group_units;
    if (aligned <= quota + slack) quota = aligned;
  }
  // What is not needed to find the first keys.
  __device__ __forceinline__ void number_ctas() {
    by_quota = Reciprocal(quota);
    part_ctas = by_quota.divide_up(part_units);
    num_ctas = part_ctas * num_parts;
  }
  // Of the line, or with parts, of a CTA's or unit's part.
  __device__ __forceinline__ int begin(int cta) const {
    return min(static_cast<u32>(cta) * quota, static_cast<u32>(part_units));
  }
  // The CTA whose run holds `unit`.
  __device__ __forceinline__ int cta_of(int unit) const { return by_quota.divide(unit); }
};

// Walks one CTA's run, tile by tile, through groups and requests.
template <int kTileKV, int kTileQ, bool kFixedSplits, bool kQTilesOutermost = false>
struct Cursor {
  Request<kTileKV, kTileQ, kFixedSplits> request;
  const int* pages;  // the request's own page ids
  int request_idx;
  int kv_head;
  int q_tile;
  int tile;  // inside the group
  int unit;  // on the line
  int unit_end;

  __device__ __forceinline__ bool done() const { return unit >= unit_end; }
  __device__ __forceinline__ int token_begin() const { return request.kv_begin + tile * kTileKV; }
  template <typename Problem>
  __device__ __forceinline__ int unit_in_group(const Problem& problem) const {
    return kFixedSplits ? tile >> problem.unit_shift : tile;
  }
  template <typename Problem>
  __device__ __forceinline__ bool ends_unit(const Problem& problem) const {
    return !kFixedSplits || tile + 1 == request.num_tiles() ||
           (tile + 1 & (1 << problem.unit_shift) - 1) == 0;
  }
  template <typename Problem>
  __device__ __forceinline__ bool ends_segment(const Problem& problem) const {
    if (kFixedSplits) return ends_unit(problem);
    return tile + 1 == request.num_tiles() || unit + 1 == unit_end;
  }

  // Whether done() once the cursor has advanced.
  template <typename Problem>
  __device__ __forceinline__ bool ends_run(const Problem& problem) const {
    const int overhead = tile + 1 == request.num_tiles() ? problem.group_overhead : 0;
    return unit + ends_unit(problem) + overhead >= unit_end;
  }

  template <typename Problem>
  __device__ __forceinline__ void enter(const Problem& problem, int b) {
    request_idx = b;
    request = Request<kTileKV, kTileQ, kFixedSplits>(problem, b);
    pages = problem.pages_of(b);
  }
  // The same from what has been written down, if it has.
  template <typename Problem>
  __device__ __forceinline__ void enter_noted(const Problem& problem, int b) {
    if (problem.is_noted(b)) {
      request_idx = b;
      request = problem.template noted<Request<kTileKV, kTileQ, kFixedSplits>>(b, pages);
    } else {
      enter(problem, b);
    }
  }

  // To the next tile.
  template <typename Problem>
  __device__ __forceinline__ void advance(const Problem& problem) {
    unit += ends_unit(problem);
    if (++tile < request.num_tiles()) return;
    tile = 0;
    unit += problem.group_overhead;  // the next group's
    if (!kQTilesOutermost) {
      if (++q_tile < request.num_q_tiles(problem)) return;
      q_tile = 0;
    }
    if (++kv_head < problem.num_kv_heads) return;
    kv_head = 0;
    if (done()) return;
    do {  // requests without query tokens, or with fewer tiles of them, have no groups
      const bool wraps = kQTilesOutermost && request_idx + 1 == problem.batch_size;
      if (wraps) ++q_tile;
      enter_noted(problem, wraps ? 0 : request_idx + 1);
    } while (request.num_q_tiles(problem) <= q_tile);
  }
};

// What begin_run must know of all requests, of one or several: bits of one word.
struct Traits {
  static constexpr bool kIsAny = true;
  // Of any request:
  static constexpr u32 kHasMoreQTiles = 1;    // than one
  static constexpr u32 kDiffersInQTiles = 2;  // from the first request
  static constexpr u32 kDiffersInTiles = 4;
  // Of the first one:
  static constexpr int kQTilesShift = 3;
  static constexpr int kMostQTiles = 7;  // stands for more, too
  static constexpr int kTilesShift = 6;  // 2^31 keys are 2^25 tiles
  u32 bits;

  __device__ __forceinline__ int q_tiles() const { return bits >> kQTilesShift & kMostQTiles; }
  __device__ __forceinline__ int tiles() const { return bits >> kTilesShift; }
  static __device__ __forceinline__ Traits of(int num_q_tiles, int num_tiles) {
    return {static_cast<u32>(num_tiles) << kTilesShift | min(num_q_tiles, kMostQTiles) << kQTilesShift |
            (num_q_tiles > 1 ? kHasMoreQTiles : 0)};
  }
  // And of those that `other` says.
  __device__ __forceinline__ void add(const Traits& other) {
    bits |= other.bits & ((1 << kQTilesShift) - 1);
    if (q_tiles() != other.q_tiles()) bits |= kDiffersInQTiles;
    if (tiles() != other.tiles()) bits |= kDiffersInTiles;
  }
  // Those of a warp's threads that have any, as its first one has.
  __device__ __forceinline__ void add_warp(bool has_any) {
    Traits of_warp{__shfl_sync(0xffffffffu, bits, 0)};
    if (has_any) of_warp.add(*this);
    bits = __reduce_or_sync(0xffffffffu, of_warp.bits);
  }
};

// The same of a cascade's requests: how many tiles of their own they have, to powers of two.
struct Sizes {
  static constexpr bool kIsAny = true;
  u32 bits;

  static __device__ __forceinline__ Sizes of(int num_tiles) { return {1u << 31 - __clz(num_tiles)}; }
  __device__ __forceinline__ void add(const Sizes& other) { bits |= other.bits; }
  __device__ __forceinline__ void add_warp(bool) { bits = __reduce_or_sync(0xffffffffu, bits); }
  // Whether one has more than twice as many as another, and surely if it has four times as many.
  __device__ __forceinline__ bool differ() const { return bits != 0 && bits >> 2 >= (bits & 0 - bits); }
};

// Or nothing.
struct Unknown {
  static constexpr bool kIsAny = false;
};

// A word a warp, one place for all who ask for it.
template <int kThreads>
__device__ __forceinline__ int* smem_warp_totals() {
  __shared__ int words[kThreads / 32];
  return words;
}
template <int kThreads>
__device__ __forceinline__ u32* smem_warp_bits() {
  __shared__ u32 words[kThreads / 32];
  return words;
}

// The sum of what this thread and those before it have, and that of all; and what is to be known of all
// requests, of which the first `num_threads` threads have some, and the first thread the first one. All threads must call
// it; what they learn of all is the same.
template <int kThreads, typename Known>
__device__ __forceinline__ int inclusive_sum(int value, int& total, Known& known, int num_threads) {
  int* totals = smem_warp_totals<kThreads>();
  const int tid = threadIdx.x;
  int end = value;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, end, delta);
    if (tid % 32 >= delta) end += other;
  }
  if constexpr (Known::kIsAny) known.add_warp(tid < num_threads);
  if (tid % 32 == 31) {
    totals[tid / 32] = end;
    if constexpr (Known::kIsAny) smem_warp_bits<kThreads>()[tid / 32] = known.bits;
  }
  __syncthreads();
  total = 0;
  if constexpr (Known::kIsAny) known.bits = smem_warp_bits<kThreads>()[0];
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < tid / 32) end += totals[w];
    total += totals[w];
    if constexpr (Known::kIsAny) {
      if (w * 32 < num_threads) known.add(Known{smem_warp_bits<kThreads>()[w]});
    }
  }
  return end;
}

// What a thread of begin_run reads of the first of its requests; `from_l2`: by no way through L1.
template <typename OneRequest>
struct OwnRequest {
  OneRequest request;
  const int* pages;

  template <int kThreads, typename Problem>
  __device__ __forceinline__ OwnRequest(const Problem& problem, Int<kThreads>, bool from_l2)
      : request(0, 0, 0, -1), pages(nullptr) {
    const int b = threadIdx.x * ceil_div(problem.batch_size, kThreads);
    if (b >= problem.batch_size) return;
    if (from_l2) {
      request = OneRequest(problem, b, Bool<true>());
      pages = problem.template pages_of<true>(b);
    } else {
      request = OneRequest(problem, b);
      pages = problem.pages_of(b);
    }
  }
  __device__ __forceinline__ bool is(const OwnRequest& other) const {
    return request.qo_begin == other.request.qo_begin && request.qo_len == other.request.qo_len &&
           request.kv_len == other.request.kv_len && pages == other.pages;
  }
};

// The place on the line of CTA `cta` of `max_ctas` (`in_pairs`: of clusters of two, whose CTAs get the same run of two
// parts if there is an even number of these); all its threads must call it. False where the line is too short to
// reach it.
// Thread i adds up the units of requests i * stride .. (i + 1) * stride - 1; the one in whose share the run
// begins tells the others where that is. What it says, it has loaded with the lengths (`own`): for up to kThreads
// requests there is one round trip to memory. What can be known before the lengths or the sum, is.
template <int kThreads, int kTileKV, int kTileQ, bool kFixedSplits, bool kQTilesOutermost, typename Problem>
__device__ __forceinline__ bool begin_run(Problem& problem,
                                          const OwnRequest<Request<kTileKV, kTileQ, kFixedSplits>>& own,
                                          Cursor<kTileKV, kTileQ, kFixedSplits, kQTilesOutermost>& cursor,
                                          Partition& partition, bool in_pairs, int cta, int max_ctas) {
  __shared__ Cursor<kTileKV, kTileQ, kFixedSplits, kQTilesOutermost> smem_cursor;
  __shared__ int smem_first_units;  // of the first request
  using OneRequest = Request<kTileKV, kTileQ, kFixedSplits>;
  const Reciprocal by_max_ctas(max_ctas);
  const int stride = ceil_div(problem.batch_size, kThreads);
  const int first_request = threadIdx.x * stride;
  const int end_request = min(first_request + stride, problem.batch_size);

  constexpr int kMaxParts = 4;  // of more, some CTAs would have nothing to do
  static_assert(kMaxParts < Traits::kMostQTiles);
  const auto traits_of = [&](const OneRequest& request) {
    return Traits::of(request.num_q_tiles(problem), request.num_tiles());
  };
  Traits traits = Traits::of(0, 1);
  if constexpr (Problem::kMayBeUneven) problem.group_overhead = 0;
  // With them it is known how many groups requests have; without offsets it is anyway. (What finds that out makes small
  // steps 2% slower, and is worth it where groups may start runs.)
  bool has_traits = kQTilesOutermost;
  if constexpr (Problem::kMayStartRuns && !kQTilesOutermost) has_traits = problem.qo_indptr != nullptr;
  Sizes sizes;
  if constexpr (Problem::kIsCascade) problem.group_overhead = problem.levels.group_overhead;
  const int num_threads = ceil_div(problem.batch_size, max(stride, 1));  // that have requests
  Reciprocal by_group_units(1);
  int units, end, total;
#pragma unroll 1
  while (true) {
    units = 0;
    sizes.bits = 0;
    if (first_request < end_request) {
      cursor.request_idx = first_request;
      cursor.request = own.request;
      cursor.pages = own.pages;
      units = cursor.request.num_units(problem);
      if (has_traits) traits = traits_of(cursor.request);
      if constexpr (Problem::kIsCascade) problem.add_size(sizes, first_request, cursor.request);
      problem.note(first_request, cursor.request, cursor.pages);
      by_group_units = Reciprocal(cursor.request.num_units_in_group(problem));
      if (Problem::kMayBeUneven && threadIdx.x == 0) smem_first_units = units;
    }
#pragma unroll 1
    for (int b = first_request + 1; b < end_request; ++b) {
      const OneRequest request(problem, b);
      units += request.num_units(problem);
      if (has_traits) traits.add(traits_of(request));
      if constexpr (Problem::kIsCascade) problem.add_size(sizes, b, request);
      problem.note(b, request);
    }
    if (has_traits) {
      end = inclusive_sum<kThreads>(units, total, traits, num_threads);
    } else if constexpr (Problem::kIsCascade) {
      end = inclusive_sum<kThreads>(units, total, sizes, num_threads);
      if (problem.weighs_more(sizes)) {
        __syncthreads();  // the totals have been read
        continue;
      }
    } else {
      Unknown none;
      end = inclusive_sum<kThreads>(units, total, none, num_threads);
    }
    break;
  }
  problem.template place<OneRequest>(first_request, end_request, end - units);
  if (kFixedSplits && total > problem.max_splits) __trap();  // rather than to write past the workspace
  bool has_more_q_tiles = kQTilesOutermost && (traits.bits & Traits::kHasMoreQTiles) != 0;
  const int num_q_tiles = traits.q_tiles();
  const bool in_parts = has_more_q_tiles && (traits.bits & Traits::kDiffersInQTiles) == 0 &&
                        num_q_tiles <= min(kMaxParts, max_ctas);
  if (in_parts) has_more_q_tiles = false;
  // The line, if it had `more` units.
  const auto cut = [&](int more = 0, int least_quota = 1) {
    partition = in_parts ? Partition(cta, static_cast<u32>(total + more) / static_cast<u32>(num_q_tiles),
                                     Reciprocal(max_ctas / num_q_tiles), num_q_tiles, least_quota)
                         : Partition(cta, total + more, by_max_ctas, 1,
                                     problem.group_overhead + least_quota);  // every run has a tile
  };
  cut();
  if (kQTilesOutermost && (traits.bits & Traits::kDiffersInTiles) == 0) {
    // About what a CTA's partial states cost; in a long run, whole groups are read somewhat faster too.
    partition.align(traits.tiles(), 4 + partition.quota / 32);
  }
  bool starts_runs = false;  // each group
  if constexpr (Problem::kMayBeUneven) {
    // If all requests have as many groups: then it is known how many come before. Without kQTilesOutermost, those of which
    // the first has as many tiles as there are on average are taken for equal.
    int groups = problem.num_kv_heads;
    bool is_uneven = has_traits || problem.qo_indptr == nullptr;
    if (has_traits) {
      groups *= num_q_tiles;
      is_uneven = (traits.bits & Traits::kDiffersInQTiles) == 0 && num_q_tiles < Traits::kMostQTiles;
    } else {
      groups *= OneRequest(0, 1, 0, -1).num_q_tiles(problem);
    }
    if constexpr (kQTilesOutermost) {
      is_uneven = is_uneven && (traits.bits & Traits::kDiffersInTiles) != 0;
    } else {
      is_uneven = is_uneven && static_cast<u32>(smem_first_units) * problem.batch_size != total;
    }
    if (is_uneven) {
      const int num_groups = problem.batch_size * groups;
      const u32 overhead = problem.overhead_of(num_groups, num_q_tiles, total, partition.quota, max_ctas);
      if constexpr (Problem::kMayStartRuns) {
        static_assert(!kFixedSplits);
        const int num_parts = in_parts ? num_q_tiles : 1;
        const u32 most_runs = max_ctas / num_parts * num_parts;
        // Whether runs would be long enough for tiles of two groups.
        const bool are_mixed =
            total + static_cast<u64>(num_groups) * overhead > static_cast<u64>(most_runs) * (overhead + 1);
        // All that groups cost, or what their tiles do.
        const u64 cost = static_cast<u64>(num_groups) * problem.most_overhead(num_q_tiles);
        const int more = min(cost, static_cast<u64>(total));
        const bool are_counted = static_cast<u64>(total) + more + max_ctas <= kMostUnits;  // whole runs, too
        if (are_mixed && stride == 1 && !has_more_q_tiles && are_counted) {
          const Partition equal = partition;
          cut(more);
          const int quota = partition.quota;
          const int tiles = first_request < end_request ? cursor.request.num_tiles() : 0;
          const int runs = Reciprocal(quota).divide_up(tiles);  // of a group
          int all_runs;
          Unknown none;
          __syncthreads();  // the totals have been read
          const int end_run = inclusive_sum<kThreads>(runs * groups, all_runs, none, num_threads);
          starts_runs = all_runs <= most_runs;
          if (starts_runs) {
            // A group takes the room of whole runs, of which the last one ends with its tiles (unit_end, below).
            units = runs * groups * quota;
            end = end_run * quota;
            total = all_runs * quota;
            by_group_units = Reciprocal(runs * quota);
            cut(0, quota);
          } else {
            partition = equal;
          }
        }
      }
      if (!starts_runs) {
        problem.group_overhead = overhead;
        units += max(end_request - first_request, 0) * groups * problem.group_overhead;
        end += end_request * groups * problem.group_overhead;
        total += num_groups * problem.group_overhead;
        by_group_units = Reciprocal(by_group_units.value + problem.group_overhead);
        cut();
      }
    }
  }
  int cta_in_part = cta;
  cursor.q_tile = 0;
  if (kQTilesOutermost && partition.num_parts > 1) {
    partition.number_ctas();
    if (in_pairs && partition.num_parts % 2 == 0) {
      // Two neighbours have the same run of two parts.
      cursor.q_tile = cta / 2 / partition.part_ctas * 2 + cta % 2;
      cta_in_part = cta / 2 % partition.part_ctas;
      partition.cta = cursor.q_tile * partition.part_ctas + cta_in_part;
    } else {
      cursor.q_tile = cta / partition.part_ctas;
      cta_in_part -= cursor.q_tile * partition.part_ctas;
    }
    units /= partition.num_parts, end /= partition.num_parts;
  }
  int unit = partition.begin(cta_in_part);  // of the part
  if (cursor.q_tile >= partition.num_parts || unit >= partition.part_units) return false;
  cursor.unit = cursor.q_tile * partition.part_units + unit;
  cursor.unit_end = cursor.q_tile * partition.part_units + partition.begin(cta_in_part + 1);
  if (has_more_q_tiles) {
    // By query tile, each for all requests that have it.
#pragma unroll 1
    for (cursor.q_tile = 0;; ++cursor.q_tile) {
      units = 0;
#pragma unroll 1
      for (int b = first_request; b < end_request; ++b) {
        const OneRequest request = b == first_request ? own.request : OneRequest(problem, b);
        if (request.num_q_tiles(problem) > cursor.q_tile) {
          units += problem.num_kv_heads * request.num_units_in_group(problem);
        }
      }
      __syncthreads();  // the totals have been read
      Unknown none;
      end = inclusive_sum<kThreads>(units, total, none, num_threads);
      if (unit < total) break;
      unit -= total;
    }
  }
  if (end - units <= unit && unit < end) {
    u32 unit_in_request = unit - (end - units);
    if (stride > 1) {
      const auto units_of_request = [&]() -> u32 {
        if (!kQTilesOutermost) return cursor.request.num_units(problem);
        return cursor.request.num_q_tiles(problem) > cursor.q_tile
                   ? problem.num_kv_heads * cursor.request.num_units_in_group(problem)
                   : 0;
      };
#pragma unroll 1
      for (u32 skipped; unit_in_request >= (skipped = units_of_request());) {
        unit_in_request -= skipped;
        cursor.enter(problem, cursor.request_idx + 1);
      }
      by_group_units = Reciprocal(cursor.request.num_units_in_group(problem));
    }
    const u32 group = by_group_units.divide(unit_in_request);
    const int unit_in_group = unit_in_request - group * by_group_units.value;
    cursor.tile = max(unit_in_group - problem.group_overhead, 0) << (kFixedSplits ? problem.unit_shift : 0);
    if (Problem::kIsCascade || Problem::kMayBeUneven)
      cursor.unit += max(problem.group_overhead - unit_in_group, 0);
    cursor.kv_head = group;
    if (!kQTilesOutermost) {
      const u32 num_q_tiles = cursor.request.num_q_tiles(problem);
      if (num_q_tiles > 1) {
        cursor.kv_head = group / num_q_tiles;
        cursor.q_tile = group - cursor.kv_head * num_q_tiles;
      }
    }
    if (starts_runs)
      cursor.unit_end = min(cursor.unit_end, cursor.unit + cursor.request.num_tiles() - cursor.tile);
    smem_cursor = cursor;
  }
  __syncthreads();
  cursor = smem_cursor;
  return true;
}

// What guess_run has found; kGuessed: while the kernel before was still running, and that is true now, too.
enum Beginning { kNoRun, kFound, kGuessed };

// begin_run, of lengths and tables as they are before the kernel before is done, which may still change them; when it
// is, each thread reads again what it has read, and if that differs for any, the run is found anew. In between,
// `ask_for_keys()` asks L2 for the first keys of a run that is found in what may be anything; `look_again()` begins to
// read where it has read. With `reads_early` nothing is changed (launch.cuh), so nothing is guessed; with kAsksEarly, keys
// are asked for in longer runs (in short ones all do that as soon as they know where).
template <int kThreads, bool kGuesses, bool kAsksEarly, int kTileKV, int kTileQ, bool kFixedSplits,
          bool kQTilesOutermost, typename Problem, typename AskForKeys, typename LookAgain>
__device__ __forceinline__ Beginning
guess_run(Problem& problem, bool reads_early, Cursor<kTileKV, kTileQ, kFixedSplits, kQTilesOutermost>& cursor,
          Partition& partition, const AskForKeys& ask_for_keys, const LookAgain& look_again, bool in_pairs,
          int cta, int max_ctas) {
  using OneRequest = Request<kTileKV, kTileQ, kFixedSplits>;
  using Own = OwnRequest<OneRequest>;
  constexpr int kLongRun = 5;  // tiles
  static_assert(kMostKeys / kTileKV <= 1 << 16);
  constexpr bool kAsks = kGuesses && !kFixedSplits;
  bool guesses = false;
  if constexpr (kAsks) guesses = !reads_early && problem.template can_be_guessed<kThreads, kTileQ>();
  if (!guesses && (!reads_early || problem.writes_first())) wait_for_predecessor();
  Own own(problem, Int<kThreads>(), guesses);
#pragma unroll 1
  while (true) {  // twice at most, as the code is long
    if (guesses && !problem.is_likely(own.request)) own.request = OneRequest(0, 0, 0, -1);
    const bool has_run = begin_run<kThreads>(problem, own, cursor, partition, in_pairs, cta, max_ctas);
    if (has_run && kAsks && (guesses || (kAsksEarly && reads_early && partition.quota >= kLongRun)))
      ask_for_keys();
    if (!guesses) return has_run ? kFound : kNoRun;
    wait_for_predecessor();
    // A cascade's by L1, which then has what it will read of the next groups, behind its copies.
    const Own now(problem, Int<kThreads>(), !Problem::kIsCascade);
    look_again();
    const bool was_wrong = !now.is(own);
    if (!__syncthreads_or(was_wrong)) return has_run ? kGuessed : kNoRun;
    own = now;
    guesses = false;
  }
}

// Where one of a tile's rows of keys lies, which a thread finds before the copy of the tile starts.
struct FoundRow {
  int page;
  int token;                   // of the page
  const int* entry = nullptr;  // of the table, of a guess

  // Returns the entry that says which page it is.
  __device__ __forceinline__ const int* find(const Divisor& page_size, const int* pages,
                                             int token_in_request) {
    const int page_in_request = page_size.divide(token_in_request);
    token = page_size.modulo(token_in_request, page_in_request);
    return pages + page_in_request;
  }

  // For guess_run, row `row` of the first tile, and with `ask()`, to ask L2 for it where it may be said to be one of the
  // cache, that of the first `num_tiles`.
  template <int kTileKV, int kTileQ, bool kFixedSplits, bool kQTilesOutermost, typename Problem, typename Ask>
  __device__ __forceinline__ void guess(const Problem& problem,
                                        const Cursor<kTileKV, kTileQ, kFixedSplits, kQTilesOutermost>& run,
                                        const Divisor& page_size, int num_pages, int row, int num_tiles,
                                        const Ask& ask) {
    int first_page = 0;
    int first_token = 0;
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int token_in_request = run.token_begin() + tile * kTileKV + row;
      if (token_in_request >= run.request.kv_len) break;
      const int* at = find(page_size, run.pages, token_in_request);
      if (!problem.has_entry(run.request_idx, at)) break;
      page = load_from_l2(at);
      if (tile == 0) entry = at, first_page = page, first_token = token;
      if (static_cast<u32>(page) < num_pages && static_cast<u32>(token) < page_size.value) ask();
    }
    page = first_page;
    token = first_token;
  }
  __device__ __forceinline__ void look_again() {
    if (entry != nullptr) page = load_from_l2(entry);
  }
};

}  // namespace cupyattn
