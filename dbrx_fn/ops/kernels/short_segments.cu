// Segments of few rows times their expert's matrix, as in decoding. Reading the weights is the bound.
//
// A block computes 16 TALL rows of the matrix for one segment. If gated, it computes 8 TALL rows of each of the two
// matrices.
//
// MIXED: the segments are one token's choices, with one row each. A block takes all of them in turn, and sums the
// experts' weighted outputs in registers. The residual is the token's.
//
// Macros: those of products.cuh. A segment has 8 TILES rows.
//   BLOCKS: blocks per multiprocessor.
//   GATED: 1 for silu(gate x) * (up x).
//   SOURCE: the row of x for a slot: DENSE (the slot's number), TOKENS (slot_pairs / top_k), or SLOTS (the slot's
//     number, if slot_pairs doesn't mark it as padding).
//   MIXED: the number of choices, or 0.
//   RESIDUAL: 1 to add a residual.
#include "products.cuh"

#define DENSE 0
#define TOKENS 1
#define SLOTS 2

constexpr int ROWS = 8 * TILES, HEIGHT = (GATED ? 8 : 16) * TALL, STEP = GATED ? 8 : 16;

// The addresses of a lane's rows of the matrix, among the upper 8 and the lower 8.
struct MatrixRows {
#if GATED
  Row gate, up;
  int inner;
  __device__ __forceinline__ Stored load(int next, int tall, int half) const {
    return half ? up.load(next, STEP * tall, inner) : gate.load(next, STEP * tall, inner);
  }
  __device__ __forceinline__ void advance(int blocks) {
    gate.advance(blocks);
    up.advance(blocks);
  }
#else
  Row row;
  int inner;
  __device__ __forceinline__ Stored load(int next, int tall, int half) const {
    return row.load(next, STEP * tall + 8 * half, inner);
  }
  __device__ __forceinline__ void advance(int blocks) { row.advance(blocks); }
#endif
};

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
  __shared__ Partial partial;
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;

  // Adds a segment's products to `sums`. Takes and returns a block, as add_products does.
  const auto add_segment = [&](float (*sums)[TALL][4], int segment, int block) {
    // Any other row may stand in for padding, since a column of the product depends on its own row only.
    Rows rows;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const int slot = segment * ROWS + 8 * tile + group;
#if SOURCE == DENSE
      const int source = min(slot, count - 1);
#else
      const int real_slot = slot_pairs[slot] < count ? slot : segment * ROWS;
      const int source = SOURCE == TOKENS ? slot_pairs[real_slot] / top_k : real_slot;
#endif
      rows.rows[tile] = x + u64(source) * inner + 32 * quarter;
    }
#if SOURCE == DENSE
    const u64 first = blockIdx.x * HEIGHT + group;
#else
    const u64 first = u64(segment_experts[segment]) * outer + blockIdx.x * HEIGHT + group;
#endif
#if GATED
    MatrixRows matrix_rows{ROW(gate, first, inner, quarter), ROW(up, first, inner, quarter), inner};
#else
    MatrixRows matrix_rows{ROW(matrix, first, inner, quarter), inner};
#endif
    rows.advance(block);
    matrix_rows.advance(block);
    return add_products(sums, matrix_rows, rows, block, inner / 128);
  };

  float sums[TILES][TALL][4] = {};
#if RESIDUAL
  // The load here overlaps those of the weights. At the end everything would wait for it.
  if (warp == 0)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int tall = 0; tall < TALL; tall++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int token = MIXED ? 0 : blockIdx.y * ROWS + 8 * tile + 2 * quarter + i % 2;
          const int at = blockIdx.x * HEIGHT + STEP * tall + 8 * (i / 2) + group;
          if (token < count) sums[tile][tall][i] = bf16_to_float(residual[u64(token) * outer + at]);
        }
#endif
#if MIXED
  constexpr int segment = 0;
  // Warps continue in the next segment where they stopped, so all get about equally many blocks.
  for (int choice = 0, block = DEPTH * warp; choice < MIXED; choice++) {
    float said[TILES][TALL][4] = {};
    block = add_segment(said, choice, block) - inner / 128;
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
  add_segment(sums, segment, DEPTH * warp);
#endif

  partial.put(sums);
  __syncthreads();

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
    float sum = partial.total(tile, tall, entry, of);
    const u64 at = u64(slot) * outer + blockIdx.x * HEIGHT + STEP * tall + 8 * (entry / 2) + of / 4;
#if GATED
    sum = sum / (1 + __expf(-sum)) * partial.total(tile, tall, entry + 2, of);
#endif
    y[at] = float_to_bf16(sum);
  }
}
