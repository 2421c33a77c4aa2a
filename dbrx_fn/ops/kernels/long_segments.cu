// Segments of up to 256 rows times their expert's matrix, as in prompts and training. Arithmetic is the bound.
//
// Weights are operand A of the tensor cores, which may come from registers. They are read from memory in the order that
// the tensor cores need, and are converted to bfloat16 while the tensor cores multiply the previous ones. A segment's
// rows are operand B, with up to 256 columns, so each weight is unpacked once for many rows. B lies in shared memory. A
// ninth warp copies it there from the layout of pack_rows.cu, one block of 128 entries at a time, a few blocks ahead.
//
// A block of threads computes 128 rows of the matrix for one segment: each group of four warps computes 64. It computes
// only as many columns as the segment has rows, in steps of 64.
//
// GATED: each warp takes 8 rows of the gate's matrix and the same 8 rows of up's, so one lane's registers hold all that
// silu(gate x) * (up x) needs. The result has the layout of pack_rows.cu, for the product with w2.
//
// Macros: those of weights.cuh.
//   GATED: 1 for silu(gate x) * (up x).
//   DENSE: 1 for a single matrix. All its segments but the last are full.
//   STAGES: blocks of B in shared memory.
#include "hopper.cuh"
#include "weights.cuh"

constexpr int ROWS = 256;                    // rows of a segment
constexpr int HALF_BYTES = ROWS * 64 * 2;    // bytes of 64 entries of a segment's rows
constexpr int BLOCK_BYTES = 2 * HALF_BYTES;  // bytes of 128 entries
constexpr int NEIGHBOURS = 4;                // segments whose blocks run side by side, to share weights in L2

struct Task {
  const u8 *x;  // the segment's packed rows
  u32 full, empty, buffers;
  int inner, warp, lane;
};

// Multiplies a lane's two rows of weights by the segment's rows.
template <int COLUMNS>
__device__ __forceinline__ void multiply(const Task &task, const Row &upper, const Row &lower, float *sums) {
  const int blocks = task.inner / 128;
  u32 a[2][16];
  // Operands must not be registers that a load in flight writes. Otherwise ptxas serializes the products.
  const u32 zero = FORMAT == BFLOAT16 ? u32(task.inner) >> 31 : 0;
  Stored above = upper.load(0), below = lower.load(0);
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; i++) sums[i] = 0;

  for (int block = 0; block < blocks; block++) {
    const int stage = block % STAGES;
    wait(task.full + 8 * stage, block / STAGES & 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      // Now the products that read these registers are finished. Those of the half before still run.
      wait_for_products<1>();
      hold<16>(a[half]);
      if (half && block && task.lane == 0) arrive(task.empty + 8 * ((block - 1) % STAGES));
#pragma unroll
      for (int step = 0; step < 4; step++) {
        a[half][4 * step] = weights_of(above, 4 * half + step, 0) | zero;
        a[half][4 * step + 1] = weights_of(below, 4 * half + step, 0) | zero;
        a[half][4 * step + 2] = weights_of(above, 4 * half + step, 1) | zero;
        a[half][4 * step + 3] = weights_of(below, 4 * half + step, 1) | zero;
      }
      hold<16>(a[half]);
      if (half) above = upper.load(min(block + 1, blocks - 1)), below = lower.load(min(block + 1, blocks - 1));
      hold<COLUMNS / 2>(sums);
      begin_products();
      const u64 b = swizzled_matrix(task.buffers + stage * BLOCK_BYTES + half * HALF_BYTES);
#pragma unroll
      for (int step = 0; step < 4; step++) multiply_accumulate<COLUMNS>(sums, a[half] + 4 * step, b + 2 * step);
      end_products();
      hold<COLUMNS / 2>(sums);
    }
  }
  wait_for_products<0>();
  hold<COLUMNS / 2>(sums);
}

extern "C" __global__ void __launch_bounds__(384, 1) long_segments(
    const u8 *x,
#if GATED
    MATRIX(gate), MATRIX(up),
#else
    MATRIX(matrix),
#endif
#if !DENSE
    const int *slot_pairs, const int *segment_experts,
#endif
    u16 *y, int count, int segments, int inner, int outer) {
  extern __shared__ __align__(1024) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;

  const int tiles = outer / (GATED ? 64 : 128);
  const int neighbours = blockIdx.x / (NEIGHBOURS * tiles) * NEIGHBOURS;
  const int side_by_side = min(NEIGHBOURS, segments - neighbours);
  const int within = blockIdx.x - neighbours * tiles;
  const int segment = neighbours + within % side_by_side, tile = within / side_by_side;

#if DENSE
  const int real = min(ROWS, count - segment * ROWS);
  const u64 first = 0;
#else
  // Padding comes last.
  const int real = __syncthreads_count(threadIdx.x < ROWS && slot_pairs[segment * ROWS + threadIdx.x] < count);
  if (real == 0) return;
  const u64 first = u64(segment_experts[segment]) * outer;
#endif
  const int columns = (real + 63) / 64 * 64;

  const u32 buffers = shared_address(shared), outgoing = buffers + STAGES * BLOCK_BYTES;
  const u32 full = outgoing + (GATED ? HALF_BYTES : 0), empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      init_barrier(full + 8 * stage, 1);
      init_barrier(empty + 8 * stage, 8);
    }
    publish_to_copies();
  }
  __syncthreads();

  const u64 block_count = inner / 128;
  const Task task = {x + segment * block_count * BLOCK_BYTES, full, empty, buffers, inner, warp, lane};
  if (warp >= 8) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == 8 && lane == 0) {
      for (int block = 0; block < int(block_count); block++) {
        const int stage = block % STAGES;
        if (block >= STAGES) wait(empty + 8 * stage, (block / STAGES - 1) & 1);
        arrive_expecting(full + 8 * stage, 2 * columns * 128);
        for (int half = 0; half < 2; half++)
          copy_to_shared(buffers + stage * BLOCK_BYTES + half * HALF_BYTES,
                         task.x + u64(block) * BLOCK_BYTES + half * HALF_BYTES, columns * 128, full + 8 * stage);
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");

#if GATED
  // The 64 results are the entries of half a block of w2's inner axis. A warp's 8 are neighbours in one quarter,
  // ordered as activations_of pairs them.
  const int block = tile / 2, half = tile % 2, part = warp / 4, of_quarter = warp % 4;
  const int order = NIBBLES ? group / 2 + 4 * (group % 2) : group;
  const u64 row = first + block * 128 + 32 * of_quarter + 16 * half + 8 * part + order;
  const Row upper = ROW(gate, row, inner, quarter), lower = ROW(up, row, inner, quarter);
#else
  const u64 row = first + tile * 128 + 16 * warp + group;
  const Row upper = ROW(matrix, row, inner, quarter), lower = ROW(matrix, row + 8, inner, quarter);
#endif

  float sums[ROWS / 2];
  if (columns == 256) multiply<256>(task, upper, lower, sums);
  else if (columns == 192) multiply<192>(task, upper, lower, sums);
  else if (columns == 128) multiply<128>(task, upper, lower, sums);
  else multiply<64>(task, upper, lower, sums);

#pragma unroll
  for (int i = 0; i < ROWS / 8; i++) {
    if (8 * i >= columns) break;
    const int slot = 8 * i + group;
#if GATED
    float values[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float gated = sums[4 * i + j];
      values[j] = gated / (1 + __expf(-gated)) * sums[4 * i + 2 + j];
    }
    const u32 pair = transposed(pack_bf16(values[0], values[1]));
    const int chunk = (4 * part + quarter) ^ (slot % 8);
    const u32 to = outgoing + slot * 128 + chunk * 16 + of_quarter * 4;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(pair) : "memory");
#else
    const u32 pair = transposed(pack_bf16(sums[4 * i], sums[4 * i + 1]));
    const u32 below = transposed(pack_bf16(sums[4 * i + 2], sums[4 * i + 3]));
    u16 *out = y + (u64(segment) * ROWS + slot) * outer + tile * 128 + 16 * warp + 2 * quarter;
    if (slot < real) {
      *reinterpret_cast<u32 *>(out) = pair;
      *reinterpret_cast<u32 *>(out + 8) = below;
    }
#endif
  }
#if GATED
  publish_to_copies();
  asm volatile("bar.sync 1, 256;" ::: "memory");
  if (threadIdx.x == 0) {
    const u64 blocks_out = outer / 128;
    u8 *to = reinterpret_cast<u8 *>(y) + (segment * blocks_out + block) * BLOCK_BYTES + half * HALF_BYTES;
    copy_to_global(to, outgoing, columns * 128);
  }
#endif
}
