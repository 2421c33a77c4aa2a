// Segments of up to 256 rows times their expert's matrix, as in prompts and training. Arithmetic is the bound.
//
// Weights are operand A of the tensor cores, which may come from registers. They are read from memory in the order that
// the tensor cores need, and are converted to bfloat16 while the tensor cores multiply the previous ones. A segment's
// rows are operand B, with up to 256 columns, so each weight is unpacked once for many rows. B lies in shared memory. A
// ninth warp copies it there from the layout of pack_rows.cu, one block of 128 entries at a time, a few blocks ahead.
//
// A block of threads computes 128 rows of the matrix for one segment: each group of four warps computes 64. It computes
// only as many columns as the segment has rows, rounded up to one of a few widths. Fewer columns leave room for more
// blocks of B in shared memory, which they need: their products take less time, and copies take the same.
//
// GATED: each warp takes 8 rows of the gate's matrix and the same 8 rows of up's, so one lane's registers hold all that
// silu(gate x) * (up x) needs. The result has the layout of pack_rows.cu, for the product with w2.
//
// Macros: those of weights.cuh.
//   GATED: 1 for silu(gate x) * (up x).
//   DENSE: 1 for a single matrix. All its segments but the last are full.
//   RESIDUAL: 1 to add a residual to a single matrix's products.
//   STAGES: blocks of B with 256 columns in shared memory.
//   AHEAD, MOST_AHEAD: blocks of weights that a warp loads ahead with many and with few columns. Both divide the number
//     of blocks.
#define WIDE_SCALES
#include "results.cuh"

constexpr int ROWS = 256;                // the most rows of a segment
constexpr int BLOCK_BYTES = ROWS * 256;  // bytes of 128 entries of that many rows
constexpr int NEIGHBOURS = 4;            // segments whose blocks run side by side, to share weights in L2

constexpr int MOST_STAGES = 8;

// The numbers of columns that products are compiled for.
__host__ __device__ constexpr int wider(int columns) {
  return columns < 64 ? 64 : columns < 96 ? 96 : columns < 128 ? 128 : columns < 160 ? 160 : columns < 208 ? 208 : ROWS;
}
// How many blocks of this number of columns are in shared memory.
__host__ __device__ constexpr int stages_of(int columns) {
  return STAGES * ROWS / columns < MOST_STAGES ? STAGES * ROWS / columns : MOST_STAGES;
}

struct Task {
  u32 full, empty, buffers;
  int inner, warp, lane;
};

// Multiplies a lane's two rows of weights by the segment's rows.
template <int COLUMNS>
__device__ __forceinline__ void multiply(const Task &task, const Row &upper, const Row &lower, float *sums) {
  constexpr int DEEP = stages_of(COLUMNS);
  // Many columns leave few registers for weights, and the most none for the factors of scaled ones.
  constexpr int FETCHED = COLUMNS <= 160 ? MOST_AHEAD : AHEAD;
  constexpr bool SCALED = FORMAT == AFFINE4 && COLUMNS < ROWS;
  const int blocks = task.inner / 128;
  u32 a[2][16];
  // Operands must not be registers that a load in flight writes. Otherwise ptxas serializes the products.
  const u32 zero = FORMAT == BFLOAT16 ? u32(task.inner) >> 31 : 0;
  Stored above[FETCHED], below[FETCHED];
#pragma unroll
  for (int next = 0; next < FETCHED; next++) above[next] = upper.load(next), below[next] = lower.load(next);
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; i++) sums[i] = 0;

  for (int first = 0; first < blocks; first += FETCHED) {
#pragma unroll
    for (int next = 0; next < FETCHED; next++) {
      const int block = first + next, stage = block % DEEP;
      wait(task.full + 8 * stage, block / DEEP & 1);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        // Now the products that read these registers are finished. Those of the half before still run.
        wait_for_products<1>();
        hold<16>(a[half]);
        if (half && block && task.lane == 0) arrive(task.empty + 8 * ((block - 1) % DEEP));
#pragma unroll
        for (int step = 0; step < 4; step++) {
          a[half][4 * step] = operand<SCALED>(above[next], 4 * half + step, 0) | zero;
          a[half][4 * step + 1] = operand<SCALED>(below[next], 4 * half + step, 0) | zero;
          a[half][4 * step + 2] = operand<SCALED>(above[next], 4 * half + step, 1) | zero;
          a[half][4 * step + 3] = operand<SCALED>(below[next], 4 * half + step, 1) | zero;
        }
        hold<16>(a[half]);
        if (half) {
          const int later = min(block + FETCHED, blocks - 1);
          above[next] = upper.load(later), below[next] = lower.load(later);
        }
        hold<COLUMNS / 2>(sums);
        begin_products();
        const u64 b = swizzled_matrix(task.buffers + (2 * stage + half) * COLUMNS * 128);
#pragma unroll
        for (int step = 0; step < 4; step++) multiply_accumulate<COLUMNS>(sums, a[half] + 4 * step, b + 2 * step);
        end_products();
        hold<COLUMNS / 2>(sums);
      }
    }
  }
  wait_for_products<0>();
  hold<COLUMNS / 2>(sums);
  if (SCALED)
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) sums[i] *= 0x1p64f;
}

// Multiplies by the first `columns` rows of the segment, at least COLUMNS.
template <int COLUMNS>
__device__ __forceinline__ void multiply_columns(const Task &task, const Row &upper, const Row &lower, float *sums,
                                                 int columns) {
  if constexpr (COLUMNS < ROWS) {
    if (columns > COLUMNS) return multiply_columns<wider(COLUMNS)>(task, upper, lower, sums, columns);
  }
  multiply<COLUMNS>(task, upper, lower, sums);
}

extern "C" __global__ void __launch_bounds__(384, 1) long_segments(
    const u8 *x,
#if GATED
    MATRIX(gate), MATRIX(up),
#else
    MATRIX(matrix),
#endif
#if !DENSE
    const int *segment_experts, const int *first_slots,
#endif
#if RESIDUAL
    const u16 *residual,
#endif
    u16 *y, int count, int segments, int inner, int outer) {
  extern __shared__ __align__(1024) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;

  const int tiles = outer / (GATED ? 64 : 128);
  const int neighbours = blockIdx.x / (NEIGHBOURS * tiles) * NEIGHBOURS;
  const int side_by_side = min(NEIGHBOURS, segments - neighbours);
  const int within = blockIdx.x - neighbours * tiles;
  const int number = neighbours + within % side_by_side, tile = within / side_by_side;

#if DENSE
  const Segment segment = dense_segment(number, ROWS, count);
  const int stored = min(segment.rows, count - segment.first);
  const u64 first = 0;
#else
  const Segment segment = planned_segment(first_slots, number);
  if (segment.rows == 0) return;
  const int stored = segment.rows;
  const u64 first = u64(segment_experts[number]) * outer;
#endif
  const int columns = wider(segment.rows - 1);

  const u32 buffers = shared_address(shared), full = buffers + STAGES * BLOCK_BYTES, empty = full + 8 * MOST_STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < MOST_STAGES; stage++) {
      init_barrier(full + 8 * stage, 1);
      init_barrier(empty + 8 * stage, 8);
    }
    publish_to_copies();
  }
  __syncthreads();

  const Task task = {full, empty, buffers, inner, warp, lane};
  if (warp >= 8) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == 8 && lane == 0) {
      const int stages = stages_of(columns);
      for (int block = 0, stage = 0, phase = 1; block < inner / 128; block++) {
        // The first time a stage is free, and this wait returns.
        wait(empty + 8 * stage, phase);
        // Columns beyond the segment's rows keep what was there. Nothing reads their products.
        arrive_expecting(full + 8 * stage, 2 * segment.rows * 128);
        for (int half = 0; half < 2; half++)
          copy_to_shared(buffers + (2 * stage + half) * columns * 128, x + segment.half_block(inner, block, half),
                         segment.rows * 128, full + 8 * stage);
        if (++stage == stages) stage = 0, phase ^= 1;
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");

#if GATED
  // The 64 results are the entries of half a block of w2's inner axis.
  const int block = tile / 2, half = tile % 2, part = warp / 4, of_quarter = warp % 4;
  const u64 row = gated_row(first + block * 128, of_quarter, half, part, group);
  const Row upper = ROW(gate, row, inner, quarter), lower = ROW(up, row, inner, quarter);
#else
  const u64 row = first + tile * 128 + 16 * warp + group;
  const Row upper = ROW(matrix, row, inner, quarter), lower = ROW(matrix, row + 8, inner, quarter);
#endif

  float sums[ROWS / 2];
  multiply_columns<64>(task, upper, lower, sums, columns);
#if GATED
  // The results take the place of the first blocks of B, once all warps have used them.
  asm volatile("bar.sync 1, 256;" ::: "memory");
#endif

#pragma unroll
  for (int i = 0; i < ROWS / 8; i++) {
    if (8 * i >= columns) break;
    const int slot = 8 * i + group;
#if GATED
    store_gated(sums + 4 * i, buffers, of_quarter, part, slot, quarter);
#else
    u32 pair = transposed(pack_bf16(sums[4 * i], sums[4 * i + 1]));
    u32 below = transposed(pack_bf16(sums[4 * i + 2], sums[4 * i + 3]));
    const u64 at = u64(segment.first + slot) * outer + tile * 128 + 16 * warp + 2 * quarter;
    u16 *out = y + at;
    if (slot < stored) {
#if RESIDUAL
      pair = add_pairs(pair, *reinterpret_cast<const u32 *>(residual + at));
      below = add_pairs(below, *reinterpret_cast<const u32 *>(residual + at + 8));
#endif
      *reinterpret_cast<u32 *>(out) = pair;
      *reinterpret_cast<u32 *>(out + 8) = below;
    }
#endif
  }
#if GATED
  publish_to_copies();
  asm volatile("bar.sync 1, 256;" ::: "memory");
  if (threadIdx.x == 0) {
    copy_to_global(reinterpret_cast<u8 *>(y) + segment.half_block(outer, block, half), buffers, segment.rows * 128);
  }
#endif
}
