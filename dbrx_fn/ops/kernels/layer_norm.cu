// LayerNorm of one row per block. The row is read once; mean and variance are computed in float32 from registers.
//
// Macros: WIDTH of a row. A thread has 8 neighbouring entries, so a block has WIDTH / 8 threads. PACKED: 1 for results in
// the layout of packing.cuh. Then it needs that file's macros, and ROWS, the most rows of a segment.
#if PACKED
#include "packing.cuh"
#else
#include "common.cuh"
#endif

constexpr int THREADS = WIDTH / 8, WARPS = THREADS / 32;

extern "C" __global__ void __launch_bounds__(THREADS) layer_norm(const u16 *x, const u16 *weight, u16 *y, float eps) {
  __shared__ float parts[2][32];
  const u64 at = u64(blockIdx.x) * WIDTH + 8 * threadIdx.x;
  const uint4 entries = load16(x + at), weights = load16(weight + 8 * threadIdx.x);
  const u32 words[4] = {entries.x, entries.y, entries.z, entries.w};
  const u32 factors[4] = {weights.x, weights.y, weights.z, weights.w};
  float values[8], sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) values[2 * i] = low_to_float(words[i]), values[2 * i + 1] = high_to_float(words[i]);
#pragma unroll
  for (int i = 0; i < 8; i++) sum += values[i];
  const float mean = block_sum<WARPS>(sum, parts[0]) / WIDTH;
#pragma unroll
  for (int i = 0; i < 8; i++) values[i] -= mean, squares += values[i] * values[i];
  const float scale = rsqrtf(block_sum<WARPS>(squares, parts[1]) / WIDTH + eps);
  u32 out[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    out[i] = pack_bf16(values[2 * i] * scale * low_to_float(factors[i]),
                       values[2 * i + 1] * scale * high_to_float(factors[i]));
  const uint4 results = make_uint4(out[0], out[1], out[2], out[3]);
#if PACKED
  const Segment segment = dense_segment(blockIdx.x / ROWS, ROWS, gridDim.x);
  const int block = threadIdx.x / 16, quarter = threadIdx.x / 4 % 4, eight = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < 2; step++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u8 *chunk = chunk_of(reinterpret_cast<u8 *>(y), segment, blockIdx.x % ROWS, WIDTH, block, eight, step, half);
      *reinterpret_cast<u32 *>(chunk + 4 * quarter) = activations_of(&results, step, half);
    }
#else
  *(uint4 *)(y + at) = results;
#endif
}
