// LayerNorm, then the router: logits, softmax, the choice of experts and their weights.
//
// A block has TOKENS tokens. A thread normalizes 8 entries of each. For the logits, tensor cores take 16 experts' rows
// as operand A and the tokens as B. Each warp has two stretches of 128 entries of the inner axis, and the warps' sums
// meet in shared memory. In a stretch, a lane has 8 entries from 32 i + 8 (lane % 4) on, for i from 0 to 3, in both
// operands. A sum may take its terms in any order.
//
// For TOKENS = 1 and at most 16 experts, the router's rows are loaded before the norm is known, since reading them
// takes longer than the norm. Half of them go to registers (all that fit), the other half to L2.
//
// Macros: WIDTH; EXPERTS, at most 32; TOP_K; TOKENS, at most 8. Several tokens' rows are dynamic shared memory.
//   NORM: the divisor of the chosen experts' weights. NONE divides by nothing, SUM by their sum, ORDER by their norm of
//     any order. Only ORDER needs powers, which are a fifth of the code that MLX hashes at each launch.
#include "common.cuh"

#define NONE 0
#define SUM 1
#define ORDER 2

constexpr int WARPS = WIDTH / 256, TILES = (EXPERTS + 15) / 16;
// The padding lets two tokens' rows start in different banks of shared memory.
constexpr int PITCH = WIDTH + 32;
constexpr bool EARLY = TOKENS * TILES == 1;

// Sums over the block's threads. Every thread gets the result.
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

// The start of a warp's stretch (0 or 1) in the row of expert lane / 4 (`half` 0) or lane / 4 + 8 (1) of a tile of 16.
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
#if TOKENS == 1
  __shared__ __align__(16) u16 shared[TOKENS][PITCH];
#else
  extern __shared__ __align__(16) u16 shared[][PITCH];
#endif
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
  const int first = blockIdx.x * TOKENS, entry = 8 * threadIdx.x;

  uint4 entries[TOKENS] = {}, rows[2][2][4], scale = {};
  // Always true. Without the branch, the compiler would issue the later loads only after the first has arrived.
  if (first < tokens) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
      if (first + t < tokens) entries[t] = load16(x + u64(first + t) * WIDTH + entry);
    scale = load16(weight + entry);
    if (EARLY) {
      load_experts(rows[0], router, 0, 0);
      // Four lanes prefetch the four lines of 128 bytes that they will load together.
      asm volatile("prefetch.global.L2 [%0];" ::"l"(place_of(router, 0, quarter / 2, 1) + 64 * (quarter % 2)));
    }
  }

  // The mean comes first and the deviations second, since the mean may be much larger than the deviations.
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

  // Each warp takes a token, each lane an expert.
  for (int t = warp; t < TOKENS && first + t < tokens; t += WARPS) {
    const int token = first + t;
    float logit = -__uint_as_float(0x7f800000);
    if (lane < EXPERTS) {
      logit = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) logit += products[w][t][lane];
      logits[token * EXPERTS + lane] = logit;
    }
    // Ranked by logits, since two logits can give the same probability in float32. Of equal logits the first wins.
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
    // If a logit is NaN, more than TOP_K are chosen.
    if (chosen && place < TOP_K) {
      top_experts[token * TOP_K + place] = lane;
      expert_weights[token * TOP_K + place] = float_to_bf16(odds / norm);
    }
  }
}
