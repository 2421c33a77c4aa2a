// The layout of rows for medium_segments.cu and long_segments.cu. In each segment, each block of 128 entries becomes two
// halves, each of 64 bfloat16 numbers of every row. They are permuted as in weights.cuh, and swizzled as tensor cores
// read shared memory.
//
// Macros: those of weights.cuh, for the product's weights.
#pragma once
#include "weights.cuh"

// A segment's rows: the first one's slot, and their number with padding, a multiple of 8.
struct Segment {
  int first, rows;

  // Where a half of a block lies, in bytes from the beginning of all rows of this inner width.
  __device__ __forceinline__ u64 half_block(int inner, int block, int half) const {
    return u64(first) * inner * 2 + u64(2 * block + half) * rows * 128;
  }
};

// Segment `number` of a dispatch plan.
__device__ __forceinline__ Segment planned_segment(const int *first_slots, int number) {
  const int first = first_slots[number];
  return {first, first_slots[number + 1] - first};
}

// Segment `number` of a single matrix's rows: at most `most` of `tokens`, from `number * most` on.
__device__ __forceinline__ Segment dense_segment(int number, int most, int tokens) {
  const int first = number * most;
  return {first, min(most, (tokens - first + 7) / 8 * 8)};
}

// The place of one chunk, 16 bytes of a segment's row. It has the pairs `activations_of(quarter's entries, step, half)`
// of all four quarters of a block, for the 8 entries `eight` of each quarter. `step` is 0 or 1.
__device__ __forceinline__ u8 *chunk_of(u8 *packed, Segment segment, int row, int inner, int block, int eight, int step,
                                        int half) {
  const int place = (4 * eight + 2 * step + half) % 8;
  return packed + segment.half_block(inner, block, eight / 2) + row * 128 + (place ^ (row % 8)) * 16;
}
