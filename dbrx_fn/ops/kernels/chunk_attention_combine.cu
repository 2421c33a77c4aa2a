// Merges the parts of chunk_attention.cu. A part's weight is its share of the exponentials.
//
// A warp takes one head of one token. Macros: HEAD_DIM, 64 or 128; WARPS per block.
#include "chunk_tasks.cuh"

constexpr int EACH = HEAD_DIM / 32;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    chunk_attention_combine(const float *parts, const float2 *stats, const int *offsets, u16 *out, int capacity,
                            int time, int n_heads, int splits) {
  const int row = blockIdx.z, token = blockIdx.y, head = blockIdx.x * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (head >= n_heads) return;
  const int n = min(offsets[row] + min(token / TOKENS * TOKENS + TOKENS, time), capacity);
  const int tiles = (n + KEYS - 1) / KEYS, each = Tasks::tiles_of_part(tiles, splits);
  const int written = (tiles + each - 1) / each;
  const u64 of = (u64(row) * time + token) * n_heads + head;
  stats += of * splits;
  parts += of * splits * HEAD_DIM;

  const float2 own = lane < written ? stats[lane] : make_float2(-__uint_as_float(0x7f800000), 0);
  const float factor = exp2_of(own.x - warp_max(own.x)), total = warp_sum(factor * own.y);
  float sums[EACH] = {};
  for (int split = 0; split < written; split++) {
    const float of_split = __shfl_sync(~0u, factor, split);
#pragma unroll
    for (int i = 0; i < EACH; i++) sums[i] += of_split * parts[split * HEAD_DIM + EACH * lane + i];
  }
#pragma unroll
  for (int i = 0; i < EACH; i += 2)
    *(u32 *)(out + of * HEAD_DIM + EACH * lane + i) = pack_bf16(sums[i] / total, sums[i + 1] / total);
}
