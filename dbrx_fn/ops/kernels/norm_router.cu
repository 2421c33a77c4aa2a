// Layer norm, and which experts its result goes to: logits, softmax, choice and weights.
//
// A block has TOKENS tokens, of which a thread normalizes 8 entries each. For the logits, tensor cores take 16 experts'
// rows as operand A and the tokens as B; each warp has two stretches of 128 entries of the inner axis, and the warps'
// sums meet in shared memory. Of a stretch, a lane has the entries 32 i + 8 (lane % 4) to + 7 for i from 0 to 3, in
// both operands alike, since sums don't care for the order of their terms.
//
// Where it is one token, half of the router's rows (all that registers can hold) are on their way to the multiprocessor
// before the norm is known and the others to the second cache: the 200 KB take it 2 us to read, the norm takes 1.
//
// Macros: WIDTH; EXPERTS, at most 32; TOP_K; TOKENS, at most 8; NORM, by what the chosen experts' weights are divided:
// NONE, if all experts' add up to 1, the chosen ones' SUM, or their norm of any ORDER, whose powers are a fifth of the
// code, which MLX hashes at each launch.
#include "common.cuh"

#define NONE 0
#define SUM 1
#define ORDER 2

constexpr int WARPS = WIDTH / 256, TILES = (EXPERTS + 15) / 16;
// Two tokens' rows start in different banks.
constexpr int PITCH = WIDTH + 32;
constexpr bool EARLY = TOKENS * TILES == 1;

// Sums over the block's threads, known to all of them.
__device__ __forceinline__ void add_up(float *sums, float (*of_warps)[TOKENS]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    sums[t] = warp_sum(sums[t]);
    if (lane == 0) of_warps[warp][t] = sums[t];
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < TOKENS; t++) sums[t] = warp_sum(lane < WARPS ? of_warps[lane][t] : 0.f);
}

// Where a warp's stretch (0 or 1) begins in the row of an expert, of 16: lane / 4, or that and 8.
__device__ __forceinline__ const u16 *place_of(const u16 *router, int tile, int half, int stretch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int expert = min(16 * tile + 8 * half + lane / 4, EXPERTS - 1);
  return router + expert * WIDTH + (warp + stretch * WARPS) * 128;
}

__device__ __forceinline__ void load_experts(uint4 (*rows)[4], const u16 *router, int tile, int stretch) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      rows[half][i] = load16(place_of(router, tile, half, stretch) + 32 * i + 8 * (threadIdx.x % 4));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
    norm_router(const u16 *x, const u16 *weight, const u16 *router, u16 *normed, u16 *expert_weights, float *logits,
                u32 *top_experts, int tokens, float eps, float order) {
  __shared__ float of_warps[2][WARPS][TOKENS], products[WARPS][TOKENS][16 * TILES];
  __shared__ __align__(16) u16 shared[TOKENS][PITCH];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
  const int first = blockIdx.x * TOKENS, entry = 8 * threadIdx.x;

  uint4 entries[TOKENS] = {}, rows[2][2][4], scale = {};
  // Always, but without a branch the compiler puts the later loads behind the wait for the first.
  if (first < tokens) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
      if (first + t < tokens) entries[t] = load16(x + u64(first + t) * WIDTH + entry);
    scale = load16(weight + entry);
    if (EARLY) {
      load_experts(rows[0], router, 0, 0);
      // Four lanes have the four lines of 128 bytes that they will load together.
      asm volatile("prefetch.global.L2 [%0];" ::"l"(place_of(router, 0, quarter / 2, 1) + 64 * (quarter % 2)));
    }
  }

  // The mean first, and deviations from it second: it may be much larger than they are.
  float means[TOKENS], squares[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const uint4 e = entries[t];
    means[t] = low_to_float(e.x) + high_to_float(e.x) + low_to_float(e.y) + high_to_float(e.y) + low_to_float(e.z) +
               high_to_float(e.z) + low_to_float(e.w) + high_to_float(e.w);
  }
  add_up(means, of_warps[0]);
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    means[t] /= WIDTH;
    const u32 words[4] = {entries[t].x, entries[t].y, entries[t].z, entries[t].w};
    squares[t] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float low = low_to_float(words[i]) - means[t], high = high_to_float(words[i]) - means[t];
      squares[t] += low * low + high * high;
    }
  }
  add_up(squares, of_warps[1]);
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const float factor = rsqrtf(squares[t] / WIDTH + eps);
    u32 words[4] = {entries[t].x, entries[t].y, entries[t].z, entries[t].w};
    const u32 scales[4] = {scale.x, scale.y, scale.z, scale.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      words[i] = pack_bf16((low_to_float(words[i]) - means[t]) * factor * low_to_float(scales[i]),
                           (high_to_float(words[i]) - means[t]) * factor * high_to_float(scales[i]));
    const uint4 made = make_uint4(words[0], words[1], words[2], words[3]);
    *(uint4 *)&shared[t][entry] = made;
    if (first + t < tokens) *(uint4 *)(normed + u64(first + t) * WIDTH + entry) = made;
  }
  __syncthreads();

#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    if (!EARLY) load_experts(rows[0], router, tile, 0);
    load_experts(rows[1], router, tile, 1);
    float sums[2][4] = {};
#pragma unroll
    for (int stretch = 0; stretch < 2; stretch++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint4 token = make_uint4(0, 0, 0, 0);
        if (group < TOKENS)
          token = *(const uint4 *)&shared[group][(warp + stretch * WARPS) * 128 + 32 * i + 8 * quarter];
        const uint4 upper = rows[stretch][0][i], lower = rows[stretch][1][i];
        multiply_accumulate(sums[stretch], upper.x, lower.x, upper.y, lower.y, token.x, token.y);
        multiply_accumulate(sums[stretch], upper.z, lower.z, upper.w, lower.w, token.z, token.w);
      }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = 2 * quarter + i % 2, expert = 16 * tile + group + 8 * (i / 2);
      if (token < TOKENS) products[warp][token][expert] = sums[0][i] + sums[1][i];
    }
  }
  __syncthreads();

  // A warp has a token, a lane an expert.
  for (int t = warp; t < TOKENS && first + t < tokens; t += WARPS) {
    const int token = first + t;
    float logit = -__uint_as_float(0x7f800000);
    if (lane < EXPERTS) {
      logit = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) logit += products[w][t][lane];
      logits[token * EXPERTS + lane] = logit;
    }
    // By logits, since two of them can have the same probability in float32; of equal ones the first goes before.
    int before = 0;
#pragma unroll
    for (int other = 0; other < EXPERTS; other++) {
      const float rival = __shfl_sync(~0u, logit, other);
      before += rival > logit || (rival == logit && other < lane);
    }
    const bool chosen = lane < EXPERTS && before < TOP_K;

    const float odds = expf(logit - warp_max(logit));
#if NORM == NONE
    const float norm = warp_sum(odds);
#elif NORM == SUM
    const float norm = warp_sum(chosen ? odds : 0);
#elif NORM == ORDER
    const float norm = powf(warp_sum(chosen ? powf(odds, order) : 0), 1 / order);
#endif
    const int place = __popc(__ballot_sync(~0u, chosen) & ((1u << lane) - 1));
    // There are more than TOP_K where a logit is no number.
    if (chosen && place < TOP_K) {
      top_experts[token * TOP_K + place] = lane;
      expert_weights[token * TOP_K + place] = float_to_bf16(odds / norm);
    }
  }
}
