// Segments of few rows times their expert's matrix: what decoding does. The weights' bytes are the bound.
//
// A block computes 16 TALL rows of the matrix (half as many of each of two, where they are gated) for one segment. Its
// warps share the inner axis: warp w takes DEPTH blocks of 128 entries from DEPTH w on, then from DEPTH (w + WARPS) on,
// and so on, so that together they read long stretches, and their sums meet in shared memory. (A stretch for each warp
// takes half as long again.) Weights are tensor cores' operand A, of 16 rows, activations operand B, of 8.
//
// MIXED: the segments are a token's choices, a row each. A block takes all of them in turn, and what the experts say is
// weighed and added up before it leaves the registers. The residual is the token's.
//
// Macros: those of weights.cuh; WARPS; TALL; DEPTH, which divides the inner axis' blocks; TILES, of 8 rows, in a
// segment; BLOCKS, on a multiprocessor; GATED: 1 for silu(gate x) * (up x); SOURCE: whose rows of x a segment's slots
// are: DENSE (their own number), TOKENS (slot_pairs / top_k) or SLOTS (their own, where slot_pairs says that they aren't
// padding); MIXED: how many choices, or 0; RESIDUAL: 1 to add one.
#include "weights.cuh"

#define DENSE 0
#define TOKENS 1
#define SLOTS 2

constexpr int ROWS = 8 * TILES, HEIGHT = (GATED ? 8 : 16) * TALL, STEP = GATED ? 8 : 16;

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
#if MIXED
    const u16 *expert_weights,
#endif
#if RESIDUAL
    const u16 *residual,
#endif
    u16 *y, int count, int top_k, int inner, int outer) {
  __shared__ float partial[WARPS][TILES][TALL][4][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;

  // Adds to sums the products of a segment's rows and what a warp takes of the inner axis from `block` on; returns the
  // block that would be next, behind the end.
  const auto add_products = [&](float (*sums)[TALL][4], int segment, int block) {
    // What stands in for a row of padding is any other one: a column of the product is a matter of its row alone.
    const u16 *rows[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const int slot = segment * ROWS + 8 * tile + group;
#if SOURCE == DENSE
      const int source = min(slot, count - 1);
#else
      const int real_slot = slot_pairs[slot] < count ? slot : segment * ROWS;
      const int source = SOURCE == TOKENS ? slot_pairs[real_slot] / top_k : real_slot;
#endif
      rows[tile] = x + u64(source) * inner + 128 * block + 32 * quarter;
    }
#if SOURCE == DENSE
    const u64 first = blockIdx.x * HEIGHT + group;
#else
    const u64 first = u64(segment_experts[segment]) * outer + blockIdx.x * HEIGHT + group;
#endif
#if GATED
    Row upper = ROW(gate, first, inner, quarter), lower = ROW(up, first, inner, quarter);
    lower.advance(block);
#else
    Row upper = ROW(matrix, first, inner, quarter);
#endif
    upper.advance(block);

    for (; block < inner / 128; block += WARPS * DEPTH) {
      Stored above[DEPTH][TALL], below[DEPTH][TALL];
#pragma unroll
      for (int tall = 0; tall < TALL; tall++)
#pragma unroll
        for (int next = 0; next < DEPTH; next++) {
          above[next][tall] = upper.load(next, STEP * tall, inner);
#if GATED
          below[next][tall] = lower.load(next, STEP * tall, inner);
#else
          below[next][tall] = upper.load(next, STEP * tall + 8, inner);
#endif
        }
#pragma unroll
      for (int next = 0; next < DEPTH; next++) {
        uint4 entries[TILES][4];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
          for (int i = 0; i < 4; i++) entries[tile][i] = load16(rows[tile] + 128 * next + 8 * i);
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
      upper.advance(WARPS * DEPTH);
#if GATED
      lower.advance(WARPS * DEPTH);
#endif
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) rows[tile] += 128 * WARPS * DEPTH;
    }
    return block;
  };

  float sums[TILES][TALL][4] = {};
#if MIXED
  constexpr int segment = 0;
  // Warps go on in the next segment where they are, so that all have as many blocks.
  for (int choice = 0, block = DEPTH * warp; choice < MIXED; choice++) {
    float said[TILES][TALL][4] = {};
    block = add_products(said, choice, block) - inner / 128;
    const float weight = bf16_to_float(expert_weights[choice]);
#pragma unroll
    for (int i = 0; i < TILES * TALL * 4; i++) (&sums[0][0][0])[i] += weight * (&said[0][0][0])[i];
  }
#else
  const int segment = blockIdx.y;
#if SOURCE != DENSE
  // Padding comes last.
  if (slot_pairs[segment * ROWS] >= count) return;
#endif
  add_products(sums, segment, DEPTH * warp);
#endif

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
#elif MIXED
    if (slot) continue;
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
