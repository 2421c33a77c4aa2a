// Queries, keys and values of a few new tokens of a few sequences: norm, projection, clamp, RoPE, split into heads.
//
// A block computes 8 pairs of a head's entries i and i + HEAD_DIM / 2, which RoPE rotates together. The first are
// the upper rows of a product, the second the lower ones. A single token is normalized by each block again.
//
// Macros: those of products.cuh except TALL and DEPTH.
//   BLOCKS: blocks per multiprocessor.
//   HEAD_DIM: entries per head.
//   NORM_WIDTH: d_model if x is a single row, which is normalized first; else 0.
//   SINGLE: 1 if each row has one new token. Constants then save divisions.
#define TALL 1
#define DEPTH 1
#include "products.cuh"
#include "rotary.cuh"

constexpr int HALF = HEAD_DIM / 2, PARTS = HALF / 8;

// The addresses of a lane's rows of the matrix: one of 8 in a head's first half, and its partner.
struct PairedRows {
  Row row;
  int inner;
  __device__ __forceinline__ Stored load(int next, int tall, int half) const {
    return row.load(next, HALF * half, inner);
  }
  __device__ __forceinline__ void advance(int blocks) { row.advance(blocks); }
};

#if NORM_WIDTH
constexpr int CHUNKS = (NORM_WIDTH / 8 + 32 * WARPS - 1) / (32 * WARPS);

// The normalized token in shared memory. The address is that of the lane's entries of a block.
struct NormedRow {
  const u16 *row;
  __device__ __forceinline__ uint4 load(int tile, int at) const { return *(const uint4 *)(row + at); }
  __device__ __forceinline__ void advance(int blocks) { row += 128 * blocks; }
};

// The norm of layer_norm.cu, with several runs of 8 entries per thread.
__device__ __forceinline__ void normalize(const u16 *x, const u16 *weight, u16 *normed, float eps) {
  __shared__ float parts[2][32];
  uint4 entries[CHUNKS], factors[CHUNKS];
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int at = 8 * (32 * WARPS * chunk + threadIdx.x);
    entries[chunk] = at < NORM_WIDTH ? load16(x + at) : make_uint4(0, 0, 0, 0);
    factors[chunk] = at < NORM_WIDTH ? load16(weight + at) : make_uint4(0, 0, 0, 0);
  }
  float sum = 0, squares = 0;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 pair = word_of(&entries[chunk], i);
      sum += low_to_float(pair) + high_to_float(pair);
    }
  const float mean = block_sum<WARPS>(sum, parts[0]) / NORM_WIDTH;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 pair = word_of(&entries[chunk], i);
      const float low = low_to_float(pair) - mean, high = high_to_float(pair) - mean;
      if (8 * (32 * WARPS * chunk + threadIdx.x) < NORM_WIDTH) squares += low * low + high * high;
    }
  const float scale = rsqrtf(block_sum<WARPS>(squares, parts[1]) / NORM_WIDTH + eps);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int at = 8 * (32 * WARPS * chunk + threadIdx.x);
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 pair = word_of(&entries[chunk], i), factor = word_of(&factors[chunk], i);
      words[i] = pack_bf16((low_to_float(pair) - mean) * scale * low_to_float(factor),
                           (high_to_float(pair) - mean) * scale * high_to_float(factor));
    }
    if (at < NORM_WIDTH) *(uint4 *)(normed + at) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  __syncthreads();
}
#endif

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) project_qkv(
    const u16 *x,
#if NORM_WIDTH
    const u16 *norm,
#endif
    MATRIX(matrix), const int *offsets, const float *inverse_frequencies, u16 *q, u16 *k, u16 *v, int tokens,
#if !SINGLE
    int time,
#endif
    int inner, int n_heads, int kv_n_heads, float clip, float eps) {
#if SINGLE
  constexpr int time = 1;
#endif
  __shared__ Partial partial;
  __shared__ float positions[8 * TILES], frequencies[8];
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
  const int first_token = blockIdx.y * 8 * TILES, head = blockIdx.x / PARTS, pair = 8 * (blockIdx.x % PARTS);
  PairedRows rows{ROW(matrix, head * HEAD_DIM + pair + group, inner, quarter), inner};
  rows.advance(warp);

  if (threadIdx.x < 8 * TILES) {
    const int token = min(first_token + int(threadIdx.x), tokens - 1);
    positions[threadIdx.x] = offsets[token / time] + token % time;
  }
  // Another warp loads these at the same time.
  if (warp == 1 && threadIdx.x % 32 < 8) frequencies[threadIdx.x % 32] = inverse_frequencies[pair + threadIdx.x % 32];
#if NORM_WIDTH
  __shared__ __align__(16) u16 normed[NORM_WIDTH];
  normalize(x, norm, normed, eps);
  NormedRow activations{normed + 32 * quarter};
#else
  Rows activations;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
    activations.rows[tile] = x + u64(min(first_token + 8 * tile + group, tokens - 1)) * inner + 32 * quarter;
#endif
  activations.advance(warp);
  float sums[TILES][TALL][4] = {};
  add_products(sums, rows, activations, warp, inner / 128);
  partial.put(sums);
  __syncthreads();

  for (int index = threadIdx.x; index < TILES * 64; index += 32 * WARPS) {
    const int of = index % 32, entry = index / 32 % 2, tile = index / 64;
    const int token = first_token + 8 * tile + 2 * (of % 4) + entry, i = pair + of / 4;
    if (token >= tokens) continue;
    float first = clamp(partial.total(tile, 0, entry, of), clip);
    float second = clamp(partial.total(tile, 0, entry + 2, of), clip);
    const bool turned = head < n_heads + kv_n_heads;
    if (turned) {
      const float2 turn = turn_of(positions[token - first_token], frequencies[of / 4]);
      const float before = first;
      first = before * turn.x - second * turn.y, second = before * turn.y + second * turn.x;
    }
#if SINGLE
    u16 *target = head < n_heads ? q : turned ? k : v;
    const int heads = head < n_heads ? n_heads : kv_n_heads;
    const int within = head < n_heads ? head : turned ? head - n_heads : head - n_heads - kv_n_heads;
    target += (token * heads + within) * HEAD_DIM + i;
    target[0] = float_to_bf16(first), target[HALF] = float_to_bf16(second);
#else
    // Queries lie by token, keys and values by head, as the cache has them.
    u16 *target = q + (token * n_heads + head) * HEAD_DIM;
    if (head >= n_heads) {
      const int within = (head - n_heads) % kv_n_heads;
      target = (turned ? k : v) + ((token / time * kv_n_heads + within) * time + token % time) * HEAD_DIM;
    }
    target[i] = float_to_bf16(first), target[i + HALF] = float_to_bf16(second);
#endif
  }
}
