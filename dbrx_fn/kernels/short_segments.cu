// Segments of few rows times their expert's matrix: what decoding does. The weights' bytes are the bound.
//
// A block computes 16 TALL rows of the matrix (half as many of each of two, where they are gated) for one segment. Its
// warps share the inner axis: warp w takes the blocks of 128 entries w, w + WARPS, ..., so that together they read long
// stretches, and their sums meet in shared memory. Weights are tensor cores' operand A, of 16 rows, activations operand
// B, of 8.
//
// Macros: those of weights.cuh; WARPS; TALL; TILES, of 8 rows, in a segment; BLOCKS, on a multiprocessor;
// GATED: 1 for silu(gate x) * (up x); SOURCE: whose rows of x a segment's slots are: DENSE (their own number),
// TOKENS (slot_pairs / top_k) or SLOTS (their own, where slot_pairs says that they aren't padding);
// RESIDUAL: 1 to add one.
#include "weights.cuh"

#define DENSE 0
#define TOKENS 1
#define SLOTS 2

constexpr int ROWS = 8 * TILES, HEIGHT = (GATED ? 8 : 16) * TALL;

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) short_segments(
    const u16 *x,
#if GATED
    MATRIX(gate), MATRIX(up),
#else
    MATRIX(matrix),
#endif
#if SOURCE != DENSE
    const int *slot_pairs, const int *segment_experts,
#endif
#if RESIDUAL
    const u16 *residual,
#endif
    u16 *y, int count, int top_k, int inner, int outer) {
  __shared__ float partial[WARPS][TILES][TALL][4][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
  const int segment = blockIdx.y;

  const u16 *rows[TILES];
  bool real[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int slot = segment * ROWS + 8 * tile + group;
#if SOURCE == DENSE
    const int source = slot;
    real[tile] = slot < count;
#else
    const int pair = slot_pairs[slot], source = SOURCE == TOKENS ? pair / top_k : slot;
    real[tile] = pair < count;
#endif
    rows[tile] = x + u64(source) * inner + 32 * quarter;
  }
#if SOURCE == DENSE
  const u64 first = blockIdx.x * HEIGHT + group;
#else
  const u64 first = u64(segment_experts[segment]) * outer + blockIdx.x * HEIGHT + group;
  // Padding comes last.
  if (slot_pairs[segment * ROWS] >= count) return;
#endif
#if GATED
  const Row upper = ROW(gate, first, inner, quarter), lower = ROW(up, first, inner, quarter);
  constexpr int STEP = 8;
#else
  const Row upper = ROW(matrix, first, inner, quarter), lower = ROW(matrix, first + 8, inner, quarter);
  constexpr int STEP = 16;
#endif

  float sums[TILES][TALL][4] = {};
  const int blocks = inner / 128;
  for (int block = warp; block < blocks; block += WARPS) {
    Stored above[TALL], below[TALL];
#pragma unroll
    for (int tall = 0; tall < TALL; tall++) {
      above[tall] = upper.load(block, STEP * tall, inner);
      below[tall] = lower.load(block, STEP * tall, inner);
    }
    uint4 entries[TILES][4];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        entries[tile][i] = real[tile] ? load16(rows[tile] + block * 128 + 8 * i) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int step = 0; step < 8; step++)
#pragma unroll
      for (int tall = 0; tall < TALL; tall++) {
        const u32 a0 = weights_of(above[tall], step, 0), a1 = weights_of(below[tall], step, 0);
        const u32 a2 = weights_of(above[tall], step, 1), a3 = weights_of(below[tall], step, 1);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          multiply_accumulate(sums[tile][tall], a0, a1, a2, a3, activations_of(entries[tile], step, 0),
                              activations_of(entries[tile], step, 1));
      }
  }

#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int tall = 0; tall < TALL; tall++)
#pragma unroll
      for (int i = 0; i < 4; i++) partial[warp][tile][tall][i][lane] = sums[tile][tall][i];
  __syncthreads();

  // Entries 0 and 1 of a lane are of the upper 8 rows, 2 and 3 of the lower ones.
  constexpr int ENTRIES = GATED ? 2 : 4;
  for (int index = threadIdx.x; index < TILES * TALL * ENTRIES * 32; index += 32 * WARPS) {
    const int of = index % 32, entry = index / 32 % ENTRIES, tall = index / 32 / ENTRIES % TALL;
    const int tile = index / 32 / ENTRIES / TALL;
    const int slot = segment * ROWS + 8 * tile + 2 * (of % 4) + entry % 2;
#if SOURCE == DENSE
    if (slot >= count) continue;
#else
    if (slot_pairs[slot] >= count) continue;
#endif
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += partial[w][tile][tall][entry][of];
    const u64 at = u64(slot) * outer + blockIdx.x * HEIGHT + STEP * tall + 8 * (entry / 2) + of / 4;
#if GATED
    float other = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) other += partial[w][tile][tall][entry + 2][of];
    sum = sum / (1 + __expf(-sum)) * other;
#endif
#if RESIDUAL
    sum += bf16_to_float(residual[at]);
#endif
    y[at] = float_to_bf16(sum);
  }
}
