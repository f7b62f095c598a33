// Decode over levels of shared keys: the same line of units, runs and partial states, with another list of groups.
//
// A level has *nodes*: runs of query tokens, with keys that all of them see. A token's keys are those of its nodes in
// all levels. The nodes of all levels, level by level, are what schedule.cuh calls requests, so that a prefix which 64
// requests share is one request of 64 query tokens, whose keys are read once for a tile of rows:
//
//     level 0   [ 8192 keys, tokens 0 .. 63 ]         8 query heads: 8 tiles of 64 rows, each all 8192 keys
//     level 1   [ 256 ][ 300 ][ 17 ]  ...  [ 256 ]    a request's own keys, 8 rows each
//
// A row's states are those of its groups in all levels, and of all CTAs that have a part of one. They stay where they
// are written: the parts of a split group in their CTAs' slots, a group that one CTA has all of in its rows' *homes*,
// behind the slots. At the end of the launch the CTAs share the rows of the result, and for each row merge whatever
// states there are. Where they lie follows from the nodes' places on the line, which every CTA writes down for itself.
// A request that shares nothing, and lies in one run, has one state, which is the result: no merge.
#pragma once

#include "cupyattn/cp_async.cuh"
#include "cupyattn/divide.cuh"
#include "cupyattn/launch.cuh"
#include "cupyattn/partials.cuh"
#include "cupyattn/run.cuh"
#include "cupyattn/schedule.cuh"
#include "cupyattn/types.cuh"

namespace cupyattn {

constexpr int kMaxLevels = 8;  // MAX_LEVELS of levels.py

// What a launch is told of the levels; packed by cascade.py.
struct Levels {
  struct Level {
    const int* qo_indptr;   // [num_nodes + 1]; of the last level or null: one token a node
    const int* kv_indptr;   // [num_nodes + 1] or null
    const int* kv_indices;  // page ids
    const int* kv_lens;     // [num_nodes]
    int num_nodes;
    int table_row_stride;
    int num_table_entries;  // of kv_indices, to prefetch, and to be guessed from
    int first_node;         // how many there are in the levels before
  };
  Level levels[kMaxLevels];
  const int* q_indices;  // [num_tokens] or null: the row of `q` and `out` of each token
  int num_levels;
  int num_nodes;        // of all levels
  int num_tokens;       // that `q` has room for
  int num_slot_rows;    // rows of states before the first home
  int group_overhead;   // see CascadeProblem
  int uneven_overhead;  // the same, where requests differ
  u32 nodes_offset;  // where nodes are written down, in bytes: of the CTA's shared memory, or of the workspace
  int nodes_in_shared;
};

// To shared memory, by one warp, for functions that are called: by an address, a kernel's arguments are read from memory.
__device__ __forceinline__ void copy_levels(Levels& smem_levels, const Levels& levels) {
  static_assert(sizeof(Levels) % 8 == 0);
#pragma unroll 1
  for (int i = lane_id(); i < sizeof(Levels) / 8; i += 32) {
    reinterpret_cast<u64*>(&smem_levels)[i] = reinterpret_cast<const u64*>(&levels)[i];
  }
}

// A node's place on the line, and what it is.
struct alignas(16) Node {
  int qo_begin;
  int qo_len;  // 0 too where there are no keys, but for the last level's
  int kv_len;
  int first_unit;
};

// As Problem of schedule.cuh; `batch_size` counts nodes.
struct CascadeProblem {
  static constexpr bool kIsCascade = true;
  static constexpr bool kMayBeUneven = false;
  static constexpr bool kMayStartRuns = false;

  const Levels& levels;
  Node* nodes;  // [levels.num_nodes], in shared memory or, the same of all CTAs, in global
  int batch_size;
  int num_kv_heads;
  Divisor group_size;
  int window_left;
  int group_overhead;  // units before those of a group's tiles: what its queries and its states cost, in tiles
  int unit_shift;      // of fixed splits, which there are none of
  int max_splits;

  // The same, of levels that lie elsewhere.
  __device__ __forceinline__ CascadeProblem with(const Levels& same) const {
    return {same, nodes, batch_size, num_kv_heads, group_size, window_left, group_overhead, 0, 0};
  }

  __device__ __forceinline__ int level_of(int node) const {
    int level = 0;
    while (level + 1 < levels.num_levels && node >= levels.levels[level + 1].first_node) ++level;
    return level;
  }
  __device__ __forceinline__ bool is_last(int level) const { return level + 1 == levels.num_levels; }
  // Of a node, if it has requests' own keys.
  template <typename Request>
  __device__ __forceinline__ void add_size(Sizes& sizes, int node, const Request& request) const {
    if (node >= levels.levels[levels.num_levels - 1].first_node) sizes.add(Sizes::of(request.num_tiles()));
  }
  // Whether groups now count for what they do where requests differ, and all is to be counted again.
  __device__ __forceinline__ bool weighs_more(const Sizes& sizes) {
    if (group_overhead == levels.uneven_overhead || !sizes.differ()) return false;
    group_overhead = levels.uneven_overhead;
    return true;
  }

  template <bool kFromL2 = false>
  __device__ __forceinline__ void read(int node, int& qo_begin, int& qo_len, int& kv_len) const {
    const int number = level_of(node);
    const Levels::Level& level = levels.levels[number];
    const int i = node - level.first_node;
    qo_begin = level.qo_indptr != nullptr ? load<kFromL2>(level.qo_indptr + i) : i;
    qo_len = level.qo_indptr != nullptr ? load<kFromL2>(level.qo_indptr + i + 1) - qo_begin : 1;
    kv_len = max(load<kFromL2>(level.kv_lens + i), 0);
    // Requests keep one tile without keys, so that their rows' results are written.
    if (kv_len == 0 && !is_last(number)) qo_len = 0;
  }
  template <bool kFromL2 = false>
  __device__ __forceinline__ const int* pages_of(int node) const {
    const Levels::Level& level = levels.levels[level_of(node)];
    const PageTable table{level.kv_indptr, level.kv_indices, level.table_row_stride};
    return table.pages_of<kFromL2>(node - level.first_node);
  }
  __device__ __forceinline__ int row_of(int token) const {
    return levels.q_indices != nullptr ? levels.q_indices[token] : token;
  }

  template <int kThreads>
  __device__ __forceinline__ void prefetch() const {
    constexpr int kLine = 32;  // entries of a 128-byte line
    const i64 entry = (static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x) * kLine;
#pragma unroll 1
    for (int i = 0; i < levels.num_levels; ++i) {
      if (entry < levels.levels[i].num_table_entries) prefetch_l2(levels.levels[i].kv_indices + entry);
    }
#pragma unroll
    for (int i = 0; i < sizeof(Levels); i += 64) touch(reinterpret_cast<const i64*>(&levels)[i / 8]);
    if (threadIdx.x < batch_size) {
      const Levels::Level& level = levels.levels[level_of(threadIdx.x)];
      const int i = threadIdx.x - level.first_node;
      prefetch_l2(level.kv_lens + i);
      if (level.kv_indptr != nullptr) prefetch_l2(level.kv_indptr + i);
      if (level.qo_indptr != nullptr) prefetch_l2(level.qo_indptr + i);
    }
  }
  template <int kThreads, int kTileQ>
  __device__ __forceinline__ bool can_be_guessed() const {
    const int most_q_tiles = ceil_div(min(levels.num_tokens, 1 << 16) * group_size.value, kTileQ);
    return levels.nodes_in_shared && batch_size <= min(kThreads, 128) && num_kv_heads * most_q_tiles < 128;
  }
  template <typename Request>
  __device__ __forceinline__ bool is_likely(const Request& request) const {
    const u32 num_tokens = levels.num_tokens;
    return request.kv_len <= kMostKeys && static_cast<u32>(request.qo_begin) <= num_tokens &&
           static_cast<u32>(request.qo_len) <= num_tokens - request.qo_begin;
  }
  __device__ __forceinline__ bool has_entry(int node, const int* entry) const {
    const Levels::Level& level = levels.levels[level_of(node)];
    return static_cast<u64>(entry - level.kv_indices) < level.num_table_entries;
  }
  // Nodes, which a launch before has written down there, too.
  __device__ __forceinline__ bool writes_first() const { return !levels.nodes_in_shared; }

  // See Problem; barriers follow. In global memory, where other CTAs read already, nothing is written but what stays.
  template <typename Request>
  __device__ __forceinline__ void note(int node, const Request& request) const {
    if (levels.nodes_in_shared) write(node, request, request.num_units(*this));
  }
  template <typename Request>
  __device__ __forceinline__ void note(int node, const Request& request, const int*) const {
    note(node, request);
  }
  template <typename Request>
  __device__ __forceinline__ void place(int node, int end_node, int unit) const {
#pragma unroll 1
    for (; node < end_node; ++node) {
      if (levels.nodes_in_shared) {
        const int units = nodes[node].first_unit;
        nodes[node].first_unit = unit;
        unit += units;
      } else {
        const Request request(*this, node);
        write(node, request, unit);
        unit += request.num_units(*this);
      }
    }
  }
  template <typename Request>
  __device__ __forceinline__ void write(int node, const Request& request, int unit) const {
    nodes[node] = {request.qo_begin, request.qo_len, request.kv_len, unit};
  }

  __device__ __forceinline__ bool is_noted(int) const { return true; }
  __device__ __forceinline__ bool has_notes() const { return false; }  // of where page ids are
  template <typename Request>
  __device__ __forceinline__ Request noted(int node) const {
    const Node note = nodes[node];
    return Request(note.qo_begin, note.qo_len, note.kv_len, window_left);
  }
  template <typename Request>
  __device__ __forceinline__ Request noted(int node, const int*& pages_of_node) const {
    pages_of_node = pages_of(node);
    return noted<Request>(node);
  }

  // The node of a level that a token is in, or -1.
  __device__ __forceinline__ int find(int level, int token) const {
    const int begin = levels.levels[level].first_node;
    int low = 0;  // the last node that begins at or before the token
    int high = levels.levels[level].num_nodes;
    if (levels.levels[level].qo_indptr == nullptr) return token < high ? begin + token : -1;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (nodes[begin + middle].qo_begin <= token) {
        low = middle;
      } else {
        high = middle;
      }
    }
    if (low >= high) return -1;
    const Node node = nodes[begin + low];
    return node.qo_begin <= token && token - node.qo_begin < node.qo_len ? begin + low : -1;
  }

  // Whether the token has keys in no level but the last.
  __device__ __forceinline__ bool shares_nothing(int token) const {
#pragma unroll 1
    for (int level = 0; !is_last(level); ++level) {
      if (find(level, token) >= 0) return false;
    }
    return true;
  }

  // The home of a token's first query head, in rows of states.
  __device__ __forceinline__ int home_of(int level, int kv_head, int token) const {
    return levels.num_slot_rows +
           ((level * num_kv_heads + kv_head) * levels.num_tokens + token) * group_size.value;
  }

  // Whether rows of a node may see different keys, and not all that it has.
  __device__ __forceinline__ bool has_masks() const {
    return window_left >= 0 || levels.levels[levels.num_levels - 1].qo_indptr != nullptr;
  }

  // All rows of the result, of query heads.
  __device__ __forceinline__ int num_rows() const {
    return levels.num_tokens * num_kv_heads * group_size.value;
  }

  // Where a token stands, from the first key of its node on: behind the keys of all levels, but for its request's tokens
  // that come after it. Of a token that sees nothing, -1.
  template <typename OneRequest>
  __device__ __forceinline__ int position_of(int level, const OneRequest& node, int token) const {
    if (!has_masks()) return node.kv_len - 1;
    int position = node.kv_len;
    int qo_end = node.qo_begin + node.qo_len;
#pragma unroll 1
    for (++level; level < levels.num_levels; ++level) {
      const int found = find(level, token);
      if (found >= 0) {
        position += nodes[found].kv_len;
        qo_end = nodes[found].qo_begin + nodes[found].qo_len;
      } else if (is_last(level)) {
        return -1;
      }
    }
    return max(position - (qo_end - token), -1);
  }
  // That of a row of the query tile that a cursor points at; rows that do not exist are as the last that does.
  template <int kTileQ, typename Cursor>
  __device__ __forceinline__ int position_of(int level, const Cursor& load, int row) const {
    const int in_node = min(load.q_tile * kTileQ + row, load.request.qo_len * group_size.value - 1);
    return position_of(level, load.request, load.request.qo_begin + group_size.divide(in_node));
  }

  // With a window, the first key that any row of the query tile sees. What is before it may be anything, or nothing: a
  // tile has zeros instead. For all lanes of a warp.
  template <int kTileQ, typename Cursor>
  __device__ __forceinline__ int first_seen(const Cursor& load) const {
    const int level = level_of(load.request_idx);
    int first = 1 << 30;
#pragma unroll 1
    for (int row = lane_id(); row < kTileQ; row += 32) {
      const int position = position_of<kTileQ>(level, load, row);
      if (position >= 0) first = min(first, max(position - window_left, 0));
    }
    return __reduce_min_sync(0xffffffffu, first);
  }
  // Whether a row that stands there does not see a key of a node.
  __device__ __forceinline__ bool is_hidden(int token, int position, int kv_len) const {
    return token > position || token >= kv_len || (window_left >= 0 && token < position - window_left);
  }
};

// What a kernel's arguments say, without and with levels. `smem`: its dynamic shared memory; `notes`: `most_notes` of
// shared memory too, not more than a CTA has threads.
__device__ __forceinline__ Problem problem_of(void* workspace, void* smem, Problem::Note* notes,
                                              int most_notes, const PageTable& pages, int num_table_entries,
                                              const int* qo_indptr, const int* kv_lens, int batch_size,
                                              int num_kv_heads, const Divisor& group_size, int window_left,
                                              int split_shift, int max_splits) {
  return {pages,       num_table_entries, qo_indptr,  kv_lens,
          batch_size,  num_kv_heads,      group_size, window_left,
          split_shift, max_splits,        notes,      batch_size <= most_notes ? most_notes : 0};
}
__device__ __forceinline__ CascadeProblem problem_of(void* workspace, void* smem, Problem::Note*, int,
                                                     const PageTable&, int, const int*, const int*, int,
                                                     int num_kv_heads, const Divisor& group_size,
                                                     int window_left, int, int, const Levels& levels) {
  char* memory = static_cast<char*>(levels.nodes_in_shared ? smem : workspace);
  Node* nodes = reinterpret_cast<Node*>(memory + levels.nodes_offset);
  return {levels, nodes, levels.num_nodes, num_kv_heads, group_size, window_left, levels.group_overhead,
          0,      0};
}

// The same, of groups that may count for what they cost (UnevenProblem); but for levels, and with kMost == 0.
template <int kMost, bool kLengthensRuns, int kMostOfOne = kMost, bool kStartsRuns = false>
__device__ __forceinline__ auto uneven(const Problem& problem) {
  if constexpr (kMost == 0) {
    return problem;
  } else {
    return UnevenProblem<kMost, kLengthensRuns, kMostOfOne, kStartsRuns>{problem, 0};
  }
}
template <int kMost, bool kLengthensRuns, int kMostOfOne = kMost, bool kStartsRuns = false>
__device__ __forceinline__ CascadeProblem uneven(const CascadeProblem& problem) {
  return problem;
}

// In shared memory, for kBuffers segments: where each row of the query tile stands, if that matters, and which keys all
// rows see.
template <int kTileQ, int kBuffers>
struct Positions {
  int rows[kBuffers][kTileQ];
  int2 seen[kBuffers];  // first .. last

  // Lanes of one warp. kAlways: `rows` are read, not `at`, which takes more registers.
  template <bool kAlways = false, typename Cursor>
  __device__ __forceinline__ void write(const CascadeProblem& problem, const Cursor& load, int buffer) {
    const int level = problem.level_of(load.request_idx);
    const int lane = lane_id();
    int first = 0;
    int last = load.request.kv_len - 1;
#pragma unroll 1
    for (int row = lane; row < kTileQ && (kAlways || problem.has_masks()); row += 32) {
      const int position = problem.template position_of<kTileQ>(level, load, row);
      rows[buffer][row] = position;
      last = min(last, position);
      if (problem.window_left >= 0) first = max(first, position - problem.window_left);
    }
    first = __reduce_max_sync(0xffffffffu, first);
    last = __reduce_min_sync(0xffffffffu, last);
    if (lane == 0) seen[buffer] = make_int2(first, last);
  }
  __device__ __forceinline__ int at(const CascadeProblem& problem, int buffer, int row, int kv_len) const {
    return problem.has_masks() ? rows[buffer][row] : kv_len - 1;
  }
  __device__ __forceinline__ bool all_see(int buffer, int first, int last) const {
    return seen[buffer].x <= first && last <= seen[buffer].y;
  }
};
template <int kTileQ>
struct Positions<kTileQ, 0> {};

// Where a row of a request that shares nothing goes: it has its result.
template <typename T, int kTileQ>
__device__ __forceinline__ auto result_row(const CascadeProblem& problem, const Output<T, kTileQ>& output,
                                           const TileInfo& tile, int row, int dim) {
  const int in_request = tile.q_tile * kTileQ + row;
  const int token = problem.group_size.divide(in_request);
  const int head = tile.kv_head * problem.group_size.value + problem.group_size.modulo(in_request, token);
  return output.row_of(problem.row_of(tile.qo_begin + token), head, dim);
}

// As many times four lanes, in powers of two, as share the states of a line, where `num_warps` merge so many lines of rows.
__device__ __forceinline__ int row_parts(int num_warps, int num_lines) {
  return min(31 - __clz(num_warps * 8 / max(num_lines, 1) | 1), 3);
}

// The states of rows of the result, as merge_lines asks for them. Lines are those of all rows: (token, query head) and
// line of the row. Where a row's states lie in each level is found by the lanes of a line together, or, where a row has more
// lines than a warp takes at once, for all rows of a share beforehand. It is kept in shared memory.
template <typename Partials, typename OneRequest, int kTileQ, int kWarps, bool kFindsEarly>
struct RowStates {
  // State j lies at slot_row + (j == 0 ? 1 : 2 * j) * kTileQ, as a group's first and other CTAs have slots.
  struct Found {
    int slot_row;
    int num_states;
  };
  static __device__ __forceinline__ int state_row(const Found& level, int state) {
    return level.slot_row + (state == 0 ? 1 : 2 * state) * kTileQ;
  }
  static constexpr bool kClearsAtOnce = true;  // finding states again costs more
  static constexpr bool kMayBeNone = true;
  static constexpr int kLinesOfWarp = 8;  // at once, at most
  static constexpr bool kFindsAll = kFindsEarly || Partials::kRowLines > kLinesOfWarp;
  static constexpr int kMostRows = kWarps * kLinesOfWarp;  // of a share, or it is done in several parts

  const CascadeProblem& problem;
  const Partition& partition;
  Found* scratch;  // [rows of the share][num_levels], or [kWarps * kLinesOfWarp][kMaxLevels]
  int first_row;
  int parts;         // log2
  const Found* own;  // of the line
  bool is_request;
  int num_states;
  int most_states;

  // In the team.
  static __device__ __forceinline__ u32 thread() { return threadIdx.x % (kWarps * 32); }

  // Of lines `first_line` .. `end_line` - 1.
  __device__ __forceinline__ RowStates(const CascadeProblem& problem, const Partition& partition,
                                       int first_line, int end_line, float* scratch)
      : problem(problem),
        partition(partition),
        scratch(reinterpret_cast<Found*>(scratch)),
        first_row(static_cast<u32>(first_line) / Partials::kRowLines),
        parts(row_parts(kWarps, end_line - first_line)) {}

  // By thread `thread` of `num_threads`; a barrier follows.
  __device__ __forceinline__ void find_all(int end_line, int thread, int num_threads) const {
    const int num_levels = problem.levels.num_levels;
    const int end_row = static_cast<u32>(end_line + Partials::kRowLines - 1) / Partials::kRowLines;
#pragma unroll 1
    for (u32 i = thread; i < (end_row - first_row) * num_levels; i += num_threads) {
      const int row = i / num_levels;
      scratch[i] = find(place_of(first_row + row), i - row * num_levels);
    }
  }

  struct Place {
    int token;
    int kv_head;
    int head;  // of the group
  };
  __device__ __forceinline__ Place place_of(u32 row) const {
    const u32 group_size = problem.group_size.value;
    const u32 num_qo_heads = problem.num_kv_heads * group_size;
    const int token = row / num_qo_heads;
    const u32 qo_head = row - token * num_qo_heads;
    const int kv_head = qo_head / group_size;
    return {token, kv_head, static_cast<int>(qo_head - kv_head * group_size)};
  }
  // Where a row has states in a level.
  __device__ __forceinline__ Found find(const Place& row, int level) const {
    const int index = problem.find(level, row.token);
    if (index < 0) return {0, 0};
    const Node node = problem.nodes[index];
    const OneRequest request = problem.template noted<OneRequest>(index);
    const int in_node = (row.token - node.qo_begin) * problem.group_size.value + row.head;
    const int q_tile = in_node / kTileQ;
    const int num_units = request.num_units_in_group(problem);
    const int group_begin =
        node.first_unit + (row.kv_head * request.num_q_tiles(problem) + q_tile) * num_units;
    const int first_cta = partition.cta_of(group_begin + problem.group_overhead);
    const int num_states = partition.cta_of(group_begin + num_units - 1) + 1 - first_cta;
    const int slot_row = num_states == 1
                             ? problem.home_of(level, row.kv_head, node.qo_begin) + in_node - kTileQ
                             : 2 * first_cta * kTileQ + in_node % kTileQ;
    return {slot_row, num_states};
  }

  __device__ __forceinline__ int parts_log2() const { return parts; }
  __device__ __forceinline__ int count() const { return num_states; }
  __device__ __forceinline__ int most() const { return most_states; }
  __device__ __forceinline__ bool has_result() const { return is_request; }
  template <int kCount>
  struct Lines {
    int at[kCount];
  };
  template <int kCount>
  __device__ __forceinline__ Lines<kCount> find_lines(int begin, int step, int line) const {
    Lines<kCount> lines;
    const int in_row = static_cast<u32>(line) % Partials::kRowLines;
    const Found* next = own;
    int first = 0;  // state of the level
    do {
      const Found level = *next++;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int state = min(begin + i * step, num_states - 1) - first;
        if (state >= 0) {
          lines.at[i] = state_row(level, state) * Partials::kRowLines + in_row;
        }
      }
      first += level.num_states;
    } while (first < num_states);
    return lines;
  }
  template <int kCount>
  __device__ __forceinline__ int line_at(const Lines<kCount>& lines, int i) const {
    return lines.at[i];
  }

  __device__ __forceinline__ bool enter(int line, bool exists) {
    const int num_levels = problem.levels.num_levels;
    const int row = static_cast<u32>(line) / Partials::kRowLines;
    if constexpr (kFindsAll) {
      own = scratch + (row - first_row) * num_levels;
    } else {
      const int lane = threadIdx.x % 32;
      const int team_lanes = 4 << parts;
      Found* const all = scratch + (thread() / 32 * kLinesOfWarp + lane / team_lanes) * kMaxLevels;
      const Place place = place_of(row);
      __syncwarp();  // what was found before has been read
      for (int level = lane % team_lanes; level < num_levels; level += team_lanes) {
        all[level] = find(place, level);
      }
      __syncwarp();
      own = all;
    }
    num_states = 0;
    for (int level = 0; level < num_levels; ++level) num_states += own[level].num_states;
    // A request that has a single state has its result. A row that is in no request may have states too, of groups in
    // other levels: they are cleared, and nothing is written.
    is_request = own[num_levels - 1].num_states > 0;
    exists = exists && num_states > (is_request ? 1 : 0);
    if (!exists) num_states = 0;
    most_states = __reduce_max_sync(0xffffffffu, num_states);
    return exists;
  }
};

// The same of rows whose states have been found and listed before, in shared memory, so that little is left to do when the
// last one is there.
template <typename Partials, typename T>
struct ListedStates {
  struct Row {
    T* out;          // where its result goes; null: nowhere
    float* lse;      // or null
    int first;       // of its states, in the list
    int num_states;  // 0: there is nothing to merge
  };
  static constexpr bool kClearsAtOnce = true;
  static constexpr bool kMayBeNone = true;

  const Row* rows;  // from `first_row` on
  const int* list;  // rows of states
  int first_row;
  int parts;  // log2
  int first;
  int num_states;
  int most_states;
  bool is_written;

  __device__ __forceinline__ int parts_log2() const { return parts; }
  __device__ __forceinline__ int count() const { return num_states; }
  __device__ __forceinline__ int most() const { return most_states; }
  __device__ __forceinline__ bool has_result() const { return is_written; }
  template <int kCount>
  struct Lines {
    int at[kCount];
  };
  template <int kCount>
  __device__ __forceinline__ Lines<kCount> find_lines(int begin, int step, int line) const {
    Lines<kCount> lines;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int state = max(min(begin + i * step, num_states - 1), 0);
      lines.at[i] = list[first + state] * Partials::kRowLines + static_cast<u32>(line) % Partials::kRowLines;
    }
    return lines;
  }
  template <int kCount>
  __device__ __forceinline__ int line_at(const Lines<kCount>& lines, int i) const {
    return lines.at[i];
  }
  __device__ __forceinline__ bool enter(int line, bool exists) {
    const Row& row = rows[static_cast<u32>(line) / Partials::kRowLines - first_row];
    num_states = exists ? row.num_states : 0;
    first = num_states > 0 ? row.first : 0;
    is_written = row.out != nullptr;
    most_states = __reduce_max_sync(0xffffffffu, num_states);
    return num_states > 0;
  }
};

// Lines `first_line` .. `end_line` - 1 of the result, of all rows, as a team of kThreads merges them. `scratch`: shared
// memory of the team, RowStates::Found for kMostRows rows in all levels. kFindsEarly: where the states of
// these rows are, others may have found before.
template <int kThreads, int kTileKV, bool kFindsEarly, typename T, int kHeadDim, int kTileQ, bool kOfQuads>
struct RowMerge {
  using Slots = Partials<kHeadDim, kTileQ, kOfQuads>;
  using States = RowStates<Slots, Request<kTileKV, kTileQ, false>, kTileQ, kThreads / 32, kFindsEarly>;
  const CascadeProblem& problem;
  const Partition& partition;
  const Slots& partials;
  const Output<T, kTileQ>& output;
  int first_line;
  int end_line;
  float* scratch;

  // The end of the lines from `line` on whose states are found together.
  __device__ __forceinline__ int end_of_part(int line) const {
    const int end_row = static_cast<u32>(line) / Slots::kRowLines + States::kMostRows;
    return min(end_row * Slots::kRowLines, end_line);
  }
  // Up to line `end`, for all that there is room for: before `merge`, whose first part needs no more. By thread `thread` of
  // any `num_threads`. A barrier follows.
  __device__ __forceinline__ void find_early(int end, int thread, int num_threads) const {
    States(problem, partition, first_line, end_line, scratch).find_all(end, thread, num_threads);
  }
  __device__ __forceinline__ auto result_row(int row, int dim) const {
    const u32 num_qo_heads = problem.num_kv_heads * problem.group_size.value;
    const int token = static_cast<u32>(row) / num_qo_heads;
    return output.row_of(problem.row_of(token), row - token * num_qo_heads, dim);
  }
  // Lists what `find_early` has found, and a barrier after it has made known, of up to line `end`: in `rows`, and in `list`,
  // which has `room` for so many states. `*num_listed`, 0 before, says whether that was enough; if not, all is to be merged
  // from what has been found. Eight threads a row, of whole warps. (Which row's states are listed first, time decides; in
  // what order they are merged does not depend on it.)
  using Listed = ListedStates<Slots, T>;
  __device__ __forceinline__ void list_states(int end, int thread, int num_threads,
                                              typename Listed::Row* rows, int* list, int room,
                                              int* num_listed) const {
    const int first_row = static_cast<u32>(first_line) / Slots::kRowLines;
    const int end_row = static_cast<u32>(end + Slots::kRowLines - 1) / Slots::kRowLines;
    const int num_levels = problem.levels.num_levels;
    const int lane = thread % 8;
#pragma unroll 1
    for (int row = thread / 8; row < end_row - first_row; row += num_threads / 8) {
      const auto* found = reinterpret_cast<const typename States::Found*>(scratch) + row * num_levels;
      auto target = result_row(first_row + row, 0);
      int num_states = 0;
#pragma unroll 1
      for (int level = 0; level < num_levels; ++level) num_states += found[level].num_states;
      const bool is_request = found[num_levels - 1].num_states > 0;
      if (is_request && num_states == 1) num_states = 0;  // which is the result
      if (!is_request) target.out = nullptr;
      int next = 0;
      if (lane == 0) {
        next = atomicAdd(num_listed, num_states);
        rows[row] = {target.out, target.lse, next, num_states};
      }
      next = __shfl_sync(0xffu << (lane_id() & 24), next, 0, 8);
      if (next + num_states > room) continue;
#pragma unroll 1
      for (int level = 0; num_states > 0; ++level) {
        const auto here = found[level];
#pragma unroll 1
        for (int state = lane; state < here.num_states; state += 8) {
          list[next + state] = States::state_row(here, state);
        }
        next += here.num_states;
        num_states -= here.num_states;
      }
    }
  }
  __device__ __forceinline__ void merge(const Team<kThreads>& team, bool are_found) const {
    const auto find = [&](int row, int dim) { return result_row(row, dim); };
    if constexpr (States::kFindsAll) {
#pragma unroll 1
      for (int line = first_line; line < end_line;) {
        const int end = end_of_part(line);
        const States states(problem, partition, line, end, scratch);
        if (!are_found) {
          states.find_all(end, team.tid, kThreads);
          team.sync();
        }
        are_found = false;
        merge_lines<8>(team, partials, states, false, line, end, scratch, find);
        line = end;
        if (line < end_line) team.sync();  // the scratch memory is free again
      }
    } else {
      const States states(problem, partition, first_line, end_line, scratch);
      merge_lines<8>(team, partials, states, false, first_line, end_line, scratch, find);
    }
  }
};
// This CTA's shares, by threads 0 .. kThreads - 1; `are_found`: as RowMerge::find_early leaves it.
template <int kThreads, int kTileKV, typename T, int kHeadDim, int kTileQ, bool kOfQuads>
__device__ __forceinline__ void merge_rows(const CascadeProblem& problem, const Partition& partition,
                                           const Partials<kHeadDim, kTileQ, kOfQuads>& partials,
                                           const Output<T, kTileQ>& output, const TileInfo (&shares)[2],
                                           float* scratch, bool are_found = false) {
  const TileInfo& share = shares[0];  // all are in this one: RunEnd::add_lines
  if (share.num_sharers <= 1) return;
  const RowMerge<kThreads, kTileKV, false, T, kHeadDim, kTileQ, kOfQuads> rows{
      problem, partition, partials, output, share.first_line, share.end_line, scratch};
  rows.merge(all_threads<kThreads>(), are_found);
}

}  // namespace cupyattn
