// The layout of rows for medium_segments.cu and long_segments.cu. In each segment, each block of 128 entries becomes two
// halves of ROWS x 64 bfloat16 numbers. They are permuted as in weights.cuh, and swizzled as tensor cores read shared
// memory.
//
// Macros: those of weights.cuh, for the product's weights; ROWS of a segment.
#pragma once
#include "weights.cuh"

// Where the chunk of 16 bytes lies that has the pairs `activations_of(quarter's entries, step, half)` of all four
// quarters of a block, for the 8 entries `eight` of each quarter. `step` is 0 or 1.
__device__ __forceinline__ u8 *chunk_of(u8 *packed, int slot, int inner, int block, int eight, int step, int half) {
  const int segment = slot / ROWS, row = slot % ROWS, place = (4 * eight + 2 * step + half) % 8;
  u8 *rows = packed + ((u64(segment) * (inner / 128) + block) * 2 + eight / 2) * (ROWS * 128);
  return rows + row * 128 + (place ^ (row % 8)) * 16;
}
