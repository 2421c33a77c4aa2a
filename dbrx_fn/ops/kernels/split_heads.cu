// Queries, keys and values of many tokens from their projection: clamp, RoPE, split into heads.
//
// A block takes one token. A thread takes 8 neighbouring entries of a head's first half and their partners, which RoPE
// rotates together.
//
// Macros: HEAD_DIM, a multiple of 16; THREADS per block, at least HEAD_DIM / 2.
#include "rotary.cuh"

constexpr int HALF = HEAD_DIM / 2, PARTS = HALF / 8;

extern "C" __global__ void __launch_bounds__(THREADS)
    split_heads(const u16 *projected, const int *offsets, const float *inverse_frequencies, u16 *q, u16 *k, u16 *v,
                int time, int n_heads, int kv_n_heads, float clip) {
  __shared__ float2 turns[HALF];
  const int token = blockIdx.x, row = token / time, at = token % time, heads = n_heads + 2 * kv_n_heads;
  if (threadIdx.x < HALF) turns[threadIdx.x] = turn_of(offsets[row] + at, inverse_frequencies[threadIdx.x]);
  __syncthreads();

  for (int index = threadIdx.x; index < heads * PARTS; index += THREADS) {
    const int head = index / PARTS, first = 8 * (index % PARTS);
    const u16 *source = projected + (u64(token) * heads + head) * HEAD_DIM + first;
    const uint4 low = load16(source), high = load16(source + HALF);
    const u32 lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
    const bool turned = head < n_heads + kv_n_heads;
    u32 ahead[4], behind[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float a[2] = {low_to_float(lows[i]), high_to_float(lows[i])};
      float b[2] = {low_to_float(highs[i]), high_to_float(highs[i])};
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float x = clamp(a[j], clip), y = clamp(b[j], clip);
        const float2 turn = turns[first + 2 * i + j];
        a[j] = turned ? x * turn.x - y * turn.y : x, b[j] = turned ? x * turn.y + y * turn.x : y;
      }
      ahead[i] = pack_bf16(a[0], a[1]), behind[i] = pack_bf16(b[0], b[1]);
    }
    // Queries lie by token, keys and values by head, as the cache has them.
    u16 *target = q + (u64(token) * n_heads + head) * HEAD_DIM;
    if (head >= n_heads) {
      const int within = (head - n_heads) % kv_n_heads;
      target = (turned ? k : v) + ((u64(row) * kv_n_heads + within) * time + at) * HEAD_DIM;
    }
    *(uint4 *)(target + first) = make_uint4(ahead[0], ahead[1], ahead[2], ahead[3]);
    *(uint4 *)(target + HALF + first) = make_uint4(behind[0], behind[1], behind[2], behind[3]);
  }
}
