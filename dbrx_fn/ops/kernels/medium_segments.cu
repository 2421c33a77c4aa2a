// Segments of some dozens of rows times their expert's matrix, as in decoding many sequences and in short prompts.
// Reading the weights is the bound.
//
// As in long_segments.cu, weights are operand A of the tensor cores, from registers, and a segment's rows are operand B
// in shared memory, in the layout of pack_rows.cu. So rows don't pass through the first cache again for each few rows
// of the matrix. Here a warp loads weights several blocks of the inner axis ahead, and two blocks of threads share a
// multiprocessor.
//
// Four warps are a group. A group computes 64 rows of the matrix. It computes only as many columns as the segment has
// rows: 8, or a multiple of 16. Each part's first warp starts the copies of B. (A warp for that alone would leave the
// others fewer registers.)
//
// PARTS: groups with the same rows of the matrix divide the inner axis. Part p takes block p, then block p + PARTS, and
// so on. This keeps all multiprocessors busy if the matrix has few rows.
//
// GATED: as in long_segments.cu.
//
// Macros: those of weights.cuh, with FORMAT AFFINE4.
//   ROWS: the most rows of a segment.
//   GROUPS: groups in a block of threads, PARTS for each 64 rows of the matrix.
//   AHEAD: a warp's blocks of weights in registers. PARTS * AHEAD divides the number of blocks.
//   BLOCKS: blocks of threads per multiprocessor.
//   GATED: 1 for silu(gate x) * (up x). Then PARTS is 1, and GROUPS 2 or 4.
//   DENSE: 1 for a single matrix. All its segments but the last are full.
//   RESIDUAL: 1 to add a residual to a single matrix's products.
//   STAGES: a part's blocks of B in shared memory.
#define WIDE_SCALES
#include "results.cuh"

constexpr int HALF_BYTES = ROWS * 64 * 2;    // bytes of 64 entries of that many rows
constexpr int BLOCK_BYTES = 2 * HALF_BYTES;  // bytes of 128 entries
constexpr int TILES = GROUPS / PARTS;        // the block's rows of the matrix, in units of 64
constexpr int LEAD = STAGES - 2;             // a part's blocks of B that are copied before they are needed

template <>
__device__ __forceinline__ void multiply_accumulate<8>(float *sums, const u32 *a, u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3}, "
      "{%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
      : SUMS4(sums, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
__device__ __forceinline__ void multiply_accumulate<16>(float *sums, const u32 *a, u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7}, "
      "{%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
      : SUMS4(sums, 0), SUMS4(sums, 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
__device__ __forceinline__ void multiply_accumulate<32>(float *sums, const u32 *a, u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
      : SUMS(sums, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
__device__ __forceinline__ void multiply_accumulate<48>(float *sums, const u32 *a, u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, "
      "{%24, %25, %26, %27}, %28, 1, 1, 1, 0;"
      : SUMS(sums, 0), SUMS4(sums, 16), SUMS4(sums, 20)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

struct Task {
  const u8 *x;
  Segment segment;
  u32 full, empty, buffers;
  int inner, blocks, part, lane;
  bool copies;  // whether this thread starts its part's copies

  // Starts to copy a block of the rows. Columns beyond them keep what was there. Nothing reads their products.
  __device__ __forceinline__ void copy(int block, int stage) const {
    const u32 arrived = full + 8 * stage, to = buffers + stage * BLOCK_BYTES, bytes = segment.rows * 128;
    const u8 *from = x + segment.half_block(inner, block, 0);
    arrive_expecting(arrived, 2 * bytes);
    copy_to_shared(to, from, bytes, arrived);
    copy_to_shared(to + HALF_BYTES, from + bytes, bytes, arrived);
  }
};

// Multiplies a lane's two rows of weights by the segment's rows.
template <int COLUMNS>
__device__ __forceinline__ void multiply(const Task &task, Row upper, Row lower, float *sums) {
  u32 a[16];
  // Blocks that are loaded at the same time. Memory gives longer stretches of a row faster, but with many columns the
  // products wait for the weights.
  constexpr int TOGETHER = PARTS == 1 && COLUMNS < 64 ? AHEAD : 1;
  // Many columns leave no registers for the factors.
  constexpr bool SCALED = COLUMNS <= 32;
  Stored above[AHEAD], below[AHEAD];
  upper.advance(task.part), lower.advance(task.part);
#pragma unroll
  for (int i = 0; i < AHEAD; i++) above[i] = upper.load(PARTS * i), below[i] = lower.load(PARTS * i);
  if (task.copies)
    for (int i = 0; i < LEAD && task.part + PARTS * i < task.blocks; i++) task.copy(task.part + PARTS * i, i);
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; i++) sums[i] = 0;

  int stage = 0, before = 0;
  u32 phase = 0;
  for (int first = task.part; first < task.blocks; first += PARTS * AHEAD) {
    upper.advance(PARTS * AHEAD), lower.advance(PARTS * AHEAD);
    const bool more = first + PARTS * AHEAD < task.blocks;
#pragma unroll
    for (int next = 0; next < AHEAD; next++) {
      if (task.copies) {
        // The buffer is that of the last block but one.
        const int coming = first + PARTS * (next + LEAD), to = stage < 2 ? stage + LEAD : stage - 2;
        if (coming < task.blocks) {
          wait(task.empty + 8 * to, stage < 2 ? phase ^ 1 : phase);
          task.copy(coming, to);
        }
      }
      __syncwarp();
      wait(task.full + 8 * stage, phase);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        // Now the products that read these registers are finished.
        wait_for_products<0>();
        hold<16>(a);
        if (half == 0 && (first >= PARTS * AHEAD || next) && task.lane == 0) arrive(task.empty + 8 * before);
#pragma unroll
        for (int step = 0; step < 4; step++) {
          a[4 * step] = operand<SCALED>(above[next], 4 * half + step, 0);
          a[4 * step + 1] = operand<SCALED>(below[next], 4 * half + step, 0);
          a[4 * step + 2] = operand<SCALED>(above[next], 4 * half + step, 1);
          a[4 * step + 3] = operand<SCALED>(below[next], 4 * half + step, 1);
        }
        hold<16>(a);
        if (half && next % TOGETHER == TOGETHER - 1)
#pragma unroll
          for (int i = next + 1 - TOGETHER; i <= next; i++)
            upper.reload(above[i], PARTS * i, more), lower.reload(below[i], PARTS * i, more);
        hold<COLUMNS / 2>(sums);
        begin_products();
        const u64 b = swizzled_matrix(task.buffers + stage * BLOCK_BYTES + half * HALF_BYTES);
#pragma unroll
        for (int step = 0; step < 4; step++) multiply_accumulate<COLUMNS>(sums, a + 4 * step, b + 2 * step);
        end_products();
        hold<COLUMNS / 2>(sums);
      }
      before = stage;
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
  }
  wait_for_products<0>();
  hold<COLUMNS / 2>(sums);
  if (SCALED)
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) sums[i] *= 0x1p64f;
}

// Multiplies by the segment's first `columns` rows.
template <int COLUMNS>
__device__ __forceinline__ void multiply_columns(const Task &task, const Row &upper, const Row &lower, float *sums,
                                                 int columns) {
  if constexpr (COLUMNS < ROWS) {
    if (columns > COLUMNS) return multiply_columns<COLUMNS == 8 ? 16 : COLUMNS + 16>(task, upper, lower, sums, columns);
  }
  multiply<COLUMNS>(task, upper, lower, sums);
}

extern "C" __global__ void __launch_bounds__(128 * GROUPS, BLOCKS) medium_segments(
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
    u16 *y, int count, int inner, int outer) {
  extern __shared__ __align__(1024) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
  const int tiles = outer / (GATED ? 32 * TILES : 64 * TILES);
  const int number = blockIdx.x / tiles, tile = blockIdx.x % tiles;

#if DENSE
  const Segment segment = dense_segment(number, ROWS, count);
  const int stored = min(segment.rows, count - segment.first);
  const u64 first = 0;
#else
  const Segment segment = planned_segment(first_slots, number);
  const u64 first = u64(segment_experts[number]) * outer;
  if (segment.rows == 0) return;
  const int stored = segment.rows;
#endif
  const int columns = segment.rows == 8 ? 8 : (segment.rows + 15) / 16 * 16;

  const u32 buffers = shared_address(shared), full = buffers + PARTS * STAGES * BLOCK_BYTES;
  const u32 empty = full + 8 * PARTS * STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < PARTS * STAGES; stage++) {
      init_barrier(full + 8 * stage, 1);
      init_barrier(empty + 8 * stage, 4 * TILES);
    }
    publish_to_copies();
  }
  __syncthreads();

  const int part = warp / 4 % PARTS, of_tile = warp / (4 * PARTS) * 4 + warp % 4;
  const Task task = {x,
                     segment,
                     full + 8 * part * STAGES,
                     empty + 8 * part * STAGES,
                     buffers + part * STAGES * BLOCK_BYTES,
                     inner,
                     inner / 128,
                     part,
                     lane,
                     of_tile == 0 && lane == 0};

#if GATED
  // The results are the entries of a half or a whole block of w2's inner axis.
  const int first_out = tile * 32 * TILES, block = first_out / 128;
  const int half = first_out / 64 % 2 + of_tile / 8, eight = of_tile / 4 % 2, of_quarter = of_tile % 4;
  const u64 row = gated_row(first + block * 128, of_quarter, half, eight, group);
  const Row upper = ROW(gate, row, inner, quarter), lower = ROW(up, row, inner, quarter);
#else
  const u64 row = first + tile * 64 * TILES + 16 * of_tile + group;
  const Row upper = ROW(matrix, row, inner, quarter), lower = ROW(matrix, row + 8, inner, quarter);
#endif

  float sums[ROWS / 2];
  multiply_columns<8>(task, upper, lower, sums, columns);

  // From here on nothing reads B, so its place can be used.
#if GATED || PARTS > 1
  __syncthreads();
#endif
#if PARTS > 1
  float(*partial)[4 * TILES][ROWS / 2][32] = reinterpret_cast<float(*)[4 * TILES][ROWS / 2][32]>(shared);
  if (part)
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++)
      if (2 * i < columns) partial[part - 1][of_tile][i][lane] = sums[i];
  __syncthreads();
  if (part) return;
#pragma unroll
  for (int i = 0; i < ROWS / 2; i++)
#pragma unroll
    for (int other = 1; other < PARTS; other++)
      if (2 * i < columns) sums[i] += partial[other - 1][of_tile][i][lane];
#endif

#pragma unroll
  for (int i = 0; i < ROWS / 8; i++) {
    if (8 * i >= columns) break;
    const int slot = 8 * i + group;
#if GATED
    store_gated(sums + 4 * i, buffers + of_tile / 8 * HALF_BYTES, of_quarter, eight, slot, quarter);
#else
    // A lane's results: `row` and `row + 8` of the matrix, for two slots.
#pragma unroll
    for (int below = 0; below < 2; below++) {
      u32 pair = transposed(pack_bf16(sums[4 * i + 2 * below], sums[4 * i + 2 * below + 1]));
      const u64 at = u64(segment.first + slot) * outer + tile * 64 * TILES + 16 * of_tile + 8 * below + 2 * quarter;
      if (slot < stored) {
#if RESIDUAL
        pair = add_pairs(pair, *reinterpret_cast<const u32 *>(residual + at));
#endif
        *reinterpret_cast<u32 *>(y + at) = pair;
      }
    }
#endif
  }
#if GATED
  publish_to_copies();
  __syncthreads();
  if (threadIdx.x < TILES / 2) {
    const int of_half = first_out / 64 % 2 + threadIdx.x;
    copy_to_global(reinterpret_cast<u8 *>(y) + segment.half_block(outer, block, of_half),
                   buffers + threadIdx.x * HALF_BYTES, segment.rows * 128);
  }
#endif
}
