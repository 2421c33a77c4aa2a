// Attention of a few new tokens per row to the cached positions up to their own, split over blocks.
// decode_attention_combine.cu merges the blocks' parts.
//
// A query is one head of one new token. A block takes up to 8 queries that share a key and value head, of one token or
// of neighbouring ones, so the cache is read once for all of them. Tiles of 16 positions go to warps in turn, across all
// blocks of the split axis. For every length, the warps' numbers of tiles differ by at most one. The kernel reads the
// lengths; the grid doesn't depend on them. Blocks without a tile return.
//
// Tensor cores take their operands directly from the registers that loads from global memory fill.
// Scores: queries are the rows of operand A, positions the columns of B. A has 16 rows for 8 queries: rows 0 to 7 hold
// one half of the queries' entries, rows 8 to 15 the other half. Both are multiplied by both halves of the keys, and
// half of each result is used. The scores then have the layout of operand B of the second product.
// Values: their dimensions are A's rows. Entry 8 (lane / 4) + 2 r and the one after it are rows lane / 4 and
// 8 + lane / 4 of tile r.
// A probability is passed as two bfloat16 numbers: a single one would double the error of rounding the output.
// Once a tile's keys are used, the next tile's keys are loaded into their registers. Values are loaded in the same way.
//
// Macros: HEAD_DIM, 64 or 128; GROUP, the number of query heads that share a key head; WARPS per block.
//   SINGLE: 1 if each row has one new token. Constants then save divisions.
#include "common.cuh"

constexpr int CHUNKS = HEAD_DIM / 32, HALVES = HEAD_DIM / 64;

__device__ __forceinline__ u32 word_of(const uint4 &four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000); }

// What the largest score starts from. One of several tokens may see no position of a warp's tiles, and minus infinity
// would make its sums NaN.
#if SINGLE
#define LOWEST (-infinity())
#else
#define LOWEST (-3e38f)
#endif

// Rows past the last of `n` positions repeat that position's: they are masked, but must be finite.
__device__ __forceinline__ void load_keys(uint4 (*rows)[CHUNKS], const u16 *keys, int tile, int n) {
  const int group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
      rows[half][chunk] =
          stream16(keys + u64(min(16 * tile + 8 * half + group, n - 1)) * HEAD_DIM + 32 * chunk + 8 * quarter);
}
__device__ __forceinline__ void load_values(uint4 (*rows)[HALVES], const u16 *values, int tile, int n) {
  const int group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int half = 0; half < HALVES; half++)
      rows[i][half] = stream16(values + u64(min(16 * tile + 8 * (i / 2) + 2 * quarter + i % 2, n - 1)) * HEAD_DIM +
                               64 * half + 8 * group);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 3)
    decode_attention(const u16 *q, const u16 *keys, const u16 *values, const int *offsets, float *parts, float2 *stats,
                     int capacity,
#if !SINGLE
                     int time, int kv_n_heads,
#endif
                     float scale) {
  __shared__ float largest[WARPS][8], totals[WARPS][8], mixed[WARPS][8][HEAD_DIM];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
  const int row = blockIdx.z, split = blockIdx.x, splits = gridDim.x;
#if SINGLE
  constexpr int time = 1, blocks = (GROUP + 7) / 8;
  const int kv_head = blockIdx.y / blocks, kv_n_heads = gridDim.y / blocks;
#else
  const int blocks = (time * GROUP + 7) / 8;
  const int kv_head = blockIdx.y / blocks;
#endif
  const int first = 8 * (blockIdx.y % blocks), count = min(8, time * GROUP - first);
  const u64 first_kv_head = u64(row) * kv_n_heads + kv_head;
  // The heads of all rows' tokens are numbered together.
#if SINGLE
  const u64 first_head = first_kv_head * GROUP + first;
  const auto head_of = [&](int query) { return first_head + query; };
#else
  const auto head_of = [&](int of) {
    const int query = first + of;
    return ((u64(row) * time + query / GROUP) * kv_n_heads + kv_head) * GROUP + query % GROUP;
  };
#endif

  const int n = min(offsets[row] + time, capacity), tiles = (n + 15) / 16;
  if (split * WARPS >= tiles) return;
  keys += first_kv_head * capacity * HEAD_DIM;
  values += first_kv_head * capacity * HEAD_DIM;

  int tile = split * WARPS + warp;
  uint4 key[2][CHUNKS], value[4][HALVES], query[CHUNKS];
  if (tile < tiles) {
    load_keys(key, keys, tile, n);
    load_values(value, values, tile, n);
  }
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++)
    query[chunk] = group < count ? load16(q + head_of(group) * HEAD_DIM + 32 * chunk + 8 * quarter)
                                 : make_uint4(0, 0, 0, 0);
  const int seen = SINGLE ? n : min(offsets[row] + (first + group) / GROUP + 1, n);

  // `maximum` and `total` belong to query `group`, with exponentials of base 2. `mix` belongs to queries 2 quarter and
  // 2 quarter + 1.
  float maximum = LOWEST, total = 0, mix[HALVES][4][4] = {};
  while (tile < tiles) {
    const int position = 16 * tile + 2 * quarter;
    tile += splits * WARPS;

    float score[2][2][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint4 a = query[chunk], b = key[half][chunk];
        multiply_accumulate(score[half][0], a.x, a.z, a.y, a.w, b.x, b.y);
        multiply_accumulate(score[half][1], a.x, a.z, a.y, a.w, b.z, b.w);
      }
    if (tile < tiles) load_keys(key, keys, tile, n);

    float p[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float sum = score[i / 2][0][i % 2] + score[i / 2][1][2 + i % 2];
      p[i] = position + 8 * (i / 2) + i % 2 < seen ? sum * scale : -infinity();
    }
    float highest = fmaxf(fmaxf(p[0], p[1]), fmaxf(p[2], p[3]));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    highest = fmaxf(highest, maximum);
    const float fade = exp2_of(maximum - highest);
    maximum = highest;
#pragma unroll
    for (int i = 0; i < 4; i++) p[i] = exp2_of(p[i] - maximum);
    total = total * fade + (p[0] + p[1]) + (p[2] + p[3]);

    u32 coarse[2], fine[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      coarse[i] = pack_bf16(p[2 * i], p[2 * i + 1]);
      fine[i] = pack_bf16(p[2 * i] - low_to_float(coarse[i]), p[2 * i + 1] - high_to_float(coarse[i]));
    }
    const float fade_even = __shfl_sync(~0u, fade, 8 * quarter), fade_odd = __shfl_sync(~0u, fade, 8 * quarter + 4);
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
      for (int r = 0; r < 4; r++) {
        float *sums = mix[half][r];
        sums[0] *= fade_even, sums[1] *= fade_odd, sums[2] *= fade_even, sums[3] *= fade_odd;
        const u32 v0 = word_of(value[0][half], r), v1 = word_of(value[1][half], r);
        const u32 v2 = word_of(value[2][half], r), v3 = word_of(value[3][half], r);
        const u32 a0 = __byte_perm(v0, v1, 0x5410), a1 = __byte_perm(v0, v1, 0x7632);
        const u32 a2 = __byte_perm(v2, v3, 0x5410), a3 = __byte_perm(v2, v3, 0x7632);
        multiply_accumulate(sums, a0, a1, a2, a3, coarse[0], coarse[1]);
        multiply_accumulate(sums, a0, a1, a2, a3, fine[0], fine[1]);
      }
    if (tile < tiles) load_values(value, values, tile, n);
  }

  total += __shfl_xor_sync(~0u, total, 1);
  total += __shfl_xor_sync(~0u, total, 2);
  if (quarter == 0) largest[warp][group] = maximum, totals[warp][group] = total;
#pragma unroll
  for (int half = 0; half < HALVES; half++)
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
      for (int odd = 0; odd < 2; odd++)
        *(float2 *)&mixed[warp][2 * quarter + odd][64 * half + 8 * group + 2 * r] =
            make_float2(mix[half][r][odd], mix[half][r][2 + odd]);
  __syncthreads();

  for (int index = threadIdx.x; index < count * HEAD_DIM; index += 32 * WARPS) {
    const int of = index / HEAD_DIM, entry = index % HEAD_DIM;
    float maximum = LOWEST, sum = 0, total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) maximum = fmaxf(maximum, largest[w][of]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float factor = exp2_of(largest[w][of] - maximum);
      sum += factor * mixed[w][of][entry];
      total += factor * totals[w][of];
    }
    const u64 part = head_of(of) * splits + split;
    parts[part * HEAD_DIM + entry] = sum;
    if (entry == 0) stats[part] = make_float2(maximum, total);
  }
}
