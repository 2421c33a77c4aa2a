// What medium_segments.cu and long_segments.cu do with a lane's sums: four for each 8 slots of a segment, in the layout
// of `multiply_accumulate` in hopper.cuh. Of a gated product, the upper row is the gate's and the lower one up's.
//
// Macros: those of weights.cuh, for the product's weights.
#pragma once
#include "hopper.cuh"
#include "packing.cuh"

// The matrix's row for a lane of a gated product, among the 128 rows whose results are a block of w2's inner axis. A
// warp's 8 results are neighbours in one quarter of the block, ordered as `activations_of` pairs them: `half` and
// `eight` say which of the quarter's.
__device__ __forceinline__ u64 gated_row(u64 first, int of_quarter, int half, int eight, int group) {
  const int order = NIBBLES ? group / 2 + 4 * (group % 2) : group;
  return first + 32 * of_quarter + 16 * half + 8 * eight + order;
}

// Stores silu(gate x) * (up x) of 8 slots in shared memory, in the layout of pack_rows.cu. `half_block` is where that of
// the results' half block begins. `slot` is the lane's.
__device__ __forceinline__ void store_gated(const float *sums, u32 half_block, int of_quarter, int eight, int slot,
                                            int quarter) {
  float values[2];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const float gated = sums[j];
    values[j] = gated / (1 + __expf(-gated)) * sums[2 + j];
  }
  const u32 pair = transposed(pack_bf16(values[0], values[1]));
  const int chunk = (4 * eight + quarter) ^ (slot % 8);
  const u32 to = half_block + slot * 128 + chunk * 16 + of_quarter * 4;
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(pair) : "memory");
}

// Two bfloat16 sums. The products are rounded before, as stock operations round them.
__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) {
  return pack_bf16(low_to_float(a) + low_to_float(b), high_to_float(a) + high_to_float(b));
}
