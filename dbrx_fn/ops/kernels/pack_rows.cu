// Packs rows for medium_segments.cu and long_segments.cu.
//
// Macros: those of packing.cuh; ROWS: the most rows of a segment; DENSE: 1 if a segment's rows are the next ROWS rows
// of x.
#include "packing.cuh"

// A thread takes 8 neighbouring entries of each quarter of a block: four chunks of 16 bytes.
extern "C" __global__ void __launch_bounds__(256) pack_rows(
    const u16 *x,
#if !DENSE
    const int *slot_pairs, const int *first_slots,
#endif
    u8 *packed, int count, int top_k, int inner) {
  const int number = blockIdx.x / ROWS, row = blockIdx.x % ROWS;
#if DENSE
  const Segment segment = dense_segment(number, ROWS, count);
  const u64 source = blockIdx.x;
  if (source >= count) return;
#else
  const Segment segment = planned_segment(first_slots, number);
  const int pair = row < segment.rows ? slot_pairs[segment.first + row] : count;
  if (pair >= count) return;
  const u64 source = pair / top_k;
#endif
  for (int index = threadIdx.x; index < inner / 32; index += 256) {
    const int block = index / 4, eight = index % 4;
    uint4 quarters[4];
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++)
      quarters[quarter] = load16(x + source * inner + block * 128 + 32 * quarter + 8 * eight);
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint4 chunk = {activations_of(&quarters[0], step, half), activations_of(&quarters[1], step, half),
                             activations_of(&quarters[2], step, half), activations_of(&quarters[3], step, half)};
        *reinterpret_cast<uint4 *>(chunk_of(packed, segment, row, inner, block, eight, step, half)) = chunk;
      }
  }
}
