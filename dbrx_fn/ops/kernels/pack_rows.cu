// Packs rows for medium_segments.cu and long_segments.cu.
//
// A block packs one row of x, into each of its slots. A thread makes one chunk of 16 bytes at a time, so 8 neighbouring
// threads write 128 bytes in a row.
//
// Macros: those of packing.cuh; ROWS: the most rows of a segment; DENSE: 1 if a segment's rows are the next ROWS rows
// of x.
#include "packing.cuh"

extern "C" __global__ void __launch_bounds__(256) pack_rows(
    const u16 *x,
#if !DENSE
    const int *pair_slots, const int *pair_segments, const int *first_slots,
#endif
    u8 *packed, int top_k, int inner) {
  const u16 *source = x + u64(blockIdx.x) * inner;
  for (int index = threadIdx.x; index < inner / 8; index += 256) {
    const int block = index / 16, eight = index / 4 % 4, step = index / 2 % 2, half = index % 2;
    uint4 quarters[4];
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++)
      quarters[quarter] = load16(source + block * 128 + 32 * quarter + 8 * eight);
    const uint4 chunk = {activations_of(&quarters[0], step, half), activations_of(&quarters[1], step, half),
                         activations_of(&quarters[2], step, half), activations_of(&quarters[3], step, half)};
    const auto put = [&](Segment segment, int row) {
      *reinterpret_cast<uint4 *>(chunk_of(packed, segment, row, inner, block, eight, step, half)) = chunk;
    };
#if DENSE
    put(dense_segment(blockIdx.x / ROWS, ROWS, gridDim.x), blockIdx.x % ROWS);
#else
    for (int pair = blockIdx.x * top_k; pair < (blockIdx.x + 1) * top_k; pair++) {
      const Segment segment = planned_segment(first_slots, pair_segments[pair]);
      put(segment, pair_slots[pair] - segment.first);
    }
#endif
  }
}
