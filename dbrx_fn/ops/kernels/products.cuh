// The inner loop of products whose bound is the weights' bytes: few rows of activations by some rows of a matrix.
//
// A block's warps share the inner axis: warp w takes DEPTH blocks of 128 entries from DEPTH w on, then from
// DEPTH (w + WARPS) on, and so on, so that together they read long stretches, and their sums meet in shared memory. (A
// stretch for each warp takes half as long again.) Weights are tensor cores' operand A, of 16 rows, activations operand
// B, of 8: a lane's sums 0 and 1 are of the upper 8 rows, 2 and 3 of the lower ones, and of the activations' rows
// 2 (lane % 4) and the next.
//
// Macros: those of weights.cuh; WARPS; TALL, times 16 rows of the matrix; DEPTH, which divides the inner axis' blocks;
// TILES, of 8 rows of activations.
#pragma once
#include "weights.cuh"

// Activations in global memory, at the lane's entries of a block.
struct Rows {
  const u16 *rows[TILES];
  __device__ __forceinline__ uint4 load(int tile, int at) const { return load16(rows[tile] + at); }
  __device__ __forceinline__ void advance(int blocks) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) rows[tile] += 128 * blocks;
  }
};

// Adds to a warp's sums the products of its blocks from `block` on, where `matrix` (`load(next, tall, half)`: a block of
// the lane's upper or lower row) and `x` (`load(tile, at)`) stand; returns the block that would be next, behind the end.
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

// Sums of all warps, one place for each of a lane's.
struct Partial {
  float of_warps[WARPS][TILES][TALL][4][32];
  // The block has to wait after it.
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
