// Tiles of rows in shared memory, moved in chunks of 16 bytes.
#pragma once

#include "cupyattn/types.cuh"

namespace cupyattn {

// Where chunk `c` of row `r` lies, so that ldmatrix (eight rows, one chunk each) touches all 32 banks once.
// Rows of a multiple of 8 chunks: the chunk is XORed with the row. Other rows (head_dim 80, 96, 112): padded
// to an odd number of chunks.
template <int kHeadDim>
struct TileLayout {
  static constexpr int kRowChunks = kHeadDim / 8;
  static constexpr bool kSwizzled = kRowChunks % 8 == 0;
  static constexpr int kRowBytes = 16 * (kSwizzled ? kRowChunks : kRowChunks | 1);

  static __device__ __forceinline__ u32 offset(int row, int chunk) {
    return row * kRowBytes + 16 * (kSwizzled ? chunk ^ (row & 7) : chunk);
  }
  // From the address of a chunk to that of the same chunk `rows` rows below: a multiple of 8, or of a smaller power of
  // two that the row itself is less than.
  static __device__ __forceinline__ u32 below(u32 address, int rows) {
    return (kSwizzled ? address ^ (rows % 8 * 16) : address) + rows * kRowBytes;
  }
  // From the address of a row's chunk 0 or 1 to that of 2 * step chunks further. With `step` known to the
  // compiler this is one instruction; `offset` would keep a register for every step.
  static __device__ __forceinline__ u32 advance(u32 address, int step) {
    return kSwizzled ? (address ^ (step % 4 * 32)) + step / 4 * 128 : address + step * 32;
  }
};

// The same in blocks of 64 columns, which wgmma.cuh takes as operands.
template <int kHeadDim, int kRows>
struct BlockLayout {
  static constexpr int kRowChunks = kHeadDim / 8;
  static constexpr bool kSwizzled = true;
  static constexpr int kRowBytes = 2 * kHeadDim;
  static constexpr int kBlockBytes = kRows * 128;

  static __device__ __forceinline__ u32 offset(int row, int chunk) {
    return chunk / 8 * kBlockBytes + row * 128 + 16 * (chunk % 8 ^ (row & 7));
  }
  static __device__ __forceinline__ u32 below(u32 address, int rows) {
    return (address ^ (rows % 8 * 16)) + rows * 128;
  }
};

template <int kHeadDim, int kRows, bool kBlocks>
struct LayoutOf {
  using Type = TileLayout<kHeadDim>;
};
template <int kHeadDim, int kRows>
struct LayoutOf<kHeadDim, kRows, true> {
  using Type = BlockLayout<kHeadDim, kRows>;
};

}  // namespace cupyattn
