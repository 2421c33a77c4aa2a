// The weighted sum of a token's expert outputs, plus perhaps the residual stream, in float32 and rounded once.
//
// A thread computes 8 entries of one token. Macros: TOP_K; THREADS per block; RESIDUAL: 1 to add a residual.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    combine(const u16 *down, const int *pair_slots, const u16 *expert_weights,
#if RESIDUAL
            const u16 *residual,
#endif
            u16 *out, int tokens, int width) {
  const int index = blockIdx.x * THREADS + threadIdx.x, chunks = width / 8;
  const int token = index / chunks, chunk = index % chunks;
  if (token >= tokens) return;

#if RESIDUAL
  const uint4 start = load16(residual + 8 * u64(index));
#else
  const uint4 start = make_uint4(0, 0, 0, 0);
#endif
  uint4 rows[TOP_K];
#pragma unroll
  for (int choice = 0; choice < TOP_K; choice++)
    rows[choice] = load16(down + u64(pair_slots[token * TOP_K + choice]) * width + 8 * chunk);

  const u32 words[4] = {start.x, start.y, start.z, start.w};
  float sums[8];
#pragma unroll
  for (int i = 0; i < 4; i++) sums[2 * i] = low_to_float(words[i]), sums[2 * i + 1] = high_to_float(words[i]);
#pragma unroll
  for (int choice = 0; choice < TOP_K; choice++) {
    const float weight = bf16_to_float(expert_weights[token * TOP_K + choice]);
    const u32 said[4] = {rows[choice].x, rows[choice].y, rows[choice].z, rows[choice].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      sums[2 * i] = fmaf(weight, low_to_float(said[i]), sums[2 * i]);
      sums[2 * i + 1] = fmaf(weight, high_to_float(said[i]), sums[2 * i + 1]);
    }
  }
  *(uint4 *)(out + 8 * u64(index)) = make_uint4(pack_bf16(sums[0], sums[1]), pack_bf16(sums[2], sums[3]),
                                                pack_bf16(sums[4], sums[5]), pack_bf16(sums[6], sums[7]));
}
