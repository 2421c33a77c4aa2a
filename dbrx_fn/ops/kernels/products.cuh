// The inner loop of products that are bound by reading weights: few rows of activations times some rows of a matrix.
//
// A block's warps share the inner axis. Warp w takes DEPTH blocks of 128 entries from block DEPTH w on, then from block
// DEPTH (w + WARPS) on, and so on. Together the warps read long stretches, and their sums meet in shared memory. (One
// contiguous stretch per warp is slower: docs/performance.md, section 4.)
//
// Weights are operand A of the tensor cores, of 16 rows. Activations are operand B, of 8 rows. A lane's sums 0 and 1
// belong to the upper 8 rows of A, sums 2 and 3 to the lower 8. Sums 0 and 2 belong to row 2 (lane % 4) of the
// activations, sums 1 and 3 to the row after it.
//
// Macros: those of weights.cuh.
//   WARPS: warps per block.
//   TALL: a warp's rows of the matrix, in units of 16.
//   DEPTH: blocks of the inner axis per round. It divides their number.
//   TILES: rows of activations, in units of 8.
#pragma once
#include "weights.cuh"

// Activations in global memory. The addresses are those of the lane's entries of a block.
struct Rows {
  const u16 *rows[TILES];
  __device__ __forceinline__ uint4 load(int tile, int at) const { return load16(rows[tile] + at); }
  __device__ __forceinline__ void advance(int blocks) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) rows[tile] += 128 * blocks;
  }
};

// Adds to a warp's sums the products of its blocks from `block` on. `matrix` and `x` already point to that block.
// `matrix.load(next, tall, half)` loads a block of the lane's upper (`half` 0) or lower row, `x.load(tile, at)` its
// activations. Returns the warp's next block, which lies behind the end.
template <class Matrix, class Activations>
__device__ __forceinline__ int add_products(float (*sums)[TALL][4], Matrix matrix, Activations x, int block, int blocks) {
  for (; block < blocks; block += WARPS * DEPTH) {
    Stored above[DEPTH][TALL], below[DEPTH][TALL];
#pragma unroll
    for (int tall = 0; tall < TALL; tall++)
#pragma unroll
      for (int next = 0; next < DEPTH; next++) {
        above[next][tall] = matrix.load(next, tall, 0);
        below[next][tall] = matrix.load(next, tall, 1);
      }
#pragma unroll
    for (int next = 0; next < DEPTH; next++) {
      uint4 entries[TILES][4];
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) entries[tile][i] = x.load(tile, 128 * next + 8 * i);
#pragma unroll
      for (int step = 0; step < 8; step++)
#pragma unroll
        for (int tall = 0; tall < TALL; tall++) {
          const Stored &a = above[next][tall], &b = below[next][tall];
          const u32 a0 = weights_of(a, step, 0), a1 = weights_of(b, step, 0);
          const u32 a2 = weights_of(a, step, 1), a3 = weights_of(b, step, 1);
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
            multiply_accumulate(sums[tile][tall], a0, a1, a2, a3, activations_of(entries[tile], step, 0),
                                activations_of(entries[tile], step, 1));
        }
    }
    matrix.advance(WARPS * DEPTH);
    x.advance(WARPS * DEPTH);
  }
  return block;
}

// The sums of all warps, with one place for each of a lane's sums.
struct Partial {
  float of_warps[WARPS][TILES][TALL][4][32];
  // The block must synchronize afterwards.
  __device__ __forceinline__ void put(const float (*sums)[TALL][4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int tall = 0; tall < TALL; tall++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          of_warps[threadIdx.x / 32][tile][tall][i][threadIdx.x % 32] = sums[tile][tall][i];
  }
  __device__ __forceinline__ float total(int tile, int tall, int entry, int lane) const {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += of_warps[w][tile][tall][entry][lane];
    return sum;
  }
};
